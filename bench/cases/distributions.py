"""The case `distributions`: how the time depends on the values of the logits, at the same shape.

It times sketches of several kinds (logits.py), and logits recorded from the embedded models beside
a sketch of the same size. The time shows how many evaluations (docs/concepts.md) a row needs.
"""

from __future__ import annotations

from ..case import Case, Grid
from ..logits import RECORDED, SETTINGS

EMBEDDED_VOCABULARY = 904

_SKETCHES = Grid(dtypes=("bfloat16",), shapes=((8, 32000),), threads=(1,), settings=tuple(SETTINGS))
_EMBEDDED = _SKETCHES._replace(shapes=((64, EMBEDDED_VOCABULARY),), settings=("model", RECORDED))


DISTRIBUTIONS = Case(
    help="synthetic logits of several kinds, and logits recorded from the embedded models",
    backends=("cpu", "torch"),
    contestants={},
    grids=(_SKETCHES, _EMBEDDED),
    quick=(
        _SKETCHES._replace(shapes=((2, 2048),)),
        _EMBEDDED._replace(shapes=((4, EMBEDDED_VOCABULARY),)),
    ),
)
