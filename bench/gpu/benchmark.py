"""`python -m bench.gpu.benchmark --out DIR`: times of one call beside peers and floors (lower
bounds).

`DIR/gpu.json` and `DIR/gpu.md` are rewritten after every row. The exit status is 0 when every row
was right and timed. With TRITON_INTERPRET=1 it is a dry run on tiny shapes.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mod_fused.divergence import DIVERGENCES

from .. import check, report
from ..case import ours
from ..cases.cpu import CPU
from ..measure import Call
from ..problem import POLICIES, Problem, logits, weights_of
from . import device as devices
from .device import Gpu

SCHEMA = 3
OURS = ours("triton")
VOCAB = 128256
#: How many rows differ; larger batches repeat them, at other addresses.
_DISTINCT = 16
#: From this batch size on the L2 cache is overwritten before each call.
COLD_FROM = 64
#: Instructions per token in sm_90 machine code at M = 2, by whether the divergence is reverse KL.
#: The others' number is that of two sweeps over the logits, the least that they need.
_INSTRUCTIONS = {True: 18, False: 33 + 57}
_LANES = 128  # of a multiprocessor, per clock


def _row(divergence: str, batch: int, **changes: Any) -> Problem:
    return Problem(divergence, "bfloat16", batch, VOCAB, 1)._replace(**changes)


def rows(device: Gpu) -> list[Problem]:
    """The rows of the table, the most important first; rows with one compiled graph together."""
    if device.dry:
        filtered = _row("reverse_kl", 1, vocab=1024, weights=weights_of(1), filters="top_k=50")
        return [_row("jsd", 1, vocab=1024), filtered]
    main = [_row(d, 1) for d in DIVERGENCES]
    main += [_row(d, b) for d in DIVERGENCES for b in (64, 256, 8)]
    cells = [(d, b) for d in ("reverse_kl", "jsd") for b in (1, 64)]
    filters = [_row(*c, filters=f) for f in ("top_k=50", "top_p=0.9", "min_p=0.05") for c in cells]
    vocabularies = [_row(*c, vocab=v) for v in (32000, 262144) for c in cells]
    policies = [_row(*c, weights=weights_of(m)) for m in (1, 4, 8) for c in cells]
    return main + filters + vocabularies + policies


def _has_compiled_peer(device: Gpu, row: Problem) -> bool:
    plain = len(row.weights) == POLICIES and not row.filters
    return plain and (device.dry or row.vocab == VOCAB)


def inputs(device: Gpu, row: Problem) -> list[Tensor]:
    """Logits on the device, bfloat16 [B, V] each, reference first."""
    few = min(row.batch, _DISTINCT)
    parts = logits(row._replace(batch=few), _DISTINCT)
    repeats = -(-row.batch // few)
    return [x.to(device.device).repeat(repeats, 1)[: row.batch] for x in parts]


def in_own_memory(device: Gpu, row: Problem, tensors: list[Tensor]) -> Call:
    """The call that is timed. It gets outputs and a workspace, so that it launches one kernel only
    (two with filters)."""
    own = device.own_memory(row.batch, row.vocab, len(row.weights))
    return functools.partial(OURS.build(row, tensors), **own)


def refusal(device: Gpu, row: Problem, tensors: list[Tensor]) -> tuple[float | None, str]:
    """Total variation from the oracle, and why the row may not be timed ("" if it may)."""
    found = check.check(row, tensors, check.oracle(row, _DISTINCT), "triton")
    if not found.passed:
        return found.tv, found.reason
    new, own = OURS.build(row, tensors)(), in_own_memory(device, row, tensors)()
    if not all(map(torch.equal, new[:3], own[:3])):
        return found.tv, "another result into outputs and a workspace that are there"
    return found.tv, ""


def floors(device: Gpu, row: Problem, bandwidth: float) -> dict[str, float | None]:
    """Microseconds to read the logits at copy bandwidth, and to issue the instructions."""
    out: dict[str, float | None] = {"bytes": row.bytes / bandwidth * 1e6, "issue": None}
    clock = devices.smi("clocks.max.sm")
    if not device.dry and clock.isdigit() and len(row.weights) == POLICIES:
        count = _INSTRUCTIONS[row.divergence == "reverse_kl"] * row.batch * row.vocab
        processors = torch.cuda.get_device_properties(device.device).multi_processor_count
        out["issue"] = count / (processors * _LANES * int(clock))  # MHz: microseconds
    return out


def _flashinfer(tensors: list[Tensor]) -> Call:
    """FlashInfer's sampler of one tensor of float32 logits. It does less work: compare bytes/s."""
    import flashinfer  # type: ignore[import-not-found]

    return functools.partial(flashinfer.sampling.sampling_from_logits, tensors[0].float())


