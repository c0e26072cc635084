"""The benchmark table: times of one call beside its peers and its floors."""

from __future__ import annotations

import functools
import importlib.util
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mod_fused

from .. import check
from ..cases.cpu import CPU
from ..measure import Call
from ..problem import DIVERGENCES, WEIGHTS, Problem, logits
from . import execution, prepare, reading
from .device import Gpu
from .record import FAILED, PASSED, SKIPPED, TIMED_OUT, Record

VOCAB = 128256
FILTERS: dict[str, dict[str, Any]] = {
    "": {},
    "top_k=50": {"top_k": 50},
    "top_p=0.9": {"top_p": 0.9},
    "min_p=0.05": {"min_p": 0.05},
}
#: Rows that differ from each other; larger batches repeat them, at addresses of their own.
_DISTINCT = 16
#: From this batch on the L2 cache is filled with something else before each call.
COLD_FROM = 64
#: Instructions a token in sm_90 machine code at M = 2: reverse KL; an f-divergence, both its sweeps
#: in the shorter of the forms it has.
_INSTRUCTIONS = {True: 18, False: 33 + 57}
_LANES = 128  # of a multiprocessor, per clock


class Row(NamedTuple):
    """One line of the table."""

    divergence: str
    batch: int
    vocab: int = VOCAB
    policies: int = 2
    filters: str = ""

    def problem(self) -> Problem:
        """The same for the runner's checks and contestants."""
        weights = WEIGHTS if self.policies == 2 else (0.9 / self.policies,) * self.policies
        return Problem(self.divergence, "bfloat16", self.batch, self.vocab, 1, weights)

    def label(self) -> str:
        """As shown in the report."""
        shape = f"{self.divergence} B={self.batch} V={self.vocab} M={self.policies}"
        return f"{shape} {self.filters}".rstrip()


def rows(device: Gpu) -> list[Row]:
    """The table, the most wanted first; rows that share a graph of the compiled peer together."""
    if device.dry:
        return [Row("reverse_kl", 1, 1024), Row("jsd", 2, 1024), Row("jsd", 1, 1024, 1, "top_k=50")]
    main = [Row(d, 1) for d in DIVERGENCES]
    main += [Row(d, b) for d in DIVERGENCES for b in (64, 256, 8)]
    two = ("reverse_kl", "jsd")
    filters = [Row(d, b, filters=f) for b in (1, 64) for d in two for f in FILTERS if f]
    vocabularies = [Row(d, b, v) for v in (32000, 262144) for d in two for b in (1, 64)]
    policies = [Row(d, b, policies=m) for m in (1, 4, 8) for d in two for b in (1, 64)]
    return main + filters + vocabularies + policies


def compiled_rows(all_rows: list[Row]) -> list[Row]:
    """One row for each graph of the compiled peer, which has one for B = 1 and one for more."""
    kept = {(r.divergence, r.batch == 1): r for r in all_rows if _has_compiled_peer(r)}
    return list(kept.values())


def _has_compiled_peer(row: Row) -> bool:
    return row.policies == 2 and not row.filters and row.vocab == VOCAB


