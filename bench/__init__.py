"""Benchmarks: one runner (`python -m bench.run`), one registry of cases (`bench.registry`)."""
