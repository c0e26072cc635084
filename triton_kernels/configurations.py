"""Launch configurations: one table, read for every call; nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..arguments import MixtureArguments


@dataclass(frozen=True)
class Configuration:
    """How a call is cut into programs."""

    threads: int  # 8 tokens of a tile each: 16 bytes of 16-bit logits
    chunk: int  # tiles of a task
    group: int  # rows that share the L2 cache between two phases
    programs: int  # of the persistent kernel
    filter_threads: int
    filter_block: int  # tokens that the filters look at together


#: Bytes of logits whose phases are interleaved: half of an H100's L2 cache.
GROUP_BYTES = 25_000_000
#: Programs a multiprocessor holds.
PROGRAMS_PER_PROCESSOR = 4


def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 2  # the interpreter's, one after the other


def configuration(mixing: MixtureArguments, rows: int) -> Configuration:
    """The configuration of a call: tasks of one tile for few rows, so that they fill the device, of
    four for many."""
    row_bytes = sum(x.element_size() for x in mixing.tensors()) * mixing.vocab_size
    return Configuration(
        threads=128,
        chunk=1 if rows < 8 else 4,
        group=max(1, min(rows, GROUP_BYTES // row_bytes)),
        programs=PROGRAMS_PER_PROCESSOR * _processors(mixing.batch_tensor().device),
        filter_threads=512,
        filter_block=4096,
    )