def inputs(device: Gpu, row: Row) -> list[Tensor]:
    """Logits on the device, bfloat16 [B, V] each, reference first."""
    few = min(row.batch, _DISTINCT)
    parts = logits(row.problem()._replace(batch=few), _DISTINCT)
    repeats = -(-row.batch // few)
    return [x.to(device.device).repeat(repeats, 1)[: row.batch] for x in parts]


def ours(row: Row, tensors: list[Tensor], backend: str, **options: Any) -> Call:
    """A call of the op."""
    return functools.partial(
        mod_fused.sample,
        tensors[0],
        tensors[1:],
        list(row.problem().weights),
        divergence=row.divergence,
        seed=1,
        backend=backend,
        **FILTERS[row.filters],
        **options,
    )


def in_own_memory(device: Gpu, row: Row, tensors: list[Tensor], backend: str) -> Call:
    """The call that is timed: into outputs and a workspace that are there, so that one kernel (two
    with filters) is all that it launches."""
    own = execution.own_memory(device, row.batch, row.vocab, row.policies)
    return ours(row, tensors, backend, **own)


def compile_row(device: Gpu, row: Row, name: str) -> None:
    """What timing this row compiles: the kernels of the op ("ours"), or the compiled peer."""
    tensors = inputs(device, row)
    if name == "compile":
        CPU.contestants["compile"].build(row.problem(), tensors)()
    else:
        ours(row, tensors, "triton")()
        if not row.filters:  # for the check
            weights = list(row.problem().weights)
            mod_fused.log_probs(tensors[0], tensors[1:], weights, divergence=row.divergence)
    device.synchronize()


def _flashinfer(row: Row, tensors: list[Tensor]) -> Call:
    """FlashInfer's sampler of one tensor of float32 logits: another task, for its cost a byte."""
    import flashinfer  # type: ignore[import-not-found]

    one = tensors[0].float()
    return functools.partial(flashinfer.sampling.sampling_from_logits, one)


def refusal(device: Gpu, row: Row, tensors: list[Tensor], backend: str) -> tuple[float | None, str]:
    """Total variation from the oracle, and why the row may not be timed, if so."""
    problem = row.problem()
    expected = check.oracle(problem, _DISTINCT)
    found = check.check(problem, tensors, expected, backend)
    if not found.passed:
        return found.tv, found.reason
    new, own = ours(row, tensors, backend)(), in_own_memory(device, row, tensors, backend)()
    if not all(map(torch.equal, new[:3], own[:3])):
        return found.tv, "another result into outputs and a workspace that are there"
    if not row.filters:
        return found.tv, ""
    few = [x[:_DISTINCT] for x in tensors]
    theirs = ours(row, [x.cpu() for x in few], "torch" if device.dry else "cpu")
    if mod_fused.backends()["cpu"] != "available":
        theirs = ours(row, few, "torch")
    got = ours(row, tensors, backend)().tokens[:_DISTINCT]
    differ = int((got.cpu() != theirs().tokens.cpu()).sum())
    return found.tv, f"{differ} tokens are not those of another backend" if differ else ""


def floors(device: Gpu, row: Row, bandwidth: float) -> dict[str, float | None]:
    """Microseconds that reading takes at the copy's bandwidth, and issuing the instructions."""
    out: dict[str, float | None] = {"bytes": row.problem().bytes / bandwidth * 1e6, "issue": None}
    clock = prepare.smi("clocks.max.sm")
    if not device.dry and clock.isdigit() and row.policies == 2:
        count = _INSTRUCTIONS[row.divergence == "reverse_kl"] * row.batch * row.vocab
        processors = torch.cuda.get_device_properties(device.device).multi_processor_count
        out["issue"] = count / (processors * _LANES * int(clock))  # MHz: microseconds
    return out


def _contestants(
    device: Gpu, row: Row, tensors: list[Tensor], backend: str
) -> dict[str, Callable[[], Call]]:
    problem = row.problem()
    out: dict[str, Callable[[], Call]] = {
        "read": lambda: reading.read(tensors),
        "allocating": lambda: ours(row, tensors, backend),
    }
    if not row.filters:
        out["eager"] = lambda: CPU.contestants["eager"].build(problem, tensors)
        if _has_compiled_peer(row) or (device.dry and row.batch == 1):
            out["compile"] = lambda: CPU.contestants["compile"].build(problem, tensors)
    if importlib.util.find_spec("flashinfer") is not None:
        out["flashinfer"] = lambda: _flashinfer(row, tensors)
    return out


def time_row(device: Gpu, row: Row, index: int, bandwidth: float) -> dict[str, Any]:
    """Check, then time one row."""
    tensors = inputs(device, row)
    backend = device.backend(index)
    tv, refused = refusal(device, row, tensors, backend)
    out: dict[str, Any] = {
        **row._asdict(),
        "label": row.label(),
        "bytes": row.problem().bytes,
        "cold": row.batch >= COLD_FROM,
        "tv": tv,
        "refused": refused,
        "times": {},
        "skipped": {},
    }
    if refused:
        return out
    time = functools.partial(device.microseconds, cold=out["cold"])
    call = in_own_memory(device, row, tensors, backend)
    call()
    out["times"]["kernel"] = time(call)._asdict()
    try:
        out["times"]["graph"] = time(device.graph(call)[1])._asdict()
    except Exception as error:
        out["skipped"]["graph"] = repr(error)[:300]
    for name, build in _contestants(device, row, tensors, backend).items():
        try:
            peer = build()
            peer()  # compiles
            out["times"][name] = time(peer, budget=0.1)._asdict()
        except Exception as error:  # a peer that does not run here is no reason to stop
            out["skipped"][name] = f"{type(error).__name__}: {str(error)[:300]}"
    mine = out["times"]["kernel"]["median_us"]
    out["floors_us"] = floors(device, row, bandwidth)
    out["of_floor"] = max(x for x in out["floors_us"].values() if x is not None) / mine
    out["gb_per_s"] = out["bytes"] / mine / 1e3
    out["ratios"] = {n: t["median_us"] / mine for n, t in out["times"].items() if n != "kernel"}
    return out


def benchmark(device: Gpu, record: Record) -> None:
    """The table; a row whose results are wrong is refused."""
    record.put(rows=[], header=prepare.gpu_header(device))
    record.expect("the read kernel reads every word", reading.reads_every_word(device))
    bandwidth = reading.copy_bandwidth(device)
    record.put(copy_bytes_per_second=bandwidth)
    if importlib.util.find_spec("flashinfer") is None:
        record.item("FlashInfer", SKIPPED, "not installed")
    table: list[dict[str, Any]] = []
    for index, row in enumerate(rows(device)):
        if record.left() < 3.0:
            record.item(f"{row.label()} and the rows after it", TIMED_OUT, "not timed")
            break
        try:
            table.append(time_row(device, row, index, bandwidth))
        except Exception:
            record.item(row.label(), FAILED, traceback.format_exc())
            continue
        record.put(rows=table)
        refused = table[-1]["refused"]
        record.item(row.label(), FAILED if refused else PASSED, refused or _shown(table[-1]))
    from . import picture

    record.item("roofline.png", *picture.draw(record.out / "roofline.png", table, bandwidth))


def _shown(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {t['median_us']:.1f} µs" for name, t in row["times"].items())
