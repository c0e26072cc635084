"""All cases by name: `python -m bench.run NAME`."""

from __future__ import annotations

from ..case import Case, Procedure
from .adapters import ADAPTERS
from .cpu import CPU
from .decoder import DECODER
from .distributions import DISTRIBUTIONS
from .filters import FILTERS
from .host import HOST
from .scaling import SCALING
from .shards import SHARDS
from .triton_host import TRITON_HOST

CASES: dict[str, Case | Procedure] = {
    "cpu": CPU,
    "scaling": SCALING,
    "filters": FILTERS,
    "distributions": DISTRIBUTIONS,
    "decoder": DECODER,
    "host": HOST,
    "triton_host": TRITON_HOST,
    "adapters": ADAPTERS,
    "shards": SHARDS,
}
