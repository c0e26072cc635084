"""Outputs and a workspace of the caller's own: `out` and `workspace` of the op."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from calls import DRAWS, MIXTURES, Recorder, poisoned
from cases import logits, normal
from torch.utils._python_dispatch import TorchDispatchMode

import mod_fused
from mod_fused import Sample, workspace_size

pytestmark = pytest.mark.sanitized

B, V, M = 3, 1100, 2
MODELS = M + 1


def on(device: str, x: Any) -> Any:
    """The same arguments on a device."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda y: y.to(device), x)


def bits(x: Any) -> list[bytes | None]:
    tensors = [x] if isinstance(x, torch.Tensor) else x
    return [None if y is None else y.cpu().numpy().tobytes() for y in tensors]


def counters(workspace: torch.Tensor) -> torch.Tensor:
    """What has to be zero between launches: the first of 32 parts of whole 8 KB."""
    return workspace[: len(workspace) // 8192 * 256]


def model_count(mixture: str) -> int:
    (reference, policies, _), _ = MIXTURES[mixture]
    return len(policies) + (reference is not None)


@pytest.mark.parametrize("draw", ["numbers", "tensors", "packed"])
@pytest.mark.parametrize(
    "mixture", ["lists", "no_reference", "own_mass", "everything_dense", "sparse_zero"]
)
def test_outputs_are_filled_with_the_bits_of_the_functional_op(op, mixture, draw):
    if draw == "packed" and mixture not in ("lists", "own_mass", "sparse_zero"):
        draw = "greedy"  # the mask is as wide as their vocabulary
    args, kwargs = on(op.device, MIXTURES[mixture])
    draws = dict(on(op.device, DRAWS[draw]))
    if draw == "tensors" and mixture in ("no_reference", "everything_dense"):
        draws["mask"] = draws["mask"][:, : kwargs["vocab_size"]]
    kwargs = {**kwargs, **draws, "backend": op.backend}
    kwargs["return_proposal_logprobs"] = proposal = draw != "packed"
    models = model_count(mixture) if "return_model_logprobs" in kwargs else None
    expected = mod_fused.sample(*args, **kwargs)
    workspace = torch.zeros(workspace_size(B, V, M), dtype=torch.uint8, device=op.device)
    for own in ({}, {"workspace": workspace}):
        out = poisoned(B, models, op.device, proposal)
        assert mod_fused.sample(*args, **kwargs, out=out, **own) is out
        assert bits(out) == bits(expected)
    assert bits(mod_fused.sample(*args, **kwargs, workspace=workspace)) == bits(expected)
    assert not counters(workspace).any()


@pytest.mark.parametrize("mixture", ["lists", "own_mass", "sparse_zero"])
def test_log_probs_are_written_to_out(op, mixture):
    args, kwargs = on(op.device, MIXTURES[mixture])
    kwargs = {**kwargs, "backend": op.backend}
    out = torch.full((B, V), 7.0, device=op.device)
    size = workspace_size(B, V, M, filters=False)
    workspace = torch.zeros(size, dtype=torch.uint8, device=op.device)
    assert mod_fused.log_probs(*args, **kwargs, out=out, workspace=workspace) is out
    assert bits(out) == bits(mod_fused.log_probs(*args, **kwargs))
    assert not counters(workspace).any()


def test_one_workspace_serves_calls_of_all_shapes_and_what_is_around_it_stays(op):
    # Invalid, masked and filtered rows; fewer and more rows, narrower and wider; from call to call
    # all that is not a counter is poisoned.
    nan_row = logits(301, 5, 700, 2, kind="typical")
    nan_row[0][1] = math.nan
    wide = logits(302, 2, 2100, 2, kind="typical")
    nothing = torch.ones(2, 2100, dtype=torch.bool)
    nothing[1] = False
    ids = torch.tensor([[5, 3, -1], [8, 2100, 1]])  # one out of range
    candidates = {"values": normal(303, 1, 2, 3), "value_ids": ids}
    calls: list[tuple[tuple[Any, Any], dict[str, Any], list[bool]]] = [
        (nan_row, {"divergence": "jsd", "top_k": 40}, [True, False, True, True, True]),
        (wide, {"divergence": "forward_kl", "mask": nothing}, [True, False]),
        (nan_row, {"divergence": "reverse_kl"}, [True, False, True, True, True]),
        (wide, {"top_p": torch.tensor([0.9, 2.0])}, [True, False]),
        (wide, {"divergence": "reverse_kl", **candidates}, [True, False]),
        (nan_row, {"divergence": "jsd", "min_p": 0.01}, [True, False, True, True, True]),
    ]
    size, margin = workspace_size(5, 2100, 2), 64
    buffer = torch.full((size + 2 * margin,), 0xAB, dtype=torch.uint8, device=op.device)
    workspace = buffer[margin:-margin].zero_()
    for (ref, policies), options, valid in calls:
        zeros = len(counters(workspace))
        workspace[zeros:] = 255
        before = bits(workspace)
        args, kwargs = on(op.device, ((ref, policies, [0.5, 0.25]), {**options, "seed": 3}))
        kwargs = {**kwargs, "return_model_logprobs": True, "backend": op.backend}
        out = poisoned(len(ref), MODELS, op.device)
        mod_fused.sample(*args, **kwargs, out=out, workspace=workspace)
        assert out.valid.tolist() == valid
        assert bits(out) == bits(mod_fused.sample(*args, **kwargs))
        assert not counters(workspace).any()
        assert (bits(workspace) == before) == (op.backend != "triton")
    assert (buffer[:margin] == 0xAB).all() and (buffer[-margin:] == 0xAB).all()


def test_a_batch_of_no_rows(op):
    empty = torch.empty(0, 9, device=op.device)
    out = poisoned(0, None, op.device)
    workspace = torch.zeros(workspace_size(0, 9, 1), dtype=torch.uint8, device=op.device)
    kwargs = {"seed": 1, "backend": op.backend, "workspace": workspace}
    assert mod_fused.sample(empty, [empty], [0.5], out=out, **kwargs) is out


def like(**changes: Any) -> Sample:
    return poisoned(B, MODELS, "cpu")._replace(**changes)


NEEDED = workspace_size(B, V, M)
ZEROS = torch.zeros(NEEDED + 64, dtype=torch.uint8)
REFUSED: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "tuple": (tuple(like()), None, TypeError, "out must be a Sample, got tuple"),
    "no_tensor": (like(tokens=[1]), None, TypeError, "out.tokens must be a tensor, got list"),
    "dtype": (like(tokens=torch.zeros(B)), None, TypeError, "out.tokens must be int64, got"),
    "rows": (
        like(logprobs=torch.zeros(B + 1)), None, ValueError,
        r"out.logprobs must have shape \[B\] = \[3\], got \[4\]",
    ),
    "columns": (
        like(model_logprobs=torch.zeros(B, M)), None, ValueError,
        r"out.model_logprobs must have shape \[B, models\] = \[3, 3\], got \[3, 2\]",
    ),
    "missing": (
        like(model_logprobs=None), None, ValueError, "out.model_logprobs must be a tensor",
    ),
    "strides": (
        like(valid=torch.zeros(B, 2, dtype=torch.bool)[:, 0]), None, ValueError,
        r"out.valid must be contiguous, got strides \[2\]",
    ),
    "device": (
        like(logprobs=torch.empty(B, device="meta")), None, ValueError,
        "out.logprobs must be on cpu like the logits, got meta",
    ),
    "workspace_list": (like(), [0], TypeError, "workspace must be a tensor, got list"),
    "workspace_dtype": (like(), ZEROS.int(), TypeError, f"at least {NEEDED} bytes, got torch.int"),
    "workspace_size": (
        like(), ZEROS[: NEEDED - 1], ValueError, f"at least {NEEDED} bytes, got {NEEDED - 1}",
    ),
    "workspace_device": (
        like(), ZEROS.to("meta"), ValueError, f"{NEEDED} bytes on cpu like the logits, got meta",
    ),
    "workspace_rank": (like(), ZEROS[None], ValueError, rf"{NEEDED} bytes, got shape \[1, "),
    "workspace_strides": (
        like(), torch.zeros(2 * NEEDED, dtype=torch.uint8)[::2], ValueError,
        rf"{NEEDED} bytes, got shape .* strides \[2\]",
    ),
    "workspace_alignment": (like(), ZEROS[8:], ValueError, "multiple of 16, got .* from byte 8 on"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(case):
    pytest.importorskip("triton")  # without it a workspace needs no bytes
    out, workspace, error, message = REFUSED[case]
    (ref, policies, weights), _ = MIXTURES["lists"]
    kept = [x for x in out if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
    before = bits(kept)
    for backend in ("torch", None):
        with pytest.raises(error, match=message):
            mod_fused.sample(
                ref, policies, weights, top_k=5, seed=1, return_model_logprobs=True,
                out=out, workspace=workspace, backend=backend,
            )  # fmt: skip
    assert bits(kept) == before
    assert not ZEROS.any()


def test_log_probabilities_that_nobody_asked_for_and_wrong_log_probs_are_refused():
    (ref, policies, weights), _ = MIXTURES["lists"]
    with pytest.raises(ValueError, match="out.model_logprobs must be None"):
        mod_fused.sample(ref, policies, weights, seed=1, out=poisoned(B, MODELS, "cpu"))
    with pytest.raises(ValueError, match="out.proposal_logprobs must be None"):
        out = poisoned(B, None, "cpu", proposal=True)
        mod_fused.sample(ref, policies, weights, seed=1, out=out)
    with pytest.raises(ValueError, match="out.proposal_logprobs must be a tensor"):
        out, asked = poisoned(B, None, "cpu"), {"return_proposal_logprobs": True}
        mod_fused.sample(ref, policies, weights, seed=1, out=out, **asked)
    with pytest.raises(TypeError, match="out must be float32, got torch.float64"):
        mod_fused.log_probs(ref, policies, weights, out=torch.zeros(B, V, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"out must be contiguous, got strides \[1, 3\]"):
        mod_fused.log_probs(ref, policies, weights, out=torch.zeros(V, B).t())


def test_workspace_size_covers_what_is_smaller_and_refuses_what_is_no_size():
    pytest.importorskip("triton")
    sizes = [(b, v, m) for b in (0, 1, 7, 64) for v in (1, 1024, 1025, 50257) for m in (0, 2, 8)]
    for small in sizes:
        for large in sizes:
            if all(x <= y for x, y in zip(small, large, strict=True)):
                assert workspace_size(*small) <= workspace_size(*large)
        without = workspace_size(*small, filters=False)
        # A key for every token, one for every 8 of a tile, 4096 candidates, a mass of each tile,
        # 268 numbers of a search; at most a thirty-first of it for counters, and rounding: the
        # counters alone may take three parts of 8 KB.
        tiles = -(-small[1] // 1024)
        keys = small[0] * (4 * small[1] + 512 * tiles + 4 * min(small[1], 4096) + 8 * tiles)
        keys += small[0] * 8 * 268
        assert keys - 3 * 8192 <= workspace_size(*small) - without <= keys * 32 / 31 + 2 * 8192
    with pytest.raises(ValueError, match="vocab_size must be at least 1, got 0"):
        workspace_size(1, 0)
    with pytest.raises(ValueError, match="batch must be at least 0, got -1"):
        workspace_size(-1, 5)
    with pytest.raises(TypeError, match="policies must be an integer"):
        workspace_size(1, 5, 2.5)


@pytest.mark.parametrize("mixture", ["lists", "own_mass", "sparse_zero"])
@pytest.mark.parametrize("function", ["sample", "log_probs"])
def test_opcheck(op, function, mixture):
    args, kwargs = on(op.device, MIXTURES[mixture])
    workspace = torch.zeros(workspace_size(B, V, M), dtype=torch.uint8, device=op.device)
    if function == "sample":
        outs = [poisoned(B, MODELS, op.device, True), poisoned(B, None, op.device)]
        options = [
            {**DRAWS["numbers"], "return_proposal_logprobs": True, "workspace": workspace},
            {"seed": 1},
        ]
    else:
        outs = [torch.zeros(B, V, device=op.device)]
        options = [{"workspace": workspace}]
    for out, option in zip(outs, options, strict=True):
        with Recorder() as recorder:
            call = getattr(mod_fused, function)
            call(*args, **kwargs, **option, out=out, backend=op.backend)
        ((func, packed, rest),) = recorder.calls
        assert func.overloadpacket is getattr(torch.ops.mod_fused, f"{function}_{op.backend}_out")
        torch.library.opcheck(func, packed, rest)


def test_compile_fullgraph_fills_the_caller_s_tensors(op):
    args, kwargs = on(op.device, MIXTURES["lists"])
    workspace = torch.zeros(workspace_size(B, V, M), dtype=torch.uint8, device=op.device)

    def step(ref: Any, position: Any, out: Sample, log_pi: Any, workspace: Any) -> Any:
        options = {"divergence": "jsd", "backend": op.backend, "workspace": workspace}
        drawn = mod_fused.sample(
            ref * 1.0, args[1], args[2], seed=5, position=position, top_k=50, out=out, **options
        )
        mod_fused.log_probs(ref, args[1], args[2], out=log_pi, **options)
        return drawn.tokens + 1

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    log_pi = [torch.full((B, V), 7.0, device=op.device) for _ in range(2)]
    seen = set()
    for n in range(3):
        position = torch.arange(B, device=op.device) + n
        outs = [poisoned(B, None, op.device) for _ in range(2)]
        tokens = compiled(args[0], position, outs[0], log_pi[0], workspace)
        assert torch.equal(tokens, step(args[0], position, outs[1], log_pi[1], workspace))
        assert bits(outs[0]) == bits(outs[1]) and outs[0].valid.all()
        assert bits(log_pi[0]) == bits(log_pi[1])
        assert not counters(workspace).any()
        seen.add(tuple(tokens.tolist()))
    assert len(seen) > 1


class Calls(TorchDispatchMode):
    """The torch operators that are called, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_triton_launches_allocate_one_buffer_or_with_a_workspace_nothing():
    pytest.importorskip("triton")
    from mod_fused.triton_kernels import launch

    from mod_fused.call.checks import check_draw, check_mixture

    (ref, policies, weights), _ = MIXTURES["lists"]
    mixing = check_mixture(ref, policies, weights, divergence="jsd")
    row = torch.ones(B)
    mask = torch.ones(B, V, dtype=torch.bool)
    draws = [(0.7, 40, 0.9, 0.1, None, None, None, 5, 3, True, True)]
    of_rows = (row, row.long(), row, row, mask, torch.ones(B, V), None, row.long(), row.long())
    draws += [(*of_rows, False, False)]
    workspace = torch.zeros(workspace_size(B, V, M), dtype=torch.uint8)
    for draw in draws:
        drawing = check_draw(mixing, *draw)
        out = poisoned(B, MODELS if draw[-1] else None, "cpu", proposal=draw[-1])
        for own, expected in ((None, ["new_empty", "zero_"]), (workspace, [])):
            with Calls() as calls:
                launch.sample_launches(mixing, drawing, tuple(out), own)
            assert calls.seen == expected
        with Calls() as calls:
            launch.log_probs_launches(mixing, torch.empty(B, V), workspace)
        assert calls.seen in (["empty"], ["empty", "fill_"])  # the argument above
