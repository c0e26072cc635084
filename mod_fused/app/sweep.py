"""`mod-fused sweep`: rewards over a grid of weights, as a CSV that grows and a picture."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__, world
from ..decoding.ensemble import Ensemble
from . import options, prompt_input, scorers, strengths, trade_off
from .models import (
    as_conversations,
    check_chat,
    check_files,
    is_own,
    load_models,
    policy_names,
    with_roles,
)
from .options import UsageError
from .scorers import STRENGTHS
from .strengths import Guided
from .sweep_log import SweepLog, fingerprint
from .terminal import table, write


def run_sweep(args: argparse.Namespace) -> int:
    scorers.check(args)
    check_chat(args)
    names = policy_names(args)
    check_files(args.csv, args.picture, picture=args.picture)
    labels, rewards = _rewards(args, names)
    weights = trade_off.grid_size(len(names), args.points) if names else 1
    count = args.prompts if args.prompt_file is None else 1
    trade_off.check_size(count, args.samples, weights, len(labels) + len(names) + 1)
    grid = trade_off.simplex_grid(len(names), args.points) if names else [()]
    prompts = _prompts(args)
    ensemble = load_models(args)
    guide = scorers.load_guidance(args).get("value_fn")
    levels = list(args.strength or scorers.STRENGTHS) if guide is not None else []

    settings = _settings(args, ensemble, guide, levels, prompts)
    log = _log(args, settings, names, labels if rewards else None)
    places = [(level, point) for level in levels or [None] for point in grid]
    found = log.resume(places) if args.resume else []
    how: dict[str, Any] = {
        "done": len(found),
        "samples": args.samples,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "divergence": args.divergence,
        "normalizer": args.normalizer,
        "sequence_history": args.sequence_history,
        "plausibility": args.plausibility,
        "max_new_tokens": args.max_new_tokens,
    }
    batches: Iterator[list[Guided]]
    if guide is None:
        plain = trade_off.evaluating(ensemble, prompts, grid, rewards, **how)
        batches = ([Guided(None, point) for point in points] for points in plain)
    else:
        batches = strengths.evaluating(ensemble, prompts, grid, levels, guide, rewards, **how)
    with _interruptible(f"{args.csv}, out of {len(grid) * max(1, len(levels))}", found):
        for points in batches:
            log.add(points)
            found += points
    if guide is None:
        _show(args, found, names, len(prompts))
    else:
        _show_strengths(args, found, names, labels, len(prompts))
    return 0


def _log(
    args: argparse.Namespace,
    settings: dict[str, Any],
    names: list[str],
    labels: list[str] | None,
) -> SweepLog:
    """The files of a sweep of the policies `names`; `labels` name the rewards, None without any."""

    def line(found: Guided) -> dict[str, float]:
        if args.values:
            return strengths.line(found, names, labels or [])
        return trade_off.line(found.point, names)

    rewards = None if labels is None else np.zeros((len(labels), 1))
    nothing = trade_off.Point(
        (0.0,) * len(names), rewards, np.zeros((len(names), 1)), np.zeros(1), 1
    )
    return SweepLog(args.csv, settings, list(line(Guided(None, nothing))), line)


@contextmanager
def _interruptible(where: str, found: list[Guided]) -> Iterator[None]:
    """Let SIGTERM end the sweep as Ctrl-C does, and say how many points are kept."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()  # only it sets handlers
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield
    except KeyboardInterrupt:
        kept = f"mod-fused: {len(found)} points are in {where}; --resume goes on"
        print(kept, file=sys.stderr, flush=True)
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _prompts(args: argparse.Namespace) -> list[Any]:
    if args.prompt_file is None:
        return world.prompts(args.prompts, args.seed)
    prompts = prompt_input.read_prompts(args.prompt_file.read_bytes(), str(args.prompt_file))
    if not prompts:
        raise UsageError(f"{args.prompt_file} holds no prompt")
    return with_roles(args, prompts) if is_own(args) else as_conversations(prompts)


def _rewards(
    args: argparse.Namespace, names: list[str]
) -> tuple[list[str], list[trade_off.Reward] | None]:
    """The rewards to measure, and their names."""
    if is_own(args):
        if args.reference is None or args.prompt_file is None:
            raise UsageError("a sweep of own models needs --reference and --prompt-file")
        if args.reward and not args.values and len(args.reward) != len(names):
            raise UsageError(
                f"expected one --reward per policy ({len(names)}), got {len(args.reward)}"
            )
        return args.reward, [_load_reward(spec) for spec in args.reward] or None
    if args.reward:
        raise UsageError("--reward goes with own models; the embedded world has its own rewards")
    labels = names
    if args.values:
        embedded = [name for name in args.values if name in world.OBJECTIVES]
        labels = list(dict.fromkeys([*names, *embedded])) or list(world.OBJECTIVES)
    return labels, [world.REWARDS[name] for name in labels]


