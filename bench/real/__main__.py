"""`python -m bench.real`: MOD's experiment on a real language model.

Three LoRA policies are tuned from SmolLM2-135M-Instruct for rewards that are exact functions of an
answer; MOD stands beside merging, retraining, choosing and value guidance.
"""

from __future__ import annotations

from types import SimpleNamespace

from ..alignment import command
from . import decoding, estimates, jobs

MODEL = {"default": "", "metavar": "NAME", "help": "any model's folder or hub name"}

if __name__ == "__main__":
    study = SimpleNamespace(Sizes=jobs.Sizes, TINY=jobs.TINY, phases=decoding.phases)
    raise SystemExit(command.main("bench.real", study, estimates.summary, options={"model": MODEL}))
