"""Pictures of results, one for some of the cases: bench/results/CASE.svg from CASE.json.

A picture carries the digest of its JSON: two versions of matplotlib do not draw the same bytes, so
that digest, not the bytes, tells whether it is up to date.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import decoder, scaling

#: By case: draws the results into a figure.
PICTURES: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "decoder": decoder.draw,
    "scaling": scaling.draw,
}


def digest(results: Path) -> str:
    """What a picture of this JSON must carry."""
    return "sha256 " + hashlib.sha256(results.read_bytes()).hexdigest()


def stale(folder: Path) -> list[Path]:
    """Pictures that are missing or were drawn from other results than those that lie there."""
    wanted = [folder / f"{case}.json" for case in PICTURES]
    return [
        picture
        for source in wanted
        if source.exists()
        and (
            not (picture := source.with_suffix(".svg")).exists()
            or digest(source) not in picture.read_text()
        )
    ]


def draw(picture: Path) -> None:
    """Draw a picture from the JSON beside it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    source = picture.with_suffix(".json")
    figure = Figure(layout="constrained")
    PICTURES[source.stem](figure, json.loads(source.read_text()))
    with rc_context({"svg.hashsalt": source.stem, "svg.fonttype": "none"}):
        figure.savefig(picture, metadata={"Date": None, "Description": digest(source)})
