"""The case `distributions`: how the time depends on what the logits are, not on how many.

Sketches of several kinds (logits.py) at one shape, and logits recorded from the embedded models
beside a sketch of the same size. How many evaluations of the normaliser a row took the cpu backend
does not tell; its time does.
"""

from __future__ import annotations

from typing import Any

from .. import report
from ..case import Case, Grid
from ..logits import RECORDED, SETTINGS

EMBEDDED_VOCABULARY = 904

_SKETCHES = Grid(dtypes=("bfloat16",), shapes=((8, 32000),), threads=(1,), settings=tuple(SETTINGS))
_EMBEDDED = _SKETCHES._replace(shapes=((64, EMBEDDED_VOCABULARY),), settings=("model", RECORDED))


def table(result: dict[str, Any]) -> str:
    """Our time: logits down, divergences across."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in result["rows"]:
        cells = report.cells(row)
        line = lines.setdefault((row["setting"], cells["batch"], cells["vocab"]), {})
        line[row["divergence"]] = cells.get(f"{result['contestants'][0]} µs", "refused")
    divergences = result["divergences"]
    body = [[*key, *(line.get(d, "") for d in divergences)] for key, line in lines.items()]
    return report.markdown_table(["logits", "B", "V", *(f"{d} µs" for d in divergences)], body)


DISTRIBUTIONS = Case(
    help="synthetic logits of several kinds, and logits recorded from the embedded models",
    backends=("cpu", "torch"),
    contestants={},
    grids=(_SKETCHES, _EMBEDDED),
    quick=(
        _SKETCHES._replace(shapes=((2, 2048),)),
        _EMBEDDED._replace(shapes=((4, EMBEDDED_VOCABULARY),)),
    ),
    table=table,
)
