"""Launch configurations: one table, read for every call; nothing is tuned at run time.

The environment variable MOD_FUSED_TRITON_TABLE names another table, as JSON:
{"configurations": {"general, few rows": {"threads": 256, "chunk": 2}}}. A configuration changes
speed, never a result. `mod-fused tune` writes such a file for the GPU at hand.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import torch

from ..call.arguments import MixtureArguments
from ..divergence import Divergence, get_divergence
from .divergences import device_functions
from .workspace import SLICES

TABLE_VARIABLE = "MOD_FUSED_TRITON_TABLE"
#: From this number of rows on, tasks are coarse: the rows fill the device.
MANY_ROWS = 16
#: The most bytes of logits of rows in progress: they fit an H100's L2 cache of 50 MB.
BYTES_IN_FLIGHT = 40_000_000


@dataclass(frozen=True)
class Configuration:
    """How a call is cut into programs. A *task* is a phase of some tiles of a row (mixture.py)."""

    threads: int = 128  # then each reads 8 tokens of a tile: 16 bytes of 16-bit logits
    chunk: int = 1  # tiles of a task
    programs_per_processor: int = 4  # of the persistent kernel
    filter_threads: int = 512
    filter_block: int = 1024  # tokens of a flat row that a program of a filter reads at once
    filter_slices: int = 32  # programs of a row, where there are few rows

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{field.name} must be a positive integer, got {value!r}")
        for name in ("threads", "filter_threads", "filter_block"):
            if getattr(self, name) & (getattr(self, name) - 1):
                raise ValueError(f"{name} must be a power of two, got {getattr(self, name)}")
        if not 1024 <= self.filter_block <= 4096:
            raise ValueError(f"filter_block must be from 1024 to 4096, got {self.filter_block}")
        if self.filter_slices > SLICES.value:
            raise ValueError(
                f"filter_slices must be at most {SLICES.value}, got {self.filter_slices}"
            )


Table = Mapping[str, Configuration]

#: By `regime`. Chosen by predicted times (bench/gpu/predict.py), not measured yet: with few rows,
#: tasks of one tile fill the device.
TABLE: Table = {
    "log_linear, few rows": Configuration(threads=256),
    "log_linear, many rows": Configuration(chunk=4),
    "general, few rows": Configuration(),
    "general, many rows": Configuration(chunk=4),
}


def regime(divergence: str | Divergence, rows: int) -> str:
    """The name of the table's entry that a call uses: the kind of divergence, few or many rows."""
    known = get_divergence(divergence) if isinstance(divergence, str) else divergence
    log_linear = device_functions(known).log_linear
    kind = "log_linear" if log_linear else "general"
    return f"{kind}, {'many' if rows >= MANY_ROWS else 'few'} rows"


def read_table(path: str | Path) -> Table:
    """A table from a JSON file; entries that it lacks are taken from `TABLE`.

    Raises:
        ValueError: if the file is not such a table.
        OSError: if it cannot be read.
    """
    try:
        entries = json.loads(Path(path).read_text())["configurations"]
        table = {name: Configuration(**entry) for name, entry in entries.items()}
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a table of configurations: {error!r}") from error
    if unknown := sorted(set(table) - set(TABLE)):
        raise ValueError(f"{path} names {unknown[0]!r}, which is none of {', '.join(TABLE)}")
    return {**TABLE, **table}


@cache
def _table() -> Table:
    path = os.environ.get(TABLE_VARIABLE)
    return read_table(path) if path else TABLE


_tables: list[Table] = []


@contextmanager
def using(table: Table) -> Iterator[None]:
    """Make every call of this process use `table` in the block: for measuring, in one thread."""
    _tables.append(table)
    try:
        yield
    finally:
        _tables.pop()


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 for the interpreter, whose programs run one after the other."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 2


def device_name() -> str:
    """The device that a table is made for, or used on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def in_force() -> str:
    """One line that says which table calls use, and whether it was made for this device."""
    path = os.environ.get(TABLE_VARIABLE)
    if not path:
        return "the package's own"
    try:
        read_table(path)
        made_for = json.loads(Path(path).read_text()).get("device")
    except (OSError, ValueError) as error:
        return f"{TABLE_VARIABLE} names a file that cannot be used: {error}"
    if made_for is None:
        return f"{path}, which does not say for what device"
    if made_for != device_name():
        return f"{path}, made for ANOTHER DEVICE: {made_for}, this one is {device_name()}"
    return f"{path}, made for this device"


def configuration(mixing: MixtureArguments, rows: int) -> Configuration:
    """The configuration of a call."""
    table = _tables[-1] if _tables else _table()
    return table[regime(mixing.divergence, rows)]


def rows_together(
    mixing: MixtureArguments, rows: int, phases: int, row_tasks: int, programs: int
) -> int:
    """How many rows form a group (mixture.py). As many groups as there are phases are in progress;
    their logits should fit `BYTES_IN_FLIGHT`, so that later phases read the L2 cache. But a group
    must have work for all `programs`, even if half of it are evaluations that are skipped."""
    row_bytes = sum(x.element_size() for x in mixing.tensors()) * mixing.vocab_size
    cached = BYTES_IN_FLIGHT // (phases * row_bytes)
    return min(rows, max(1, cached, -(-2 * programs // (phases * row_tasks))))
