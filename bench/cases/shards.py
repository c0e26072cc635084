"""The case `shards`: a vocabulary on two ranks. Either the ranks gather all models' logits and each
calls the op, as a serving engine does, or they draw together (`group`) and gather none."""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

import mod_fused

from ..case import Procedure
from ..report import plain

RANKS, VOCAB, ROUNDS = 2, 128256, 7
WEIGHTS = [0.6, 0.3]
DIVERGENCES, BATCHES = ("reverse_kl", "jsd"), (1, 8, 32)


def options(parser: argparse.ArgumentParser) -> None:
    """The case's own options."""
    add = parser.add_argument
    add("--divergences", nargs="+", default=DIVERGENCES)
    add("--batches", nargs="+", type=int, default=BATCHES, metavar="B")
    add("--rounds", type=int, default=ROUNDS, metavar="N", help=f"default {ROUNDS}")


def _gathered(own: list[Tensor], **how: Any) -> mod_fused.Sample:
    """All ranks' columns of all logits, then the op."""
    whole = []
    for x in own:
        parts = [torch.empty_like(x) for _ in range(RANKS)]
        dist.all_gather(parts, x)
        whole.append(torch.cat(parts, 1))
    return mod_fused.sample(whole[0], whole[1:], WEIGHTS, **how)


def _rank(rank: int, folder: str, args: dict[str, Any]) -> None:
    """What one rank does; rank 0 writes the rows."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS
    )
    rows: list[dict[str, Any]] = []
    for divergence, batch in product(args["divergences"], args["batches"]):
        generator = torch.Generator().manual_seed(batch)
        whole = 3.0 * torch.randn(len(WEIGHTS) + 1, batch, VOCAB, generator=generator)
        own = [x.chunk(RANKS, 1)[rank].bfloat16().contiguous() for x in whole]
        how: dict[str, Any] = {"divergence": divergence, "seed": 1}
        calls = {
            "gather": functools.partial(_gathered, own, **how),
            "group": functools.partial(
                mod_fused.sample, own[0], own[1:], WEIGHTS, group=dist.group.WORLD, **how
            ),
        }
        drawn = [call().tokens for call in calls.values()]
        if not torch.equal(*drawn):
            raise RuntimeError(f"other tokens with group: {divergence}, {batch} rows")
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(args["rounds"]):
            for name, call in calls.items():
                dist.barrier()
                began = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - began)
        found = {f"{name} ms": 1e3 * statistics.median(x) for name, x in seconds.items()}
        found["group / gather"] = found["group ms"] / found["gather ms"]
        rows.append({"divergence": divergence, "B": batch} | found)
    if rank == 0:
        torch.save(rows, Path(folder) / "rows.pt")
    dist.destroy_process_group()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All divergences and batches, on two processes with a thread each."""
    given = {"divergences": args.divergences, "batches": args.batches, "rounds": args.rounds}
    if args.quick:
        given |= {"batches": [1], "rounds": 1}
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank, (folder, given), nprocs=RANKS)
        rows = torch.load(Path(folder) / "rows.pt")
    what = f"{RANKS} gloo ranks of one thread, V = {VOCAB}, M = {len(WEIGHTS)}, bfloat16, medians"
    return {"what": what, "device": "cpu", "rows": rows}


SHARDS = Procedure(
    help="a vocabulary on two ranks: logits gathered, or drawn together",
    options=options,
    run=run,
    report=plain,
)
