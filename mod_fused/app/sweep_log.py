"""The files of a sweep: a CSV that grows by a line with every finished point, and a companion file
that `--resume` needs.

The companion `FILE.csv.points` holds one JSON value a line: first the settings of the sweep, then
each point with the results of its prompts. A line that is cut off at the end of either file is
computed again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .strengths import Guided
from .trade_off import Point

Line = Callable[[Guided], Mapping[str, float]]


class SweepLog:
    """The points of a sweep so far, on disk.

    Args:
        path: the CSV.
        settings: all settings that change the numbers, JSON values by name.
        columns: names of the CSV's columns.
        line: their values for a point.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], columns: Sequence[str], line: Line
    ) -> None:
        self.path = path
        self.points_path = path.with_name(f"{path.name}.points")
        self.settings = json.loads(json.dumps(settings))
        self.columns = columns
        self.line = line
        self.begun = False

    def add(self, points: Sequence[Guided]) -> None:
        """Write finished points. The first call replaces older files, even if it has no points."""
        if not self.begun:
            self.points_path.write_text(json.dumps(self.settings) + "\n", encoding="utf-8")
            self.path.write_text(self._csv([], header=True), encoding="utf-8", newline="")
            self.begun = True
        with open(self.points_path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(_as_json(point)) + "\n" for point in points)
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(self._csv(points))

    def resume(self, places: Sequence[tuple[float | None, Sequence[float]]]) -> list[Guided]:
        """The points that the files hold; `add` then appends to them.

        Args:
            places: strength and weights of all points of the sweep, in its order.

        Raises:
            ValueError: the files are not those of a sweep with these settings; says what differs.
        """
        lines = self.points_path.read_bytes().split(b"\n") if self.points_path.is_file() else [b""]
        lines = lines[:-1]  # the last has no line end: it is empty, or cut off
        if not lines:
            if self.path.exists():
                raise ValueError(
                    f"--resume: {self.points_path}, which says how {self.path} was made, is not "
                    "there: sweep without --resume, or into another file"
                )
            return []
        settings = self._parse(lines[0], 1)
        for name in {**settings, **self.settings}:
            old, new = settings.get(name), self.settings.get(name)
            if old != new:
                raise ValueError(f"--resume: {self.path} was made with {name} {old}, not {new}")
        points = [self._point(x, n, places) for n, x in enumerate(lines[1:], start=2)]
        self._check_csv(points)
        with open(self.points_path, "r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines))
        self.path.write_text(self._csv(points, header=True), encoding="utf-8", newline="")
        self.begun = True
        return points

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            value = json.loads(line)
            if isinstance(value, dict):
                return value
        except ValueError:
            pass
        raise self._damaged(number)

    def _point(
        self, line: bytes, number: int, places: Sequence[tuple[float | None, Sequence[float]]]
    ) -> Guided:
        """The point in a line. Raises if it is not the point of that place in the sweep."""
        try:
            point = _from_json(self._parse(line, number))
            if (point.strength, point.point.weights) == _place(*places[number - 2]):
                return point
        except (KeyError, IndexError, TypeError, ValueError):
            pass
        raise self._damaged(number)

    def _damaged(self, number: int) -> ValueError:
        return ValueError(f"--resume: line {number} of {self.points_path} is damaged")

    def _check_csv(self, points: Sequence[Guided]) -> None:
        """Refuse to replace a table of another sweep. The end of the table may be missing."""
        if not self.path.exists():
            return
        expected = self._csv(points, header=True).encode()
        found = self.path.read_bytes()
        if not expected.startswith(found) and not found.startswith(expected):
            pairs = zip(expected.split(b"\n"), found.split(b"\n"), strict=False)
            number = next(n for n, (a, b) in enumerate(pairs, start=1) if a != b)
            raise ValueError(
                f"--resume: line {number} of {self.path} is not what this sweep wrote there"
            )

    def _csv(self, points: Sequence[Guided], header: bool = False) -> str:
        text = io.StringIO()
        writer = csv.writer(text)
        if header:
            writer.writerow(self.columns)
        writer.writerows(self.line(point).values() for point in points)
        return text.getvalue()


def _place(strength: float | None, weights: Sequence[float]) -> tuple[Any, tuple[float, ...]]:
    return strength, tuple(map(float, weights))


def _as_json(point: Guided) -> dict[str, Any]:
    values = {name: getattr(point.point, name) for name in Point.__dataclass_fields__}
    lists = {n: x.tolist() if isinstance(x, np.ndarray) else x for n, x in values.items()}
    return {"strength": point.strength} | lists


def _from_json(value: dict[str, Any]) -> Guided:
    rewards = value["rewards"]
    return Guided(
        value["strength"],
        Point(
            tuple(value["weights"]),
            None if rewards is None else np.array(rewards),
            # Without policies there are no rows, and the empty list does not say how many prompts.
            np.array(value["log_ratios"]).reshape(-1, len(value["kl"])),
            np.array(value["kl"]),
            value["samples"],
        ),
    )


def fingerprint(model: Any) -> str:
    """A hash of a few numbers of every tensor of a model: it differs for other weights."""
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        numbers = tensor.detach().flatten()
        some = numbers[:: max(1, len(numbers) // 64)].to("cpu", torch.float64)
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]
