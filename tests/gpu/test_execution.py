"""How calls run on the GPU: in graphs, on streams, in memory as it is found or of the caller's, on
tensors beyond 2^31."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from interpreter import INTERPRETED
from torch import Tensor

import mod_fused
from mod_fused import Sample
from mod_fused.divergence import DIVERGENCES

pytestmark = pytest.mark.gpu

WEIGHTS = [0.6, 0.3]
FILTERS: dict[str, Any] = {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "temperature": 0.8}
#: Every divergence; a log-linear and a solved one with filters.
CALLS: dict[str, dict[str, Any]] = {d: {"divergence": d} for d in DIVERGENCES} | {
    f"{d}, filters": {"divergence": d, **FILTERS} for d in ("reverse_kl", "jsd")
}
# More keys than fit registers: several programs search a row.
CALLS["flat rows"] = {"top_k": 6000, "top_p": 0.95}


class Calls:
    """The op on one shape of bfloat16 logits: all but the large tensors share its kernels."""

    def __init__(self, gpu: Any) -> None:
        self.gpu = gpu
        self.batch, self.vocab = gpu.pick((4, 40000), (1, 1030))

    def logits(self, seed: int = 1, *shape: int) -> list[Tensor]:
        """Reference and two policies, [B, V]."""
        generator = torch.Generator().manual_seed(seed)
        shape = shape or (self.batch, self.vocab)
        ref = 3.0 * torch.randn(shape, generator=generator)
        rows = [ref] + [ref + torch.randn(shape, generator=generator) for _ in range(2)]
        return [x.bfloat16().to(self.gpu.device) for x in rows]

    def zeros(self) -> Tensor:
        """Positions, int64 [B]."""
        return torch.zeros(self.batch, dtype=torch.int64, device=self.gpu.device)

    def sample(self, logits: list[Tensor], **options: Any) -> Callable[[], Sample]:
        """The call to be made; seeds and positions are tensors unless given otherwise."""
        zeros = torch.zeros(len(logits[0]), dtype=torch.int64, device=logits[0].device)
        options = {"seed": zeros + 5, "position": zeros, "backend": "triton", **options}
        return functools.partial(mod_fused.sample, logits[0], logits[1:], WEIGHTS, **options)

    def own_memory(self) -> dict[str, Any]:
        return self.gpu.own_memory(self.batch, self.vocab, len(WEIGHTS))


@pytest.fixture
def calls(gpu) -> Calls:
    return Calls(gpu)


@pytest.fixture(params=["jsd", "reverse_kl, filters"] if INTERPRETED else list(CALLS))
def options(request) -> dict[str, Any]:
    """The arguments of each of `CALLS`."""
    return CALLS[request.param]


def same(x: Sample, y: Sample) -> bool:
    """Equal to the bit, valid and not NaN."""
    return all(map(torch.equal, x[:3], y[:3])) and bool(x.valid.all())


def kept(result: Sample) -> Sample:
    return Sample(*(x if x is None else x.clone() for x in result))


@contextlib.contextmanager
def no_sync(gpu: Any) -> Iterator[None]:
    """Operations that make the host wait raise."""
    if not gpu.dry:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if not gpu.dry:
            torch.cuda.set_sync_debug_mode("default")


def two_streams(gpu: Any) -> list[contextlib.AbstractContextManager[Any]]:
    """Contexts of streams that begin after the work so far."""
    if gpu.dry:
        return [contextlib.nullcontext()] * 2
    streams = [torch.cuda.Stream() for _ in range(2)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    return [torch.cuda.stream(stream) for stream in streams]


def test_replays_draw_what_eager_calls_draw(gpu, calls, options):
    """Seeds and positions are changed in place."""
    seed, position = torch.arange(calls.batch, device=gpu.device), calls.zeros()
    call = calls.sample(calls.logits(), **options, seed=seed, position=position)
    outputs, replay = gpu.graph(call)
    seen = set()
    for step in range(gpu.pick(20, 1)):
        position.fill_(step)
        seed.add_(1000)
        replay()
        gpu.synchronize()
        assert same(kept(outputs), call()), f"replay {step}"
        seen.add(tuple(outputs.tokens.tolist()))
    assert gpu.dry or len(seen) > 1


def test_replays_write_to_the_caller_s_tensors(gpu, calls, options):
    """Their workspace is that of eager calls in between."""
    position, logits = calls.zeros(), calls.logits()
    owned = calls.own_memory()
    call = calls.sample(logits, **options, position=position)
    whole = calls.sample(logits, **options, position=position, **owned)
    outputs, replay = gpu.graph(whole)
    for step in range(gpu.pick(20, 1)):
        position.fill_(step)
        for x in owned["out"][:3]:
            x.fill_(1)
        replay()
        gpu.synchronize()
        assert same(owned["out"], call()), f"replay {step}"
        whole()  # the same workspace outside of the graph
    assert [x.data_ptr() for x in outputs[:3]] == [x.data_ptr() for x in owned["out"][:3]]


@pytest.mark.parametrize("owned", [False, True], ids=["its memory", "the caller's"])
def test_a_plan_draws_what_calls_draw_and_so_does_its_graph(gpu, calls, options, owned):
    """New logits, seeds and positions in place; the graph has one of the plan's calls."""
    seed, position = torch.arange(calls.batch, device=gpu.device), calls.zeros()
    logits = calls.logits()
    memory = calls.own_memory() if owned else {}
    given = {"seed": seed, "position": position, "backend": "triton", **options}
    call = calls.sample(logits, **given)
    step = mod_fused.plan(logits[0], logits[1:], WEIGHTS, **given, **memory)
    _, replay = gpu.graph(step)
    for number in range(gpu.pick(20, 1)):
        position.fill_(number)
        for x in logits:
            x.copy_(x.roll(7, -1))
        for again in (step, replay):
            for x in step.out[:3]:
                x.fill_(1)
            again()
            gpu.synchronize()
            assert same(step.out, call()), f"step {number}"


