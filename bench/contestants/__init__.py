"""What is timed beside `mod_fused`: other code for the same draw, floors, decoding loops."""
