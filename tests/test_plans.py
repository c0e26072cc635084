"""`mod_fused.plan`: a call checked once and made often, beside `mod_fused.sample`."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from calls import DRAWS, IDS, MIXTURES, POLICIES, REF, WEIGHTS, B, Recorder, V, poisoned
from cases import normal

import mod_fused
from mod_fused import Sample, ops, plans, workspace_size

CALLS = [("lists", draw) for draw in DRAWS]
CALLS += [(mixture, "numbers") for mixture in MIXTURES if mixture != "lists"]
CALLS += [(m, "tensors") for m in ("stacked", "own_mass", "everything_dense", "sparse_zero")]
CALLS += [("sparse_zero", "sparse_bias"), ("weights_per_row", "bias")]
BOTH = {"return_model_logprobs": True, "return_proposal_logprobs": True}


def cloned(tree: Any, device: str = "cpu") -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to(device, copy=True), tree)


def arguments(mixture: str, draw: str, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `sample` in tensors of their own."""
    args, kwargs = cloned(MIXTURES[mixture], device)
    kwargs |= cloned(DRAWS[draw], device)
    if kwargs.get("mask") is not None and "vocab_size" in kwargs:
        kwargs["mask"] = kwargs["mask"][:, : kwargs["vocab_size"]]
    return args, kwargs


def change(args: Any, kwargs: dict[str, Any]) -> None:
    """Other contents in all tensors."""

    def changed(x: torch.Tensor) -> None:
        if x.dtype == torch.bool:
            x[:, ::2] = False
        elif x.dtype == torch.int32:
            x.fill_(0x55555555)
        elif x.dtype == torch.int64 and x.dim() == 1 and x.shape[0] == B:
            x += 1
        elif x.dim() == 1 or x.shape[-1] <= 4:
            x.copy_(x.flip(-1) if x.dtype == torch.int64 else x * 0.9)
        else:
            x.copy_(x.roll(1, -1))

    torch.utils._pytree.tree_map_only(torch.Tensor, changed, (args, kwargs))


def bits(result: Sample) -> list[bytes | None]:
    return [None if x is None else x.cpu().numpy().tobytes() for x in result]


@pytest.mark.parametrize(("mixture", "draw"), CALLS)
def test_it_draws_what_sample_draws_of_other_contents_too(op, mixture, draw):
    args, kwargs = arguments(mixture, draw, op.device)
    kwargs |= {"backend": op.backend, **(BOTH if draw != "plain" else {})}
    step = mod_fused.plan(*args, **kwargs)
    assert step.backend == op.backend
    seen = set()
    for _ in range(2):
        expected = mod_fused.sample(*cloned(args, op.device), **cloned(kwargs, op.device))
        assert step() is step.out
        assert bits(step.out) == bits(expected) and expected.valid.any()
        seen.add(tuple(bits(expected)[:2]))
        change(args, kwargs)
    assert len(seen) == 2  # the contents counted


def test_numbers_of_a_call_are_for_it_alone(op):
    step = mod_fused.plan(
        REF.to(op.device), cloned(POLICIES, op.device), WEIGHTS, seed=5, position=3, top_k=40,
        backend=op.backend,
    )  # fmt: skip
    numbers: list[dict[str, Any]] = [
        {"position": 2**63 - 1}, {}, {"seed": 2**64 - 1, "position": 0}, {"seed": -(2**63)}, {},
        {"seed": np.int64(7), "position": np.int32(4)},
    ]  # fmt: skip
    seen = set()
    for given in numbers:
        expected = mod_fused.sample(
            REF.to(op.device), cloned(POLICIES, op.device), WEIGHTS, top_k=40, backend=op.backend,
            **{"seed": 5, "position": 3, **given},
        )  # fmt: skip
        assert bits(step(**given)) == bits(expected)
        seen.add(tuple(expected.tokens.tolist()))
    assert len(seen) > 2


def test_it_draws_seeds_for_every_call_as_sample_does(op):
    args = (REF.to(op.device), cloned(POLICIES, op.device), WEIGHTS)
    torch.manual_seed(3)
    expected = [bits(mod_fused.sample(*args, backend=op.backend)) for _ in range(3)]
    torch.manual_seed(3)
    step = mod_fused.plan(*args, backend=op.backend)  # itself it draws nothing
    assert [bits(step()) for _ in range(3)] == expected
    assert len({x[0] for x in expected}) > 1


