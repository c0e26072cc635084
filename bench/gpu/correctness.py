"""Stages that compare with the float64 oracle and with the CPU backend."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import mod_fused
from mod_fused import reference, reference_sampling

from ..problem import DIVERGENCES
from . import device as devices
from .device import Gpu
from .record import FAILED, PASSED, SKIPPED, TIMED_OUT, Record

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import cases  # noqa: E402 the tests' inputs and measures

WEIGHTS = [0.5, 0.25]
FALSE_ALARMS = 1e-6  # of a chi-squared test
MAX_DIFFERING = 1e-4  # share of draws that may differ between two backends
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def workers() -> int:
    """Processes to compile in."""
    return max(1, min(14, (os.cpu_count() or 2) - 2))


class Case(NamedTuple):
    """One cell of the matrix."""

    divergence: str
    dtype: str
    feature: str
    backend: str
    batch: int
    vocab: int
    dry: bool

    def label(self) -> str:
        """As shown in the report."""
        return f"{self.backend} {self.divergence} {self.dtype} {self.feature}"


Arguments = tuple[dict[str, Any], dict[str, Any]]  # of the distribution, of the draw


def _packed(mask: Tensor) -> Tensor:
    """bool [B, V] as int32 [B, ceil(V/32)]."""
    batch, vocab = mask.shape
    bits = torch.nn.functional.pad(mask, (0, -vocab % 32)).view(batch, -1, 32).long()
    words = (bits << torch.arange(32)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _tensor_parameters(b: int, v: int) -> Arguments:
    weights = torch.tensor(WEIGHTS).expand(b, 2) * torch.linspace(0.5, 1.0, b)[:, None]
    return {"weights": weights}, {
        "temperature": torch.linspace(0.7, 1.3, b),
        "top_k": torch.arange(b) * 20 + 5,
        "top_p": torch.linspace(0.5, 1.0, b),
        "min_p": torch.linspace(0.0, 0.05, b),
    }


def _candidates(b: int, v: int) -> Arguments:
    ids = torch.arange(20).expand(b, 20) * (v // 21) + torch.arange(b)[:, None]
    ids[:, 15:] = -1
    return {"values": cases.normal(5, 1, b, 20), "value_ids": ids}, {}


#: What is asked of the op besides the mixture of two policies; [B, V] to arguments.
FEATURES: dict[str, Callable[[int, int], Arguments]] = {
    "plain": lambda b, v: ({}, {}),
    "greedy": lambda b, v: ({}, {"temperature": 0.0}),
    "temperature": lambda b, v: ({}, {"temperature": 0.7}),
    "mask": lambda b, v: ({}, {"mask": cases.normal(3, b, v) > 0.0}),
    "packed mask": lambda b, v: ({}, {"mask": _packed(cases.normal(3, b, v) > 0.0)}),
    "top_k": lambda b, v: ({}, {"top_k": 50}),
    "top_p": lambda b, v: ({}, {"top_p": 0.9}),
    "min_p": lambda b, v: ({}, {"min_p": 0.05}),
    "per-row tensors": _tensor_parameters,
    "values": lambda b, v: ({"values": cases.normal(4, 2, b, v), "value_weights": [1.0, 0.5]}, {}),
    "candidates": _candidates,
    "prefix": lambda b, v: ({"prefix_logprobs": 5.0 * cases.normal(6, b, 3)}, {}),
    "scales": lambda b, v: ({"logit_scales": [1.0, 0.75, 1.25]}, {}),
    "plausibility": lambda b, v: ({"plausibility": 1e-3, "plausibility_tensor": 1}, {}),
    "cut vocabulary": lambda b, v: ({"vocab_size": v - 3}, {}),
    "zero normalizer": lambda b, v: ({"normalizer": "zero"}, {}),
}


def _to(device: torch.device, arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: x.to(device) if isinstance(x, Tensor) else x for k, x in arguments.items()}


def check_case(case: Case) -> str:
    """Compare log_probs (total variation at most 2e-5) and tokens with the oracle; what is wrong,
    or nothing."""
    machine = devices.make(case.dry)
    b, v = case.batch, case.vocab
    ref, policies = cases.logits(21, b, v, 2, dtype=_DTYPES[case.dtype], excluded=0.05)
    mixing, drawing = FEATURES[case.feature](b, v)
    mixing = {"weights": WEIGHTS, "divergence": case.divergence, **mixing}
    if case.feature == "cut vocabulary":  # rows that are not one after the other, an odd width
        ref = torch.nn.functional.pad(ref, (0, 5))[:, :v]
    seeds, positions = torch.arange(b) * 31 - 5, torch.arange(b) * 3
    arguments = (ref.to(machine.device), [x.to(machine.device) for x in policies])
    on_device = _to(machine.device, mixing)
    try:
        got = mod_fused.log_probs(*arguments, **on_device, backend=case.backend).cpu()
        expected = reference.log_probs(ref, policies, **mixing)
        cases.assert_matches_oracle(got, expected)
        drawn = mod_fused.sample(
            *arguments,
            **on_device,
            **_to(machine.device, drawing),
            seed=seeds.to(machine.device),
            position=positions.to(machine.device),
            return_model_logprobs=True,
            backend=case.backend,
        )
        tokens, valid = drawn.tokens.cpu(), drawn.valid.cpu()
        if not torch.equal(valid, torch.from_numpy(~np.isnan(expected).any(axis=1))):
            return f"valid is {valid.tolist()}"
        cases.assert_tokens_are_the_oracle_s(tokens, expected, seeds, positions, **drawing)
        at = expected[np.arange(b), tokens.numpy()]
        off = np.abs(drawn.logprobs.cpu().numpy() - at)[valid.numpy()].max(initial=0.0)
        if not off <= 1e-4:
            return f"the log-probability of a token is off by {off:.1e}"
    except Exception:
        return traceback.format_exc()
    return ""


#: Asked of every divergence; the other features of one for each way to normalise (log-linear, by
#: the secular equation, by Newton's method). Every combination takes a compilation.
_OF_ALL = ("plain", "per-row tensors", "values", "prefix", "zero normalizer")
_OF_EVERY_FEATURE = ("reverse_kl", "jsd", "jeffrey")


def matrix_cases(device: Gpu) -> list[Case]:
    """Divergences with features, in one dtype each; plain calls in every dtype, of the torch
    backend on the device, too."""
    b, v = device.pick((6, 2100), (2, 1030))
    dtypes = list(_DTYPES)
    names = device.pick(cases.DIVERGENCES, ("jsd", "reverse_kl"))
    pairs = [(d, f) for d in names for f in FEATURES if d in _OF_EVERY_FEATURE or f in _OF_ALL]
    out = [
        Case(d, dtypes[names.index(d) % 3], f, device.backend(i), b, v, device.dry)
        for i, (d, f) in enumerate(pairs)
    ]
    if not device.dry:
        out += [Case(d, t, "plain", "triton", b, v, False) for d in names for t in dtypes]
        out += [Case(d, t, "plain", "torch", b, v, False) for d in names for t in dtypes]
    return list(dict.fromkeys(out))


def _each(
    device: Gpu, record: Record, function: Callable[[Any], Any], items: list[Any]
) -> list[Any]:
    """Results of the items that worked; the others are noted."""
    results = []
    for item, result, error in device.map(function, items, workers(), record.left()):
        if error:
            late = error == "out of time"
            record.item(item.label(), TIMED_OUT if late else FAILED, error)
        else:
            results.append((item, result))
    return results


def matrix(device: Gpu, record: Record) -> None:
    """The built-in comparison with the oracle."""
    found = _each(device, record, check_case, matrix_cases(device))
    wrong = [(case, why) for case, why in found if why]
    for case, why in wrong:
        record.item(case.label(), FAILED, why)
    if found:
        record.put(cases=len(found))
        status = PASSED if len(wrong) < len(found) else FAILED
        good = len(found) - len(wrong)
        record.item("log_probs and tokens are the oracle's", status, f"{good} of {len(found)}")


# --- equal tokens ---------------------------------------------------------------------------------

FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "min_p, temperature": {"min_p": 0.05, "temperature": 1.3},
    "all": {"top_k": 200, "top_p": 0.95, "min_p": 0.01, "temperature": 0.8},
}


class Draws(NamedTuple):
    """Draws to be compared with the CPU's."""

    divergence: str
    filters: str
    backend: str
    rows: int
    vocab: int
    dry: bool

    def label(self) -> str:
        """As shown in the report."""
        return f"{self.divergence}, filters: {self.filters}"


