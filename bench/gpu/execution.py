"""Stages about how calls run: graphs, streams, memory as it is found, tensors beyond 2^31."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mod_fused
from mod_fused import Sample

from ..problem import DIVERGENCES
from .device import Gpu
from .record import FAILED, SKIPPED, TIMED_OUT, Record

WEIGHTS = [0.6, 0.3]
#: One shape for all but the large tensors: each takes a compilation for every call below.
BATCH, VOCAB = 4, 40000
FILTERS: dict[str, Any] = {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "temperature": 0.8}


def _logits(device: Gpu, batch: int, vocab: int, seed: int = 1) -> list[Tensor]:
    """Reference and two policies, bfloat16 [B, V]."""
    generator = torch.Generator().manual_seed(seed)
    ref = 3.0 * torch.randn(batch, vocab, generator=generator)
    rows = [ref] + [ref + torch.randn(batch, vocab, generator=generator) for _ in range(2)]
    return [x.bfloat16().to(device.device) for x in rows]


def _call(logits: list[Tensor], **options: Any) -> Callable[[], Sample]:
    """The call to be made; seeds and positions are tensors unless given otherwise."""
    zeros = torch.zeros(len(logits[0]), dtype=torch.int64, device=logits[0].device)
    options = {"seed": zeros + 5, "position": zeros, **options}
    return functools.partial(mod_fused.sample, logits[0], logits[1:], WEIGHTS, **options)


def _same(x: Sample, y: Sample) -> bool:
    """Equal to the bit, valid and not NaN."""
    return bool(
        torch.equal(x.tokens, y.tokens)
        and torch.equal(x.logprobs, y.logprobs)
        and torch.equal(x.valid, y.valid)
        and x.valid.all()
    )


def own_memory(device: Gpu, batch: int, vocab: int, policies: int = len(WEIGHTS)) -> dict[str, Any]:
    """Outputs and a workspace that are the caller's."""
    size = mod_fused.workspace_size(batch, vocab, policies)
    out = Sample(
        torch.zeros(batch, dtype=torch.int64, device=device.device),
        torch.zeros(batch, device=device.device),
        torch.zeros(batch, dtype=torch.bool, device=device.device),
        None,
    )
    workspace = torch.zeros(size, dtype=torch.uint8, device=device.device)
    return {"out": out, "workspace": workspace}


def _kept(result: Sample) -> Sample:
    return Sample(*(x if x is None else x.clone() for x in result))


def _guarded(record: Record, name: str, check: Callable[[], tuple[bool, str]]) -> None:
    """Note the outcome of a check, which may raise."""
    if record.left() < 3.0:
        record.item(name, TIMED_OUT, "not begun")
        return
    try:
        record.expect(name, *check())
    except Exception:
        record.item(name, FAILED, traceback.format_exc())


#: Every divergence; a log-linear and a solved one with filters.
CALLS: dict[str, dict[str, Any]] = {d: {"divergence": d} for d in DIVERGENCES} | {
    f"{d}, filters": {"divergence": d, **FILTERS} for d in ("reverse_kl", "jsd")
}


def _shape(device: Gpu) -> tuple[int, int]:
    return device.pick((BATCH, VOCAB), (1, 1030))


def warm(device: Gpu, name: str) -> None:
    """Compile what the stages need for one of `CALLS`."""
    _call(_logits(device, *_shape(device)), **CALLS[name], backend="triton")()
    device.synchronize()