def test_its_memory_is_its_own_or_the_caller_s(op):
    args = (REF.to(op.device), cloned(POLICIES, op.device), WEIGHTS)
    kwargs = {"seed": 1, "top_p": 0.9, "backend": op.backend}
    step = mod_fused.plan(*args, **kwargs)
    needs = op.backend == "triton"
    assert (step.workspace is not None) == needs
    assert step.out.model_logprobs is None and step.out.proposal_logprobs is None
    workspace = torch.zeros(workspace_size(B, V, 2), dtype=torch.uint8, device=op.device)
    outs = [poisoned(B, 3, op.device, True) for _ in range(2)]
    first, second = (
        mod_fused.plan(*args, **kwargs, **BOTH, out=out, workspace=workspace, divergence=kind)
        for out, kind in zip(outs, ("jsd", "reverse_kl"), strict=True)
    )
    assert first.out is outs[0] and first.workspace is workspace
    other = {"divergence": "forward_kl", "backend": op.backend, "seed": 2}
    for _ in range(2):  # one workspace for two plans and another call
        assert first() is outs[0] and second() is outs[1]
        mod_fused.sample(
            args[0][:1], [x[:1] for x in args[1]], WEIGHTS, workspace=workspace, **other
        )
        for out, kind in zip(outs, ("jsd", "reverse_kl"), strict=True):
            assert bits(out) == bits(mod_fused.sample(*args, **kwargs, **BOTH, divergence=kind))
            for x in out:
                x.fill_(1)


def test_a_batch_of_no_rows(op):
    empty = torch.empty(0, 9, device=op.device)
    step = mod_fused.plan(empty, [empty], [0.5], backend=op.backend)
    assert step().tokens.shape == (0,)


def test_a_call_checks_nothing_and_is_one_op(monkeypatch):
    pytest.importorskip("mod_fused._cpu")
    step = mod_fused.plan(REF, POLICIES, WEIGHTS, seed=1, top_k=5, backend="cpu", **BOTH)
    expected = bits(mod_fused.sample(REF, POLICIES, WEIGHTS, seed=1, top_k=5, position=2, **BOTH))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("checked again")

    for module in (plans, ops):
        for name in ("check_mixture", "check_draw", "check_memory", "choose"):
            monkeypatch.setattr(module, name, refuse)
    with Recorder() as recorder:
        assert bits(step(position=2)) == expected
    assert [str(func) for func, _, _ in recorder.calls] == ["mod_fused.sample_cpu_out.default"]


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "negative": ({"position": -1}, ValueError, r"position must be in \[0, 2\^63\), got -1"),
    "large": ({"position": 2**63}, ValueError, r"position must be in \[0, 2\^63\), got"),
    "fraction": ({"position": 1.5}, TypeError, "position must be an integer, got float 1.5"),
    "bool": ({"position": True}, TypeError, "position must be a number, got bool"),
    "list": ({"position": [1, 2, 3]}, TypeError, "position must be a number, got list"),
    "tensor": ({"seed": torch.arange(3)}, TypeError, "seed must be a number, got Tensor"),
    "beyond": ({"seed": 2**64}, ValueError, "seed must fit in 64 bits, got"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_call_refuses_what_is_no_number_in_range(case):
    given, error, message = REFUSED[case]
    step = mod_fused.plan(REF, POLICIES, WEIGHTS, seed=1)
    before = bits(step())
    step.out.tokens.fill_(-7)
    with pytest.raises(error, match=message):
        step(**given)
    assert (step.out.tokens == -7).all()
    assert bits(step()) == before


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        (
            "seed",
            None,
            "seed must be None for a plan that draws seeds: make the plan",
        ),
        ("seed", torch.arange(B), "seed must be None for a plan that has a Tensor"),
        ("seed", [1, 2, 3], "seed must be None for a plan that has a list"),
        ("position", torch.arange(B), "position must be None for a plan that has a Tensor"),
        ("position", [1, 2, 3], "position must be None for a plan that has a list"),
    ],
)
def test_a_call_refuses_numbers_that_would_count_for_nothing(name, own, message):
    step = mod_fused.plan(REF, POLICIES, WEIGHTS, **{"seed": 1, name: own})
    with pytest.raises(ValueError, match=message):
        step(**{name: 1})


def moved(x: torch.Tensor) -> None:
    x.set_(x.clone())


