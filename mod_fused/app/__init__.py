"""The command line: each command is a file with its options and its work; main.py runs them."""
