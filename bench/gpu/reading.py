"""Floors that are measured: reading the logits once and doing nothing with them, and copying."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import Gpu

_BLOCK = 8192  # words
_PROGRAMS = 4096


@triton.jit
def _read_kernel(words, out, count, blocks, BLOCK: tl.constexpr):
    """The sum of int32 words, modulo 2^32: full blocks unmasked, so that loads are wide."""
    total = tl.zeros([BLOCK], tl.int32)
    block = tl.program_id(0)
    while block < blocks:
        start = block.to(tl.int64) * BLOCK
        offsets = start + tl.arange(0, BLOCK)
        if start + BLOCK <= count:
            total += tl.load(words + offsets)
        else:
            total += tl.load(words + offsets, mask=offsets < count, other=0)
        block += tl.num_programs(0)
    tl.store(out + tl.program_id(0), tl.sum(total.to(tl.int64), 0))


def read(logits: list[Tensor]) -> Callable[[], Tensor]:
    """A call that reads all the logits once, and adds up their words: int64 [len(logits),
    programs], each modulo 2^32."""
    words = [x.view(torch.int32).reshape(-1) for x in logits]
    blocks = [triton.cdiv(len(w), _BLOCK) for w in words]
    programs = min(_PROGRAMS, max(blocks))
    out = torch.zeros(len(logits), programs, dtype=torch.int64, device=logits[0].device)

    def call() -> Tensor:
        for i, w in enumerate(words):
            _read_kernel[(programs,)](w, out[i], len(w), blocks[i], BLOCK=_BLOCK, num_warps=8)
        return out

    return call


def reads_every_word(device: Gpu) -> bool:
    """Whether the kernel's sum is the words' sum."""
    size = device.pick(1_000_002, 9002)
    x = torch.arange(size, device=device.device).to(torch.int16).view(torch.bfloat16)
    got, words = read([x])(), x.view(torch.int32)
    return (int(got.sum()) - int(words.sum(dtype=torch.int64))) % (1 << 32) == 0


def copy_bandwidth(device: Gpu) -> float:
    """Bytes a second, read and written, of a copy far larger than any cache."""
    size = device.pick(1 << 30, 1 << 20)
    source = torch.zeros(size, dtype=torch.int8, device=device.device)
    target = torch.empty_like(source)
    took = device.microseconds(lambda: target.copy_(source), cold=False, budget=0.3)
    return 2 * size / took.median_us * 1e6
