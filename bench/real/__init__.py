"""MOD's experiment on a real language model: see __main__."""