def test_a_plan_takes_new_numbers_and_draws_seeds(gpu, calls):
    logits = calls.logits()
    numbered = mod_fused.plan(logits[0], logits[1:], WEIGHTS, seed=5, backend="triton")
    drawing = mod_fused.plan(logits[0], logits[1:], WEIGHTS, backend="triton")
    for number in (0, 1, 2**40)[: gpu.pick(3, 1)]:
        call = calls.sample(logits, seed=number + 5, position=number)
        assert same(numbered(seed=number + 5, position=number), call())
        torch.manual_seed(number)
        expected = kept(calls.sample(logits, seed=None, position=0)())
        torch.manual_seed(number)
        assert same(drawing(), expected)


def test_seeds_drawn_by_torch_differ_between_replays(gpu, calls):
    outputs, replay = gpu.graph(calls.sample(calls.logits(), divergence="jsd", seed=None))
    seen = set()
    for _ in range(gpu.pick(10, 5)):
        replay()
        gpu.synchronize()
        seen.add(tuple(outputs.tokens.tolist()))
    assert len(seen) > 1


def test_no_call_makes_the_host_wait(gpu, calls, options):
    logits = calls.logits()
    call = calls.sample(logits, **options)
    step = mod_fused.plan(logits[0], logits[1:], WEIGHTS, seed=5, backend="triton", **options)
    for one in (call, step):
        one()  # compiled before
        gpu.synchronize()
        with no_sync(gpu):
            one()


@pytest.mark.parametrize("owned", [False, True], ids=["allocating", "two workspaces"])
def test_two_streams_at_once_give_what_one_gives(gpu, calls, options, owned):
    """Thousands of launches do not get stuck."""
    inputs = [calls.logits(seed) for seed in range(2)]
    expected = [kept(calls.sample(x, **options)()) for x in inputs]
    memory = [calls.own_memory() if owned else {} for _ in inputs]
    both = [calls.sample(x, **options, **m) for x, m in zip(inputs, memory, strict=True)]
    wrong = [torch.zeros((), dtype=torch.int64, device=gpu.device) for _ in inputs]
    gpu.synchronize()
    streams = two_streams(gpu)
    for step in range(gpu.pick(2000, 1)):
        for stream, call, right, count in zip(streams, both, expected, wrong, strict=True):
            with stream:
                count += (call().tokens != right.tokens).sum()
        if step % 100 == 99:
            gpu.synchronize()
    gpu.synchronize()
    assert [int(count) for count in wrong] == [0, 0]