def differing(draws: Draws) -> tuple[int, int, float]:
    """Tokens that differ from the CPU backend's, draws, largest difference of a log-probability."""
    machine = devices.make(draws.dry)
    other = "cpu" if mod_fused.backends()["cpu"] == "available" else "torch"
    if draws.dry:
        other = "torch"
    ref, policies = cases.logits(
        22, draws.rows, draws.vocab, 2, kind="typical", dtype=torch.bfloat16
    )
    seeds = torch.arange(draws.rows) * 7919
    sample = functools.partial(
        mod_fused.sample, divergence=draws.divergence, **FILTERS[draws.filters]
    )
    mine = sample(
        ref.to(machine.device),
        [x.to(machine.device) for x in policies],
        WEIGHTS,
        seed=seeds.to(machine.device),
        backend=draws.backend,
    )
    theirs = sample(ref, policies, WEIGHTS, seed=seeds, backend=other)
    same = mine.tokens.cpu() == theirs.tokens
    off = (mine.logprobs.cpu() - theirs.logprobs).abs()[same]
    return int((~same).sum()), draws.rows, float(off.max()) if len(off) else 0.0


def tokens(device: Gpu, record: Record) -> None:
    """The CPU's tokens, all divergences and filters, 20000 draws and more."""
    rows, vocab = device.pick((640, 5000), (2, 1030))
    names = device.pick(cases.DIVERGENCES, DIVERGENCES[:2])
    pairs = [(d, f) for d in names for f in FILTERS]
    items = [
        Draws(d, f, device.backend(i), rows, vocab, device.dry) for i, (d, f) in enumerate(pairs)
    ]
    found = _each(device, record, differing, items)
    if not found:
        return
    differ, drawn = (sum(result[i] for _, result in found) for i in (0, 1))
    off = max(result[2] for _, result in found)
    per_case = {item.label(): list(result) for item, result in found}
    record.put(draws=drawn, differing=differ, of_cases=per_case)
    detail = f"{differ} of {drawn} draws differ, at most {MAX_DIFFERING:g} may"
    record.expect("tokens", differ <= MAX_DIFFERING * drawn, detail)
    enough = device.dry or drawn >= 20000
    record.expect("draws", enough, f"{drawn} of at least 20000")
    record.expect("log-probabilities", off <= 2e-4, f"off by {off:.1e} at most, 2e-4 allowed")


