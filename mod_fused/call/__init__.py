"""One call of the op as data: its arguments, their checks, and its outputs."""