def test_different_calls_on_two_streams(gpu, calls):
    logits = calls.logits()
    both = [calls.sample(logits, **CALLS[name]) for name in ("jsd", "reverse_kl, filters")]
    expected = [kept(call()) for call in both]
    gpu.synchronize()
    streams, results = two_streams(gpu), []
    for _ in range(gpu.pick(100, 1)):
        for stream, call, right in zip(streams, both, expected, strict=True):
            with stream:
                results.append((call(), right))
    gpu.synchronize()
    assert all(same(result, right) for result, right in results)


def test_nothing_is_read_that_was_not_written(gpu, calls, options):
    call = calls.sample(calls.logits(3), **options)  # allocates what is NaN, as in all tests
    expected = kept(call())
    torch.utils.deterministic.fill_uninitialized_memory = False
    call()  # leaves its memory to the next
    assert same(call(), expected)


def test_the_number_of_threads_changes_no_token(gpu, calls, options):
    from mod_fused.triton_kernels import configurations

    call = calls.sample(calls.logits(), **options)
    expected = kept(call())
    for threads in (64, 128, 256):
        table = {
            name: dataclasses.replace(entry, threads=threads)
            for name, entry in configurations.TABLE.items()
        }
        with configurations.using(table):
            found = call()
        assert bool(found.valid.all()) and torch.equal(found.tokens, expected.tokens), threads


def test_a_workspace_that_was_not_zeroed_ends_in_invalid_rows(gpu, calls, options):
    memory = calls.own_memory()
    memory["workspace"].fill_(1)
    call = calls.sample(calls.logits(), **options, **memory)
    for _ in range(2):
        assert not call().valid.any()
    mod_fused.reset_workspace(memory["workspace"])
    assert same(call(), calls.sample(calls.logits(), **options)())


def test_a_call_runs_on_the_device_of_its_tensors(gpu, calls):
    if gpu.dry or torch.cuda.device_count() < 2:
        pytest.skip("one device")
    expected = calls.sample(calls.logits(), divergence="jsd")()
    there = calls.sample([x.to("cuda:1") for x in calls.logits()], divergence="jsd")()
    assert torch.cuda.current_device() == 0 and there.tokens.device.index == 1
    assert same(there, Sample(*(x if x is None else x.to("cuda:1") for x in expected)))


@pytest.mark.parametrize("form", ["one row, stride 0", "in memory"])
def test_beyond_2_to_the_31_logits_rows_draw_what_they_draw_in_a_small_batch(gpu, calls, form):
    batch, vocab, distinct = gpu.pick((16400, 131072, 64), (3, 1030, 2))
    few = calls.logits(5, distinct, vocab)
    # The keys of filters and log_probs take float32 [B, V], the logits half as much each.
    needed = 4 * batch * vocab * (1.2 if form == "one row, stride 0" else 2.7)
    if not gpu.dry and torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"{needed / 2**30:.0f} GiB needed")
    if form == "one row, stride 0":
        few = [x[:1].expand(distinct, -1) for x in few]
        many = [x[:1].expand(batch, -1) for x in few]
    else:
        many = [x.repeat(-(-batch // distinct), 1)[:batch] for x in few]
    slot = torch.arange(batch, device=gpu.device) % distinct
    seeds = torch.arange(distinct, device=gpu.device) + 40
    for name in ("reverse_kl", "jsd", "reverse_kl, filters"):
        small = calls.sample(few, **CALLS[name], seed=seeds)()
        large = calls.sample(many, **CALLS[name], seed=seeds[slot])()
        assert large.valid.all() and torch.equal(large.tokens, small.tokens[slot]), name
    whole = functools.partial(
        mod_fused.log_probs, weights=WEIGHTS, divergence="jsd", backend="triton"
    )
    small, large = whole(few[0], few[1:]), whole(many[0], many[1:])
    rows = torch.tensor([0, batch // 2, batch - 1], device=gpu.device)
    assert (large[rows] - small[slot[rows]]).abs().max() <= 1e-5
