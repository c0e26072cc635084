"""The case `distributions`: how the time depends on what the logits are, not on how many.

Sketches of several kinds (logits.py) at one shape, and logits recorded from the embedded models
beside a sketch of the same size. How many evaluations of the normaliser a row took the cpu backend
does not tell; its time does.
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
