"""Studies of the embedded world, where rewards are exact: mixing policies while decoding
(`python -m bench.alignment`), value guidance (`.control`), the decoder's rules for whole answers
(`.rules`), and policies of different sizes (`.sizes`)."""
