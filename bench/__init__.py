"""Benchmarks: one runner (`python -m bench.run`), one list of cases (`bench.cases`).
`bench/README.md` says how each is measured."""