def graphs(device: Gpu, record: Record) -> None:
    """Replays with seeds and positions changed in place draw what eager calls draw; no call makes
    the host wait."""
    batch, vocab = _shape(device)
    logits = _logits(device, batch, vocab)
    for i, (name, options) in enumerate(CALLS.items()):
        backend = device.backend(i)
        seed = torch.arange(batch, device=device.device)
        position = torch.zeros(batch, dtype=torch.int64, device=device.device)
        call = _call(logits, **options, seed=seed, position=position, backend=backend)

        def replay(
            call: Callable[[], Sample] = call, s: Tensor = seed, p: Tensor = position
        ) -> Any:
            outputs, run = device.graph(call)
            seen = []
            for step in range(device.pick(20, 1)):
                p.fill_(step)
                s.add_(1000)
                run()
                device.synchronize()
                if not _same(_kept(outputs), call()):
                    return False, f"replay {step} differs from an eager call"
                seen.append(tuple(outputs.tokens.tolist()))
            return device.dry or len(set(seen)) > 1, f"{len(set(seen))} different draws"

        _guarded(record, f"graph: {name}", replay)

        def in_place(
            options: dict[str, Any] = options,
            s: Tensor = seed,
            p: Tensor = position,
            call: Callable[[], Sample] = call,
            backend: str = backend,
        ) -> tuple[bool, str]:
            owned = own_memory(device, batch, vocab)
            whole = _call(logits, **options, seed=s, position=p, backend=backend, **owned)
            outputs, run = device.graph(whole)
            before = [x.data_ptr() for x in owned["out"] if x is not None]
            for step in range(device.pick(20, 1)):
                p.fill_(step)
                for x in owned["out"][:3]:
                    x.fill_(1)
                run()
                device.synchronize()
                if not _same(owned["out"], call()):
                    return False, f"replay {step} differs from an eager call"
                whole()  # the same workspace outside of the graph
            same = [x.data_ptr() for x in outputs if x is not None] == before
            return same, "outputs at their addresses" if same else "other outputs"

        if not device.dry or i == 0:
            _guarded(record, f"graph with the caller's tensors: {name}", in_place)

        def silent(call: Callable[[], Sample] = call) -> tuple[bool, str]:
            call()  # compiled before
            device.synchronize()
            with device.no_sync():
                call()
            return True, "torch's sync debug mode saw none"

        if not device.dry or i == 1:
            _guarded(record, f"no host synchronisation: {name}", silent)

    def drawn_seeds() -> tuple[bool, str]:
        outputs, run = device.graph(_call(logits, seed=None, backend=device.backend(1)))
        seen = []
        for _ in range(10):
            run()
            device.synchronize()
            seen.append(tuple(outputs.tokens.tolist()))
        return len(set(seen)) > 1, f"{len(set(seen))} different draws in 10 replays"

    _guarded(record, "graph: seeds drawn by torch differ between replays", drawn_seeds)


def streams(device: Gpu, record: Record) -> None:
    """Two streams at once give what one gives; thousands of launches do not get stuck."""
    inputs = [_logits(device, *_shape(device), seed=i) for i in range(2)]
    launches = device.pick(2000, 2)

    def interleaved(options: dict[str, Any], index: int, owned: bool) -> tuple[bool, str]:
        backend = device.backend(index)
        calls = [_call(x, **options, backend=backend) for x in inputs]
        expected = [_kept(call()) for call in calls]
        if owned:  # outputs and a workspace for each stream
            own = [own_memory(device, *_shape(device)) for _ in inputs]
            calls = [
                _call(x, **options, backend=backend, **o) for x, o in zip(inputs, own, strict=True)
            ]
        device.synchronize()
        wrong = [torch.zeros((), dtype=torch.int64, device=device.device) for _ in calls]
        contexts = device.streams(2)
        done = 0
        for _ in range(launches):
            for stream, call, right, count in zip(contexts, calls, expected, wrong, strict=True):
                with stream:
                    count += (call().tokens != right.tokens).sum()
            done += 1
            if done % 100 == 0:
                device.synchronize()
                if record.left() < 3.0:
                    break
        device.synchronize()
        bad = sum(int(count) for count in wrong)
        return bad == 0, f"{2 * done} launches on two streams, {bad} wrong tokens"

    for i, (name, options) in enumerate(CALLS.items()):
        _guarded(record, name, functools.partial(interleaved, options, i, False))
        if not device.dry or i == 0:
            two = functools.partial(interleaved, options, i, True)
            _guarded(record, f"{name}: two workspaces", two)

    def different() -> tuple[bool, str]:
        options = [CALLS["jsd"], CALLS["reverse_kl, filters"]]
        calls = [_call(inputs[0], **o, backend=device.backend(1)) for o in options]
        expected = [_kept(call()) for call in calls]
        device.synchronize()
        results = []
        contexts = device.streams(2)
        for _ in range(device.pick(100, 2)):
            for i, call in enumerate(calls):
                with contexts[i]:
                    results.append((i, call()))
        device.synchronize()
        bad = sum(not _same(result, expected[i]) for i, result in results)
        return bad == 0, f"{bad} of {len(results)} results differ"

    _guarded(record, "different calls on two streams", different)


