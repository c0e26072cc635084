"""`python -m bench.real.cost`: tokens a second on the real model, after `python -m bench.real`.

One model in transformers' own `generate`, and two trained policies: MOD with adapters in one
forward pass, with separate models, in the authors' loop. They take turns; the machine must be idle.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import torch

from mod_fused import Ensemble

from .. import report
from ..case import set_threads
from ..cases.adapters import contestants, timed
from . import models, training
from .jobs import CORNERS, REVERSE_KL, Policy, Sizes
from .prompts import conversations, questions

TOKENS, ROUNDS = 32, 5


def measure(work: Path, model: str, batches: Sequence[int], rounds: int) -> report.Result:
    """The rows of all batches.

    Raises:
        ValueError: the adapters are not in `work`.
    """
    from peft import PeftModel

    folders = [training.adapter(work, Policy(REVERSE_KL, w)) for w in CORNERS[:2]]
    if missing := [x for x in folders if not x.exists()]:
        raise ValueError(f"no adapter {missing[0]}: run python -m bench.real first")
    if not model:
        models.prepare(False)
    reference, tokenizer = training.base(Sizes(model=model))
    adapted = PeftModel.from_pretrained(copy.deepcopy(reference), str(folders[0]), "0")
    adapted.load_adapter(str(folders[1]), "1")
    found, memory = contestants(adapted.eval())
    asked = conversations(questions("held out", 1))
    (ids, *_), _ = Ensemble([reference], tokenizer).encode(asked)
    rows: list[report.Row] = []
    for batch in batches:
        head = {"dtype": "float32", "M": 2, "B": batch}
        rows += timed(head, found, ids.repeat(batch, 1), TOKENS, rounds)
    weights = [{"contestant": name, "MB of weights": b / 1e6} for name, b in memory.items()]
    what = f"steps of the trained policies, {torch.get_num_threads()} threads, {rounds} rounds"
    return {"case": "real_cost", "what": what, "rows": rows, "memory": weights}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes real_cost.json and real_cost.md."""
    parser = argparse.ArgumentParser(prog="python -m bench.real.cost", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="for the results")
    add("--work", type=Path, default=Path("build/real"), metavar="DIR", help="the study's cache")
    add("--model", default="", metavar="NAME", help="as for python -m bench.real")
    add("--batches", nargs="+", type=int, default=[1, 8], metavar="B")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    add("--rounds", type=int, default=ROUNDS, metavar="N", help=f"default {ROUNDS}")
    args = parser.parse_args(argv)
    set_threads(args.threads)
    try:
        result = measure(args.work, args.model, args.batches, args.rounds)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(str(error)) from None
    result |= {"machine": report.machine(), "command": "python -m bench.real.cost"}
    args.out.mkdir(parents=True, exist_ok=True)
    report.save(result, file := args.out / "real_cost.json")
    file.with_suffix(".md").write_text(text := report.plain(result))
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
