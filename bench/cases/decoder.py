"""The case `decoder`: tokens per second of whole decoding loops, and the share of a step that
drawing takes."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mod_fused import reference
from mod_fused.divergence import DIVERGENCES

from .. import check, measure
from ..case import Procedure, set_threads
from ..contestants import loops, models
from ..problem import POLICIES, WEIGHTS
from ..report import note

ROUNDS = 3
#: The largest error of a drawn token's log-probability, from the oracle on the logits that the loop
#: saw. Peers get more: they use textbook formulas in float32.
_TOLERANCE, _PEERS_TOLERANCE = 1e-4, 2e-2
OURS = ("generate", "generate_torch", "op")  # loops that draw with mod_fused.sample


def options(parser: argparse.ArgumentParser) -> None:
    """The case's own options."""
    add = parser.add_argument
    add("--models", nargs="+", choices=list(models.TOKENS), help="default: embedded 0.1b")
    add("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["float32", "bfloat16"])
    add("--divergences", nargs="+", choices=DIVERGENCES, default=["reverse_kl", "jsd"])
    add("--batches", nargs="+", type=int, metavar="B", help="default: 1 8")
    add("--tokens", type=int, metavar="T", help=f"a row, 2 or more; default {models.TOKENS}")
    add("--threads", type=int, metavar="N", default=torch.get_num_threads())
    add("--device", default="cpu", help="where the models and the logits are, such as cuda")
    add("--rounds", type=int, metavar="N", help=f"timed runs of each loop; default {ROUNDS}")


class Clock:
    """Times a loop from its first drawn token on, so that reading the prompts does not count. With
    `watch` it also times each later draw and keeps the arguments of all draws."""

    def __init__(self, synchronise: Callable[[], None], watch: bool = False) -> None:
        self.synchronise, self.watch = synchronise, watch
        self.draws: list[float] = []  # seconds, the first draw's left out
        self.given: list[tuple[Any, ...]] = []
        self._begin = 0.0

    def __call__(self, draw: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._begin and not self.watch:
                return draw(*args, **kwargs)
            start = self._now()
            out = draw(*args, **kwargs)
            end = self._now()
            if self._begin:
                self.draws.append(end - start)
            self._begin = self._begin or end
            self.given.append(args)
            return out

        return timed

    def _now(self) -> float:
        self.synchronise()
        return time.perf_counter()

    def seconds(self) -> float:
        """Seconds since the first token."""
        return self._now() - self._begin


def refusal(name: str, task: loops.Task, clock: Clock, drawn: loops.Drawn) -> str:
    """Why a loop may not be timed; empty if it passes. In the first row the tokens of the first and
    the last step must have the oracle's log-probability; tokens drawn by the op must also be those
    of the oracle's race."""
    tokens, logprobs = (x[0].tolist() for x in drawn)
    if len(tokens) != task.tokens:
        return f"drew {len(tokens)} tokens, expected {task.tokens}"
    for step in (0, task.tokens - 1):
        given = clock.given[step]  # arguments of `sample(ref, policies)` or `draw(logits, weights)`
        logits = [given[0], *given[1]] if isinstance(given[0], Tensor) else given[0]
        ref, *policies = (x[0].float().cpu() for x in logits)
        expected = reference.log_probs_row(ref, policies, task.weights, divergence=task.divergence)
        error = abs(expected[tokens[step]] - logprobs[step])
        if not error <= (_TOLERANCE if name in OURS else _PEERS_TOLERANCE):
            return f"step {step}: the log-probability of the token is off by {error:.1e}"
        if name in OURS:
            seed = reference.row_seeds(loops.SEED, 1)[0]
            if not check.won(tokens[step], np.exp(expected), seed, step):
                return f"step {step}: the token is not the oracle's"
    return ""


def _row(task: loops.Task, rounds: int) -> dict[str, Any]:
    """Check the loops, then time them in turn."""
    synchronise = torch.cuda.synchronize if task.prompts.is_cuda else lambda: None
    row: dict[str, Any] = {
        "refused": "", "skipped": {}, "draw_share": {}, "timings": {}, "ratios": {},
        "tokens_per_s": {}, "other_cores": None,
    }  # fmt: skip
    kept: dict[str, Callable[..., loops.Drawn]] = {}
    for name, loop in loops.contestants(task.divergence).items():
        loop(task._replace(tokens=2), Clock(synchronise))  # warm
        clock = Clock(synchronise, watch=True)
        drawn = loop(task, clock)
        seconds = clock.seconds()
        if reason := refusal(name, task, clock, drawn):
            if name in OURS:
                return {**row, "refused": f"{name}: {reason}"}
            row["skipped"][name] = reason
            continue
        row["draw_share"][name] = sum(clock.draws) / seconds
        kept[name] = loop
    others = measure.Others()
    seconds_of: dict[str, list[float]] = {name: [] for name in kept}
    for _ in range(rounds):
        for name, loop in kept.items():
            loop(task, clock := Clock(synchronise))
            seconds_of[name].append(clock.seconds() / (task.tokens - 1))
    row["other_cores"] = others.cores()
    timings = row["timings"] = {n: measure.timing(s) for n, s in seconds_of.items()}  # of a step
    rows = task.prompts.shape[0]
    row["tokens_per_s"] = {n: 1e6 * rows / t.median_us for n, t in timings.items()}
    mine = timings[OURS[0]].median_us
    row["ratios"] = {n: t.median_us / mine for n, t in timings.items() if n != OURS[0]}
    return row


def _tasks(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], loops.Task]]:
    """Each task, and its fields in the results."""
    names = args.models or (["embedded", "tiny"] if args.quick else ["embedded", "0.1b"])
    batches = args.batches or ([2] if args.quick else [1, 8])
    for name, dtype in itertools.product(names, args.dtypes):
        ensemble = models.ensemble(name, getattr(torch, dtype), args.device, POLICIES)
        tokens = args.tokens or (4 if args.quick else models.TOKENS[name])
        for batch, divergence in itertools.product(batches, args.divergences):
            prompts = models.prompts(name, ensemble, batch)
            head = {
                "models": name, "parameters": models.parameters(ensemble),
                "vocab": ensemble.vocab_size, "dtype": dtype, "batch": batch,
                "prompt": prompts.shape[1], "tokens": tokens, "divergence": divergence,
                "threads": args.threads,
            }  # fmt: skip
            yield head, loops.Task(ensemble, prompts, tokens, divergence, WEIGHTS)
        del ensemble  # there may be no memory for two


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All combinations of models, dtypes, batches and divergences."""
    if args.tokens is not None and args.tokens < 2:
        raise SystemExit(f"--tokens must be at least 2, got {args.tokens}")
    rounds = args.rounds or (1 if args.quick else ROUNDS)
    rows: list[dict[str, Any]] = []
    threads = torch.get_num_threads()
    set_threads(args.threads)
    try:
        for head, task in _tasks(args):
            row = {**head, **_row(task, rounds)}
            del task  # and with it its models
            rows.append(row)
            rates = " ".join(f"{n} {x:.1f}" for n, x in row["tokens_per_s"].items())
            where = " ".join(str(head[k]) for k in ("models", "dtype", "batch", "divergence"))
            note(f"{where}: {row['refused'] or rates}")
    finally:
        set_threads(threads)
    device = args.device
    if device.startswith("cuda"):
        device = torch.cuda.get_device_name(device)
    names = list(loops.contestants("reverse_kl"))
    return {"what": "tokens per second", "device": device, "contestants": names, "rows": rows}


DECODER = Procedure(
    help="tokens per second of decoding loops: the fused op, torch ops, a loop as is usual",
    options=options,
    run=run,
)
