"""The registered torch ops: schema, fake implementation, opcheck, torch.compile."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from calls import DRAWS, IDS, MIXTURES, POLICIES, REF, WEIGHTS, B, Recorder, V
from cases import normal

import mod_fused
from mod_fused import AlphaDivergence
from mod_fused.call.checks import check_draw, check_mixture
from mod_fused.dispatch import tracing

pytestmark = pytest.mark.sanitized

CALLS = [("log_probs", m, "-") for m in MIXTURES] + [
    ("sample", m, "numbers") for m in MIXTURES if m != "lists"
]
CALLS += [("sample", "lists", d) for d in DRAWS]
CALL_IDS = ["-".join(call) for call in CALLS]


def call(op: Any, function: str, mixture: str, draw: str) -> Any:
    args, kwargs = MIXTURES[mixture]
    return getattr(op, function)(*args, **kwargs, **DRAWS.get(draw, {}))


@pytest.mark.parametrize(("function", "mixture", "draw"), CALLS, ids=CALL_IDS)
def test_opcheck(op, function, mixture, draw):
    with Recorder() as recorder:
        call(op, function, mixture, draw)
    ((func, args, kwargs),) = recorder.calls  # the public function is one op
    suffix = "_out" if "return_proposal_logprobs" in DRAWS.get(draw, {}) else ""
    assert func.overloadpacket is getattr(torch.ops.mod_fused, f"{function}_{op.backend}{suffix}")
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


@pytest.mark.parametrize("mixture", ["lists", "own_mass", "everything_dense", "sparse_zero"])
def test_compile_fullgraph_draws_the_same_tokens(op, mixture):
    args, kwargs = MIXTURES[mixture]
    draws = {n: x for n, x in DRAWS["tensors"].items() if n != "mask"}
    draws |= {"bias": normal(8, B, 4), "bias_ids": IDS - (IDS == 1099) * 300}

    def step(ref: torch.Tensor, policies: Any, position: torch.Tensor) -> Any:
        rest = {**kwargs, **draws, "position": position}
        rest |= {"return_model_logprobs": True, "return_proposal_logprobs": True}
        drawn = op.sample(ref * 1.0, policies, args[2], **rest)
        return drawn.tokens + 1, *drawn[1:]

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


def test_no_string_crosses_the_dispatcher(op):
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("mod_fused::")]
    assert f"mod_fused::sample_{op.backend}" in {s.name for s in schemas}
    for schema in schemas:
        assert "str" not in {str(x.type) for x in (*schema.arguments, *schema.returns)}


def test_alpha_reaches_the_op_as_it_is(op):
    alpha = 0.1 + 2.0**-50
    with Recorder() as recorder:
        op.log_probs(REF, POLICIES, WEIGHTS, divergence=f"alpha:{alpha!r}")
    ((_, (_, _, integers, numbers), _),) = recorder.calls
    assert integers[4] == 3 and numbers[1] == alpha


#: Options as functions of a Python number, and the numbers of some calls: Dynamo makes a number
#: that changes a symbol, from the second call on or, `dynamic`, at once. Of graphs it allows eight.
VALUES = normal(1, 1, B, V)
TEN = [0.6, 0.55, 0.1234567, 1.0, 0.9, 0.3, 0.7, 0.31, 0.32, 0.33]
CHANGING: dict[str, tuple[Any, list[Any]]] = {
    "numbers": (
        lambda x: {
            "weights": [x, 1 - x], "temperature": x, "top_p": x, "min_p": x / 10,
            "values": VALUES, "value_weights": [x / 3],
        },
        TEN,
    ),
    "integers": (
        lambda n: {
            "weights": [n, 1], "temperature": n, "top_k": 10 * n, "position": n, "seed": n,
        },
        [1, 2, 300, *range(3, 12)],
    ),
    "seeds": (lambda n: {"seed": n, "temperature": 0.5}, [1, -2, 2**63 + 5]),
    "by_row": (
        lambda x: {
            "weights": [[x, 1 - x]] * B, "temperature": [x, 1.0, x / 2], "top_p": [x] * B,
            "values": VALUES, "value_weights": [[x]] * B, "divergence": "jsd",
        },
        TEN,
    ),
    "scales": (
        lambda x: {"logit_scales": [1.0, x, 2 * x], "divergence": "forward_kl", "backend": "torch"},
        TEN,
    ),
    "policies_alone": (lambda x: {"ref_logits": None, "logit_scales": [x, 1.0]}, TEN),
    "off_and_on": (lambda x: {"top_p": x, "temperature": 2 - x}, [1.0, 0.9, 0.8, 1.0]),
    "constants": (
        lambda x: {
            "divergence": AlphaDivergence(x), "values": VALUES, "value_weights": [x - 0.3],
            "plausibility": x / 100,
        },
        [0.3, 0.4, 0.5],
    ),
}  # fmt: skip


def changing(ref: torch.Tensor, policies: Any, **arguments: Any) -> tuple[torch.Tensor, ...]:
    arguments = {"ref_logits": ref, "weights": [0.6, 0.3], "seed": 5, **arguments}
    return mod_fused.sample(policy_logits=policies, **arguments)[:3]


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("name", CHANGING)
def test_compile_fullgraph_with_numbers_that_change(name, dynamic):
    options, numbers = CHANGING[name]
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def compiled(ref: torch.Tensor, policies: Any, x: Any) -> tuple[torch.Tensor, ...]:
        return changing(ref, policies, **options(x))

    for x in numbers:
        expected = changing(REF, POLICIES, **options(x))
        assert expected[2].all()
        for got, want in zip(compiled(REF, POLICIES, x), expected, strict=True):
            assert torch.equal(got, want)


def test_compile_by_inductor_with_numbers_that_change():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def compiled(ref: torch.Tensor, policies: Any, x: float) -> tuple[torch.Tensor, ...]:
        return changing(ref, policies, weights=[x, 1 - x], temperature=x, divergence="jsd")

    for x in (0.6, 0.5, 0.4):
        expected = changing(REF, POLICIES, weights=[x, 1 - x], temperature=x, divergence="jsd")
        for got, want in zip(compiled(REF, POLICIES, x), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("option", "bad"),
    [
        ("temperature", -1.0), ("top_p", 1.5), ("min_p", -0.1), ("top_k", -1), ("position", -1),
        ("plausibility", 2.0), ("weights", [0.5, float("nan")]), ("divergence", "tv"),
        ("logit_scales", [1.0, 0.0, 1.0]),
    ],
)  # fmt: skip
def test_compiled_code_refuses_what_is_out_of_range(option, bad):
    def step(ref: torch.Tensor, policies: Any) -> torch.Tensor:
        arguments = {"weights": WEIGHTS, "seed": 1, option: bad}
        return mod_fused.sample(ref, policies, **arguments).tokens

    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="ValueError"):
        torch.compile(step, fullgraph=True, backend="eager")(REF, POLICIES)
    with pytest.raises(ValueError, match=option):  # where the graph may break
        torch.compile(step, backend="eager")(REF, POLICIES)


def test_compiled_code_refuses_a_number_that_leaves_the_range():
    def step(ref: torch.Tensor, policies: Any, x: float) -> torch.Tensor:
        return mod_fused.sample(ref, policies, WEIGHTS, seed=1, temperature=x).tokens

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager")
    for x in (0.5, 0.6, 0.7):
        assert torch.equal(compiled(REF, POLICIES, x), step(REF, POLICIES, x))
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature must be in"):
            compiled(REF, POLICIES, bad)


def test_symbols_that_are_off_switch_no_filter_on(monkeypatch):
    monkeypatch.setattr(tracing, "any_symbol", lambda numbers: True)
    mixing = check_mixture(REF, POLICIES, WEIGHTS)
    off = tracing.draw_without_symbols(check_draw(mixing, seed=1), REF)
    assert (off.temperature, *off.filters()) == (1.0, False, False, False)
    on = check_draw(mixing, seed=1, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1)
    assert tracing.draw_without_symbols(on, REF).filters() == (True, True, True)


def test_compile_works_in_a_fresh_process_with_the_default_backend():
    code = """
        import torch, mod_fused
        draw = torch.compile(
            lambda r, p: mod_fused.sample(r, [p], [1.0], seed=1).tokens,
            fullgraph=True,
            backend="aot_eager",
        )
        r, p = torch.zeros(2, 9), torch.eye(2, 9)
        assert torch.equal(draw(r, p), mod_fused.sample(r, [p], [1.0], seed=1).tokens)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
