"""`python -m bench.alignment`: MOD beside merged and retrained policies and best-of-N."""

from __future__ import annotations

from . import command, estimates, policies

if __name__ == "__main__":
    raise SystemExit(command.main("bench.alignment", policies, estimates.summary))
