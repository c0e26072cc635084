"""`python -m bench.alignment.control`: value guidance measured; JSON, Markdown and pictures."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from mod_fused import world

from ..report import machine
from . import control_pictures, control_report, guided
from .guided import BETA, PAIR_COLUMNS, Point, Sizes
from .statistics import interval

Array = np.ndarray
SCHEMA = 1


def lead_at_equal_kl(
    curve_rewards: Array, curve_kl: Array, rewards: Array, kl: Array
) -> dict[str, float] | None:
    """Reward of one method less that of a curve [N, S] at the same mean KL, with its interval.

    The curve is joined linearly between its S points. None where its KL does not reach that far.
    """
    ends = curve_kl.mean(0)
    if not ends.min() <= kl.mean() <= ends.max():
        return None

    def lead(r: Array, k: Array, own: Array, at: Array) -> Array:
        order = np.argsort(k, axis=1)
        x, y = np.take_along_axis(k, order, 1), np.take_along_axis(r, order, 1)
        known = [np.interp(a, xs, ys) for a, xs, ys in zip(at, x, y, strict=True)]
        return own - np.array(known)

    return interval(lead, curve_rewards, curve_kl, rewards, kl)


def estimates(point: Point) -> dict[str, Any]:
    """A point as a record: every reward and KL; of two objectives w.r and J = w.r - KL / beta."""
    record: dict[str, Any] = {
        "objective": point.objective,
        "method": point.method,
        "setting": point.setting,
        "bound": point.bound,
        "kl": interval(lambda k: k, point.kl),
    }
    for k, name in enumerate(world.OBJECTIVES):
        record[name] = interval(lambda r: r, point.rewards[:, k])
    if point.objective == "both":
        weighted = point.rewards[:, PAIR_COLUMNS] @ np.array(point.setting)
        record["weighted"] = interval(lambda r: r, weighted)
        record["worth"] = interval(lambda j: j, weighted - point.kl / BETA)
    return record


def leads(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Every point against tokenwise control by the shipped scorer at the same KL."""
    records = []
    for objective in guided.PANELS:
        column = world.OBJECTIVES.index(objective)
        here = [p for p in points if p.objective == objective]
        curves = {
            # Strength 0 is the reference itself.
            name: [p for p in here if p.method in ("reference", name)]
            for name in ("CD-FUDGE", "CD-FUDGE, as CD-Q")
        }
        stacked = {
            name: (
                np.stack([p.rewards[:, column] for p in curve], 1),
                np.stack([p.kl for p in curve], 1),
            )
            for name, curve in curves.items()
        }
        for p in here:
            for name, curve in stacked.items():
                same_data = p.method == "CD-Q" and name != "CD-FUDGE"
                main = name == "CD-FUDGE" and p.method not in ("reference", name)
                if (main or same_data) and not p.method.startswith("under"):
                    lead = lead_at_equal_kl(*curve, p.rewards[:, column], p.kl)
                    row = {"objective": objective, "method": p.method, "setting": p.setting}
                    records.append(row | {"bound": p.bound, "against": name, "lead": lead})
    return records


def worth_differences(points: Sequence[Point]) -> list[dict[str, Any]]:
    """J of MAVIS less that of each other method, pairs of prompts, mean over common weights."""
    worth: dict[str, dict[Any, Array]] = {}
    for p in points:
        weighted = p.rewards[:, PAIR_COLUMNS] @ np.array(p.setting)
        worth.setdefault(p.method, {})[p.setting] = np.stack([weighted, p.kl], 1)
    records = []
    for name in worth:
        if name == "MAVIS":
            continue
        gaps = [worth["MAVIS"][at] - there for at, there in worth[name].items()]
        gap = np.mean(gaps, axis=0)  # (N, 2)
        records.append(
            {
                "against": name,
                "weights": len(gaps),
                "weighted": interval(lambda g: g, gap[:, 0]),
                "kl": interval(lambda g: g, gap[:, 1]),
                "worth": interval(lambda g: g, gap[:, 0] - gap[:, 1] / BETA),
            }
        )
    return records


def measure(sizes: Sizes) -> dict[str, Any]:
    """Trains, decodes and estimates everything."""
    w = guided.World(sizes)
    w.say("answers of the reference")
    one = list(guided.one_objective(w))
    value_models = guided.value_models(w)
    two = list(guided.two_objectives(w, [scorer for scorer, _ in value_models.values()]))
    return {
        "schema": SCHEMA,
        "sizes": sizes._asdict(),
        "beta": BETA,
        "points": [estimates(p) for p in one],
        "leads": leads(one),
        "mavis": {
            name: [{k: round(x, 5) for k, x in it._asdict().items()} for it in history]
            for name, (_, history) in value_models.items()
        },
        "two": [estimates(p) for p in two],
        "differences": worth_differences(two),
    }


def run(*, quick: bool) -> dict[str, Any]:
    """`measure` with the time, the machine and the command."""
    torch.set_num_threads(1)  # more do not help models this small, and would change the rounding
    logging.disable_progress_bar()
    began = time.perf_counter()
    result = measure(guided.QUICK if quick else Sizes())
    result["seconds"] = round(time.perf_counter() - began)
    result["machine"] = machine()
    result["command"] = "python -m bench.alignment.control" + " --quick" * quick
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Writes `control.json`, `control.md`, `control.png` and `mavis.png`."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.alignment.control",
        description="Value-guided decoding on the embedded world: reward against KL.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the results")
    parser.add_argument(
        "--report", action="store_true", help="Markdown and pictures anew from DIR/control.json"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps and prompts: does it run")
    args = parser.parse_args(argv)
    file = args.out / "control.json"
    if not args.report:
        args.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(run(quick=args.quick), allow_nan=False)
        file.write_text(text.replace('{"objective"', '\n{"objective"') + "\n")
    result = json.loads(file.read_text())  # what a reader of the file has
    (args.out / "control.md").write_text(control_report.markdown(result))
    control_pictures.draw(result, args.out)
    print(f"wrote control.json, control.md and 2 pictures to {args.out}, {result['seconds']} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