MOVES: dict[str, Any] = {
    "ref_logits": lambda t: moved(t["args"][0]),
    r"policy_logits\[1\]": lambda t: setattr(t["args"][1][1], "data", t["args"][1][1].clone()),
    "weights": lambda t: moved(t["args"][2]),
    "mask": lambda t: t["mask"].untyped_storage().resize_(0),
    "bias_ids": lambda t: moved(t["bias_ids"]),
    "bias": lambda t: t["bias"].resize_(B, 3),
    "seed": lambda t: t["seed"].resize_(10 * B),
    "out.logprobs": lambda t: moved(t["out"].logprobs),
    "workspace": lambda t: moved(t["workspace"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_a_call_refuses_a_tensor_that_has_moved_or_another_size(name):
    args = (REF.clone(), cloned(POLICIES), torch.tensor(WEIGHTS))
    tensors: dict[str, Any] = {
        "mask": torch.ones(B, V, dtype=torch.bool),
        "bias": normal(9, B, 4),
        "bias_ids": IDS.clone(),
        "seed": torch.arange(B),
        "out": poisoned(B, None, "cpu"),
        "workspace": torch.zeros(workspace_size(B, V, 2) + 1024, dtype=torch.uint8),
    }
    step = mod_fused.plan(*args, **tensors)
    kept = step().tokens.clone()
    MOVES[name]({"args": args, **tensors})
    tensors["out"].tokens.fill_(-7)
    with pytest.raises(ValueError, match=f"^{name} must keep its memory and its .* elements"):
        step()
    assert (tensors["out"].tokens == -7).all() and (kept >= 0).all()


WRONG: dict[str, dict[str, Any]] = {
    "weights": {"weights": [0.5]},
    "divergence": {"divergence": "tv"},
    "values": {"value_ids": IDS},
    "top_p": {"top_p": 1.5},
    "position": {"position": None},
    "seed": {"seed": [1]},
    "backend": {"backend": "numpy"},
    "out": {"out": poisoned(B + 1, None, "cpu")},
    "log-probabilities": {"out": poisoned(B, None, "cpu"), "return_model_logprobs": True},
    "workspace": {"workspace": torch.zeros(3)},
}


@pytest.mark.parametrize("name", WRONG)
def test_it_refuses_what_sample_refuses_with_the_same_words(name):
    given = {"ref_logits": REF, "policy_logits": POLICIES, "weights": WEIGHTS, "seed": 1}
    errors = []
    for function in (mod_fused.sample, mod_fused.plan):
        with pytest.raises((ValueError, TypeError)) as caught:
            function(**given | WRONG[name])
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


def test_shards_of_a_vocabulary_are_refused():
    with pytest.raises(ValueError, match="^group must be None for a plan"):
        mod_fused.plan(REF, POLICIES, WEIGHTS, seed=1, group="any")


def test_it_has_the_arguments_of_sample():
    planned, called = map(inspect.signature, (mod_fused.plan, mod_fused.sample))
    assert planned.parameters == called.parameters
    with pytest.raises(TypeError, match="unexpected keyword argument 'top_q'"):
        mod_fused.plan(REF, POLICIES, WEIGHTS, top_q=0.5)  # type: ignore[call-arg]


def test_it_is_not_copied():
    step = mod_fused.plan(REF, POLICIES, WEIGHTS, seed=1)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a Plan cannot be copied or pickled"):
            copied(step)


def test_a_plan_of_inference_mode_is_called_outside():
    ids = {"bias": normal(9, B, 4), "bias_ids": IDS}
    with torch.inference_mode():
        step = mod_fused.plan(REF, POLICIES, WEIGHTS, **ids)
    torch.manual_seed(1)
    expected = bits(mod_fused.sample(REF, POLICIES, WEIGHTS, **ids))
    torch.manual_seed(1)
    assert bits(step()) == expected


def test_compiled_code_breaks_at_a_plan_or_refuses_it():
    step = mod_fused.plan(REF, POLICIES, WEIGHTS, seed=1)

    def call(x: torch.Tensor) -> torch.Tensor:
        return step(position=2).tokens + x

    def make(x: torch.Tensor) -> torch.Tensor:
        return mod_fused.plan(REF, POLICIES, WEIGHTS, seed=1)(position=2).tokens + x

    expected = mod_fused.sample(REF, POLICIES, WEIGHTS, seed=1, position=2).tokens + 1
    for function in (call, make):
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="eager")
        for _ in range(2):
            assert torch.equal(compiled(torch.ones((), dtype=torch.int64)), expected)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="a plan cannot be"):
            torch.compile(function, fullgraph=True, backend="eager")(torch.ones(()))
