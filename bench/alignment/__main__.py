"""`python -m bench.alignment`: MOD beside merged and retrained policies and best-of-N."""

from __future__ import annotations

from . import command, estimates, policies

STUDY = command.Study(
    "alignment", "bench.alignment", policies.Sizes(), policies.TINY, policies.phases,
    estimates.summary,
)  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(command.main(STUDY))