# --- statistics -----------------------------------------------------------------------------------


def chi_squared(counts: np.ndarray, p: np.ndarray) -> tuple[float, int, float]:
    """Statistic, degrees of freedom and p-value of counts [V] against probabilities [V]; bins
    expected less than five times are merged."""
    expected = p * counts.sum()
    rare = expected < 5.0
    if rare.all():
        return 0.0, 0, 1.0
    observed = np.append(counts[~rare], counts[rare].sum()).astype(np.float64)
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 5.0:  # the merged ones join the smallest bin
        smallest = int(np.argmin(expected[:-1]))
        observed[smallest] += observed[-1]
        expected[smallest] += expected[-1]
        observed, expected = observed[:-1], expected[:-1]
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    value = float(torch.special.gammaincc(half[0], half[1])) if freedom else 1.0
    return statistic, freedom, value


def _many_draws(
    device: Gpu, logits: list[Tensor], divergence: str, start: int, rows: int, backend: str
) -> Tensor:
    """Draws of one row [1, V] at positions start, start + 1, ...; [rows]."""
    ref, *policies = (x.to(device.device).expand(rows, -1) for x in logits)
    drawn = mod_fused.sample(
        ref,
        policies,
        WEIGHTS,
        divergence=divergence,
        seed=torch.full((rows,), 77, device=device.device),
        position=torch.arange(start, start + rows, device=device.device),
        backend=backend,
    )
    return drawn.tokens


def _one_row(device: Gpu) -> list[Tensor]:
    vocab = device.pick(2500, 1030)
    ref, policies = cases.logits(23, 1, vocab, 2, kind="typical", dtype=torch.bfloat16)
    return [ref, *policies]


_CHUNK = 1 << 18


def warm(device: Gpu, divergence: str) -> None:
    """Compile what the statistics need."""
    _many_draws(device, _one_row(device), divergence, 0, _CHUNK, "triton")
    device.synchronize()


def statistics(device: Gpu, record: Record) -> None:
    """Draws against the oracle's distribution, token by token and, where a small bias of many
    tokens shows, tile by tile. False-alarm rate 1e-6 each."""
    row = _one_row(device)
    for i, divergence in enumerate(DIVERGENCES):
        if record.left() < 5.0:
            record.item(divergence, TIMED_OUT, "not begun")
            continue
        total, chunk = device.pick((1 << 22, _CHUNK), (2, 1) if i == 0 else (400, 200))
        p = np.exp(reference.log_probs(row[0], row[1:], WEIGHTS, divergence=divergence)[0])
        counts = torch.zeros(len(p), dtype=torch.int64, device=device.device)
        for start in range(0, total, chunk):
            drawn = _many_draws(device, row, divergence, start, chunk, device.backend(i))
            counts += torch.bincount(drawn, minlength=len(p))
        seen = counts.cpu().numpy()
        tiles = np.arange(0, len(p), reference_sampling.TILE)
        for bins, observed, expected in (
            ("tokens", seen, p),
            ("tiles", np.add.reduceat(seen, tiles), np.add.reduceat(p, tiles)),
        ):
            statistic, freedom, value = chi_squared(observed, expected)
            name = f"{divergence}, {bins}"
            detail = (
                f"{total} draws, chi-squared {statistic:.1f} at {freedom} degrees of freedom, "
                f"p-value {value:.2g}; false-alarm rate {FALSE_ALARMS:g}"
            )
            if freedom == 0:
                record.item(name, SKIPPED, detail)
            else:
                record.expect(name, value > FALSE_ALARMS, detail)
