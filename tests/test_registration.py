"""The registered torch ops: schema, fake implementation, opcheck, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import logits, normal
from torch.utils._python_dispatch import TorchDispatchMode

B, V = 3, 1100
REF, POLICIES = logits(71, B, V, 2, kind="typical")
WEIGHTS = [0.5, 0.25]
IDS = torch.tensor([[1, 5, 1099, -1]] * B)


def per_row(x: float) -> torch.Tensor:
    return torch.full((B,), x)


# Arguments of the public functions, such that every option appears, each form of it.
MIXTURES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "lists": ((REF, POLICIES, WEIGHTS), {}),
    "stacked": ((REF, torch.stack(POLICIES), torch.tensor(WEIGHTS)), {"divergence": "forward_kl"}),
    "weights_per_row": ((REF, POLICIES, normal(5, B, 2).abs()), {"divergence": "jsd"}),
    "half": ((REF.half(), [POLICIES[0].bfloat16()], [[0.5]] * B), {"divergence": "alpha:0.5"}),
    "no_reference": ((None, POLICIES, WEIGHTS), {"vocab_size": 900, "logit_scales": [1.0, 2.0]}),
    "no_policy": ((REF, [], []), {"divergence": "jeffrey", "values": normal(1, 2, B, V)}),
    "everything_dense": (
        (REF[:, :1090], POLICIES, WEIGHTS),
        {
            "divergence": "jeffrey",
            "values": normal(2, 1, B, 1000),
            "value_weights": normal(6, B, 1).abs(),
            "prefix_logprobs": normal(3, B, 3).double(),
            "logit_scales": [0.5, 1.0, 2.0],
            "vocab_size": 1000,
            "plausibility": 1e-4,
            "plausibility_tensor": 1,
        },
    ),
    "sparse_zero": (
        (REF, POLICIES, WEIGHTS),
        {
            "divergence": "jsd",
            "normalizer": "zero",
            "values": -normal(4, 2, B, 4).abs(),  # so that Z = 0 has an inverse
            "value_ids": IDS,
            "value_weights": [0.5, 1.0],
        },
    ),
}
DRAWS: dict[str, dict[str, Any]] = {
    "plain": {"seed": 1},
    "numbers": {
        "seed": 1, "position": 7, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01,
        "return_model_logprobs": True,
    },
    "tensors": {
        "seed": torch.arange(B), "position": torch.arange(B), "temperature": per_row(0.7),
        "top_k": per_row(20).long(), "top_p": per_row(0.9), "min_p": per_row(0.01),
        "mask": torch.ones(B, V, dtype=torch.bool),
    },
    "packed": {"seed": [1, 2, 3], "mask": torch.full((B, 35), -1, dtype=torch.int32)},
    "greedy": {"seed": 1, "temperature": 0.0},
}  # fmt: skip
CALLS = [("log_probs", m, "-") for m in MIXTURES] + [
    ("sample", m, "numbers") for m in MIXTURES if m != "lists"
]
CALLS += [("sample", "lists", d) for d in DRAWS]
CALL_IDS = ["-".join(call) for call in CALLS]


class Recorder(TorchDispatchMode):
    """Records the calls of this package's ops that pass through the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mod_fused":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def call(op: Any, function: str, mixture: str, draw: str) -> Any:
    args, kwargs = MIXTURES[mixture]
    return getattr(op, function)(*args, **kwargs, **DRAWS.get(draw, {}))


@pytest.mark.parametrize(("function", "mixture", "draw"), CALLS, ids=CALL_IDS)
def test_opcheck(op, function, mixture, draw):
    with Recorder() as recorder:
        call(op, function, mixture, draw)
    ((func, args, kwargs),) = recorder.calls  # the public function is one op
    assert func.overloadpacket is getattr(torch.ops.mod_fused, f"{function}_{op.backend}")
    torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize(("function", "mixture", "draw"), CALLS, ids=CALL_IDS)
def test_fake_tensors_have_the_shapes_and_dtypes_of_the_real_ones(op, function, mixture, draw):
    from torch._subclasses import FakeTensorMode
    from torch.utils._pytree import tree_map_only

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = tree_map_only(
        torch.Tensor, lambda x: mode.from_tensor(x.to(op.device)), MIXTURES[mixture]
    )
    draws = tree_map_only(
        torch.Tensor, lambda x: mode.from_tensor(x.to(op.device)), DRAWS.get(draw, {})
    )
    import mod_fused.ops as ops

    with mode:
        fake = getattr(ops, function)(*args, **kwargs, **draws, backend=op.backend)
    real = call(op, function, mixture, draw)
    for x, y in zip(
        fake if function == "sample" else [fake],
        real if function == "sample" else [real],
        strict=True,
    ):
        assert (x is None) == (y is None)
        if x is not None:
            assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


@pytest.mark.parametrize("mixture", ["lists", "everything_dense", "sparse_zero"])
def test_compile_fullgraph_draws_the_same_tokens(op, mixture):
    args, kwargs = MIXTURES[mixture]
    draws = {n: x for n, x in DRAWS["tensors"].items() if n != "mask"}

    def step(ref: torch.Tensor, policies: Any, position: torch.Tensor) -> Any:
        rest = {**kwargs, **draws, "position": position}
        drawn = op.sample(ref * 1.0, policies, args[2], **rest, return_model_logprobs=True)
        return drawn.tokens + 1, drawn.logprobs, drawn.valid, drawn.model_logprobs

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n in range(3):
        position = torch.arange(B) + n
        for x, y in zip(
            compiled(args[0], args[1], position), step(args[0], args[1], position), strict=True
        ):
            assert torch.equal(x, y)
    assert len(set(step(args[0], args[1], torch.arange(B))[0].tolist())) > 1


def test_compile_fullgraph_with_numbers_and_lists(op):
    args, kwargs = MIXTURES["lists"]

    def step(ref: torch.Tensor, policies: Any, position: int) -> Any:
        drawn = op.sample(
            ref, policies, [0.5, 0.25], divergence="jsd", seed=5, position=position, top_k=50,
            temperature=0.8,
        )  # fmt: skip
        return drawn.tokens, op.log_probs(ref, policies, [0.5, 0.25], divergence="jsd")

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for position in (0, 1, 2):
        for x, y in zip(
            compiled(args[0], args[1], position), step(args[0], args[1], position), strict=True
        ):
            assert torch.equal(x, y)
