"""Code that is timed beside `mod_fused`: other implementations of the draw, floors (lower bounds of
the time), decoding loops."""