def _contestants(device: Gpu, row: Problem, tensors: list[Tensor]) -> dict[str, Callable[[], Call]]:
    out: dict[str, Callable[[], Call]] = {
        "graph": lambda: device.graph(in_own_memory(device, row, tensors))[1],
        "allocating": lambda: OURS.build(row, tensors),
    }
    if not row.filters:
        out["eager"] = lambda: CPU.contestants["eager"].build(row, tensors)
    if _has_compiled_peer(device, row):
        out["compile"] = lambda: CPU.contestants["compile"].build(row, tensors)
    if importlib.util.find_spec("flashinfer") is not None:
        out["flashinfer"] = lambda: _flashinfer(tensors)
    return out


def time_row(device: Gpu, row: Problem, bandwidth: float) -> dict[str, Any]:
    """Check, then time one row."""
    tensors = inputs(device, row)
    tv, refused = refusal(device, row, tensors)
    cold = row.batch >= COLD_FROM
    out: dict[str, Any] = {**row.shown(), "bytes": row.bytes, "l2": "cold" if cold else "warm"}
    out |= {"tv": {"kernel": tv}, "refused": refused, "timings": {}, "ratios": {}, "skipped": {}}
    if refused:
        return out
    times, call = out["timings"], in_own_memory(device, row, tensors)
    call()
    times["kernel"] = device.microseconds(call, cold=cold)
    for name, build in _contestants(device, row, tensors).items():
        try:
            peer = build()
            peer()  # compiles
            times[name] = device.microseconds(peer, cold=cold, budget=0.1)
        except Exception as error:  # go on if a peer does not run here
            why = (str(error).splitlines() or [""])[0]
            out["skipped"][name] = f"{type(error).__name__}: {why[:300]}"
    mine = times["kernel"].median_us
    out["ratios"] = {n: t.median_us / mine for n, t in times.items() if n != "kernel"}
    out["floors_us"] = floors(device, row, bandwidth)
    out["ratios"]["floor"] = mine / max(x for x in out["floors_us"].values() if x is not None)
    return out | {"gb_per_s": row.bytes / mine / 1e3}


def benchmark(device: Gpu, out: Path, seconds: float) -> bool:
    """Time the rows until the time is up; return whether all were timed and right."""
    end, bandwidth = time.monotonic() + seconds, device.copy_bandwidth()
    what = "device time of one call" if not device.dry else "dry run: its times mean nothing"
    left = {row.label(): "not timed" for row in rows(device)}
    result: dict[str, Any] = {
        "schema": SCHEMA, "case": "gpu", "what": what, "command": "python -m bench.gpu.benchmark",
        "machine": device.header(), "copy_bytes_per_second": bandwidth, "rows": [], "failed": {},
        "device": f"copy bandwidth {report.number(bandwidth / 1e9)} GB/s",
    }  # fmt: skip
    for row in rows(device):
        if time.monotonic() > end:
            break
        try:
            result["rows"].append(time_row(device, row, bandwidth))
            del left[row.label()]
        except Exception as error:
            result["failed"][row.label()] = traceback.format_exc()
            left[row.label()] = f"failed, {error!r:.300}"
        result["left_out"] = [f"{label}: {why}" for label, why in left.items()]
        report.save(result, out / "gpu.json")
        (out / "gpu.md").write_text(report.markdown(result))
        print(row.label(), flush=True)
    return not (left or any(row["refused"] for row in result["rows"]))


def _compile(row: Problem, peer: bool) -> None:
    """Compile the kernels that this row needs, or its compiled peer."""
    device = devices.make()
    tensors = inputs(device, row)
    if peer:
        CPU.contestants["compile"].build(row, tensors)()
    else:
        refusal(device, row, tensors)
    device.synchronize()


def compile_ahead(device: Gpu) -> None:
    """Fill the caches on disk in several processes, so that the benchmark compiles nothing."""
    # The compiled peer has a graph for B = 1 and one for more.
    peers = [row for row in rows(device) if _has_compiled_peer(device, row)]
    graphs = {(row.divergence, row.batch == 1): row for row in peers}
    jobs = [(row, True) for row in graphs.values()] + [(row, False) for row in rows(device)]
    with ProcessPoolExecutor(devices.workers() // 2 or 1, mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_compile, *job) for job in jobs]):
            if error := done.exception():  # the row compiles again, or fails, when it is timed
                print(f"compiling ahead: {error!r}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.benchmark", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results go here")
    parser.add_argument("--seconds", type=float, default=240.0, help="no row begins after these")
    parser.add_argument("--compile", action="store_true", help="only fill the caches on disk")
    args = parser.parse_args(argv)
    devices.link_kernels()
    device = devices.make()
    if args.compile:
        compile_ahead(device)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    return 0 if benchmark(device, args.out, args.seconds) else 1


if __name__ == "__main__":
    raise SystemExit(main())