def poison(device: Gpu, record: Record) -> None:
    """Nothing is read that was not written: NaN in all free memory changes no result."""
    logits = _logits(device, *_shape(device), seed=3)
    for i, (name, options) in enumerate(CALLS.items()):
        call = _call(logits, **options, backend=device.backend(i))

        def compare(call: Callable[[], Sample] = call) -> tuple[bool, str]:
            expected = _kept(call())
            bad = 0
            for _ in range(device.pick(3, 1)):
                device.poison()
                bad += not _same(call(), expected)
            return bad == 0, f"{bad} results differ"

        _guarded(record, name, compare)

    def whole() -> tuple[bool, str]:
        compute = functools.partial(
            mod_fused.log_probs,
            logits[0],
            logits[1:],
            WEIGHTS,
            divergence="jsd",
            backend=device.backend(1),
        )
        expected = compute().clone()
        device.poison()
        return torch.equal(compute(), expected), "compared to the bit"

    _guarded(record, "log_probs, jsd", whole)


def large(device: Gpu, record: Record) -> None:
    """More than 2^31 logits a tensor: rows draw what the same rows draw in a small batch."""
    batch, vocab, distinct = device.pick((16400, 131072, 64), (3, 1030, 2))
    base = _logits(device, distinct, vocab, seed=5)
    slot = torch.arange(batch, device=device.device) % distinct
    needed = 3 * batch * vocab * 2
    free = device.free_bytes()
    one_row = [x[:1].expand(distinct, -1) for x in base]
    forms: list[tuple[str, list[Tensor], Callable[[], list[Tensor]]]] = [
        ("one row, stride 0", one_row, lambda: [x[:1].expand(batch, -1) for x in base]),
    ]
    if free > 1.2 * needed:
        repeats = -(-batch // distinct)
        forms.append(("in memory", base, lambda: [x.repeat(repeats, 1)[:batch] for x in base]))
    else:
        why = f"{needed / 2**30:.0f} GiB needed, {free / 2**30:.0f} free"
        record.item("in memory", SKIPPED, why)
    for form, small, make in forms:
        rows = make()
        keys_fit = device.dry or device.free_bytes() > 5 * batch * vocab

        def draws(
            options: dict[str, Any],
            backend: str,
            rows: list[Tensor] = rows,
            small: list[Tensor] = small,
        ) -> tuple[bool, str]:
            seeds = torch.arange(distinct, device=device.device) + 40
            few = _call(small, **options, seed=seeds, backend=backend)()
            many = _call(rows, **options, seed=seeds[slot], backend=backend)()
            device.synchronize()
            wrong = int(((many.tokens != few.tokens[slot]) | ~many.valid).sum())
            return wrong == 0, f"{batch} x {vocab}: {wrong} rows differ"

        def whole(rows: list[Tensor] = rows, small: list[Tensor] = small) -> tuple[bool, str]:
            compute = functools.partial(mod_fused.log_probs, weights=WEIGHTS, divergence="jsd")
            few = compute(small[0], small[1:], backend=device.backend(1))
            many = compute(rows[0], rows[1:], backend=device.backend(1))
            device.synchronize()
            picked = torch.tensor([0, batch // 2, batch - 1], device=device.device)
            off = float((many[picked] - few[slot[picked]]).abs().max())
            return off <= 1e-5, f"off by {off:.1e} at most in three rows"

        for i, name in enumerate(("reverse_kl", "jsd", "reverse_kl, filters")):
            if "filters" in name and not keys_fit:
                record.item(f"{form}: {name}", SKIPPED, "not enough memory for the keys")
                continue
            backend = device.backend(i + (form == "in memory"))
            _guarded(record, f"{form}: {name}", functools.partial(draws, CALLS[name], backend))
        if keys_fit:
            _guarded(record, f"{form}: log_probs, jsd", whole)
        else:
            record.item(f"{form}: log_probs, jsd", SKIPPED, "not enough memory for the result")
        del rows
