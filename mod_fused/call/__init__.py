"""One call of the op as data: its arguments, their checks, and what it writes to."""