def _load_reward(spec: str) -> trade_off.Reward:
    """The caller's function of (prompt, response); it gets a conversation's last message."""
    module, _, name = spec.partition(":")
    sys.path.insert(0, "")  # find modules in the current folder, as python -m does
    try:
        function: Callable[[str, str], float] = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the caller's module raises
        raise UsageError(f"--reward takes MODULE:FUNCTION, got {spec!r}: {error}") from error
    finally:
        sys.path.remove("")

    def reward(prompt: Any, response: str) -> float:
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        try:
            return float(function(text, response))
        except Exception as error:
            raise UsageError(f"--reward {spec}: {type(error).__name__}: {error}") from error

    return reward


def _settings(
    args: argparse.Namespace,
    ensemble: Ensemble,
    guide: Any,
    levels: Sequence[float],
    prompts: list[Any],
) -> dict[str, Any]:
    """All settings that change the numbers of a sweep, as JSON values."""
    models = [*ensemble.models, *(scorer.model for scorer in (guide.scorers if guide else ()))]
    names = ["reference", *policy_names(args), *(f"scorer {name}" for name in args.values or ())]
    hashed = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    return {
        "mod_fused": __version__,
        **{
            name: getattr(args, name)
            for name in (
                "divergence", "normalizer", "sequence_history", "plausibility", "max_new_tokens",
                "seed", "points", "samples", "batch_size", "candidates", "reward", "device",
                "dtype",
            )
        },
        "strength": levels,
        "prompts": f"{len(prompts)} ({hashed[:16]})",
        "models": names,
        **{
            f"tensors of {name}": None if model is None else fingerprint(model)
            for name, model in zip(names, models, strict=True)
        },
    }  # fmt: skip


def _show(args: argparse.Namespace, found: Sequence[Guided], names: list[str], count: int) -> None:
    points = [guided.point for guided in found]
    table(*trade_off.table_rows(points, names))
    for pair, (lead, error) in trade_off.leads(points, names).items():
        write(f"{pair}, beyond the straight line between them: {trade_off.signed(lead, error)}")
    write(f"table: {args.csv}")
    if len(names) < 2:
        write("no picture: a trade-off needs at least two policies")
        return
    _draw(args, trade_off.draw, points, names, f"{args.divergence}, {count} prompts")


def _show_strengths(
    args: argparse.Namespace,
    found: Sequence[Guided],
    names: list[str],
    labels: list[str],
    count: int,
) -> None:
    table(*strengths.table_rows(found, names, labels))
    write(f"table: {args.csv}")
    if not labels:
        write("no picture: it shows rewards, and there is no --reward")
        return
    title = f"{','.join(args.values)}: {args.divergence}, {count} prompts"
    _draw(args, strengths.draw, found, names, labels, title)


def _draw(args: argparse.Namespace, draw: Callable[..., None], *what: Any) -> None:
    try:
        draw(args.picture, *what)
        write(f"picture: {args.picture}")
    except ImportError as error:
        write(f"no picture: {error}")


def add_options(commands: Any, mixture: argparse.ArgumentParser) -> None:
    """Add the command `sweep` and its options."""
    sweep = commands.add_parser(
        "sweep", parents=[mixture], help="rewards over a grid of weights, as CSV and picture"
    )
    sweep.add_argument(
        "--points",
        type=options.whole(2),
        default=5,
        metavar="K",
        help="weights per edge of the simplex (default: 5: 0, 1/4, ..., 1)",
    )
    sweep.add_argument(
        "--prompts",
        type=options.whole(1),
        default=100,
        metavar="N",
        help="held-out prompts of the embedded world (default: 100)",
    )
    sweep.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="own prompts, one a line (needed with own models)",
    )
    sweep.add_argument(
        "--samples",
        type=options.whole(1),
        default=1,
        metavar="N",
        help="responses per prompt and weight (default: 1)",
    )
    sweep.add_argument(
        "--batch-size",
        type=options.whole(1),
        default=256,
        metavar="N",
        help="responses decoded at the same time (default: 256)",
    )
    sweep.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="function of (prompt, response) for own models, one per policy; without"
        " them the table shows log pi_i/pi_ref, the policies' implicit reward",
    )
    sweep.add_argument(
        "--strength",
        type=options.numbers,
        metavar="L,L",
        help="of --values, a grid; each number counts for all scorers"
        f" (default: {','.join(f'{x:g}' for x in STRENGTHS)})",
    )
    sweep.add_argument(
        "--csv",
        type=Path,
        default=Path("mod_fused_sweep.csv"),
        metavar="FILE",
        help="each point is written as soon as it is finished; FILE.points is what --resume needs",
    )
    sweep.add_argument(
        "--resume", action="store_true", help="go on with an interrupted sweep of the same options"
    )
    sweep.add_argument("--picture", type=Path, default=Path("mod_fused_sweep.png"), metavar="FILE")
    sweep.set_defaults(run=run_sweep)
