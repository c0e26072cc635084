"""One head: what is refused by name, and that nothing is left on the models."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import shared_heads
import small_models
import tiny_models as tiny
import torch
from shared_heads import (
    IDS,
    PROMPTS,
    ROWS,
    SCORERS,
    agree,
    counted,
    heads_of,
    sharing,
)
from torch import nn
from transformers import GPT2DoubleHeadsModel, LlamaForCausalLM

from mod_fused import Ensemble, generate, world
from mod_fused.decoding.one_head import OneHead
from mod_fused.guidance import Guidance

models, ensemble = shared_heads.models, shared_heads.ensemble


class Resamples:
    def resample(self, *_: Any) -> None: ...


REFUSED: dict[str, dict[str, Any]] = {
    "divergence": {"divergence": "jsd"},
    "logit_scales": {"logit_scales": [1.0, 0.5, 1.0, 1.0]},
    "plausibility": {"plausibility": 0.1},
    "return_model_logprobs": {"return_model_logprobs": True},
    "num_candidates": {"num_candidates": 2},
    "resample_fn": {"resample_fn": Resamples(), "num_return_sequences": 2},
    "value_fn": {"value_fn": Guidance(SCORERS, candidates=3), "value_weights": [1.0, 1.0]},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_every_models_logits_is_refused(ensemble: Ensemble, name: str) -> None:
    call: dict[str, Any] = {"weights": [0.2, 0.3, 0.1], "seed": 1, "max_new_tokens": 3}
    call |= REFUSED[name]

    def refused() -> None:
        with pytest.raises(ValueError, match=f"one_head=True is not possible: {name} needs"):
            generate(ensemble, PROMPTS, one_head=True, **call)

    assert counted(ensemble.models, refused)[0] == 0
    agree(generate(ensemble, PROMPTS, one_head="auto", **call), generate(ensemble, PROMPTS, **call))


def test_the_switch_takes_three_values(ensemble: Ensemble) -> None:
    for wrong in ("yes", None, 1):
        with pytest.raises(ValueError, match="one_head must be True, False or 'auto'"):
            generate(ensemble, PROMPTS, weights=[1.0, 0.0, 0.0], one_head=wrong)  # type: ignore
    heads, call = heads_of(ensemble.models), {"weights": [0.2, 0.3, 0.1], "max_new_tokens": 3}
    calls = [counted(heads, generate, ensemble, PROMPTS, one_head=x, **call)[0] for x in SWITCH]
    assert calls == [12, 12, 3, 3]


SWITCH = (False, False, True, "auto")


class Halved(LlamaForCausalLM):
    """Another class with the config of a known one."""


def _changed(change: Callable[[Any], Any]) -> list[Any]:
    models = sharing(tiny.llama, tiny.llama)
    changed = change(models[1])
    return [models[0], models[1] if changed is None else changed]


def _set(module: Any, name: str, value: Any) -> None:
    setattr(module, name, value)


def _of_another_class(model: Any) -> Any:
    made = Halved(model.config).eval()
    made.load_state_dict(model.state_dict())
    return made


DIFFERENT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "values": (
        lambda m: _set(m.lm_head, "weight", nn.Parameter(m.lm_head.weight.detach() * 1.0001)),
        "heads of the reference and policy 1 have different values of weight",
    ),
    "shape": (
        lambda m: tiny.llama(1, tiny.V + 3, eos=None),
        r"heads of the reference and policy 1 differ in shape: .*22, 32.* and .*25, 32",
    ),
    "dtype": (lambda m: m.lm_head.bfloat16() and None, "differ in dtype: torch.float32 and"),
    "bias": (
        lambda m: _set(m.lm_head, "bias", nn.Parameter(torch.zeros(tiny.V))),
        "differ: one of them has a bias",
    ),
    "class": (
        lambda m: _set(m, "lm_head", nn.Sequential(m.lm_head)),
        "the head of policy 1 is a torch.nn.modules.container.Sequential",
    ),
    "model class": (_of_another_class, r"policy 1 is a Halved \(llama\), which is not among"),
    "other class of the family": (
        lambda m: GPT2DoubleHeadsModel(tiny.gpt2(1).config).eval(),
        r"policy 1 is a GPT2DoubleHeadsModel \(gpt2\), which is not among",
    ),
    "architecture": (
        lambda m: small_models.small_model("recurrent_gemma", 1),
        r"policy 1 is a RecurrentGemmaForCausalLM \(recurrent_gemma\), which is not among",
    ),
    "callable": (lambda m: tiny.bigram(0), "policy 1 is a plain callable, which has no head"),
    "compiled": (lambda m: torch.compile(m), "policy 1 is compiled"),
    "compiled in place": (lambda m: m.compile(), "policy 1 is compiled"),
    "forward": (lambda m: _set(m, "forward", m.forward), "or its forward is not that of Llama"),
    "hook": (lambda m: m.register_forward_hook(print) and None, "policy 1 has a forward hook"),
    "hook on the head": (
        lambda m: m.lm_head.register_forward_hook(print) and None,
        "the head of policy 1 is a torch.nn.modules.linear.Linear, or changed, hooked",
    ),
    "hook before the head": (
        lambda m: m.lm_head.register_forward_pre_hook(print) and None,
        "the head of policy 1 is a torch.nn.modules.linear.Linear, or changed, hooked",
    ),
    "forward of the head": (
        lambda m: _set(m.lm_head, "forward", m.lm_head.forward),
        "the head of policy 1 is a torch.nn.modules.linear.Linear, or changed",
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_heads_that_differ_in_anything_are_refused(name: str) -> None:
    change, said = DIFFERENT[name]
    ensemble = Ensemble(_changed(change))

    def refused() -> None:
        with pytest.raises(ValueError, match=f"one_head=True is not possible: .*{said}"):
            generate(ensemble, input_ids=IDS, weights=[0.5], one_head=True)

    models = [m for m in ensemble.models if isinstance(m, nn.Module)]
    assert counted(models, refused)[0] == 0


def test_weights_changed_between_two_calls_are_seen(models: list[Any]) -> None:
    changed = copy.deepcopy(models)
    call: dict[str, Any] = {"input_ids": IDS, "weights": ROWS, "one_head": True}
    generate(Ensemble(changed), **call)
    changed[2].lm_head.weight.data[3, 4] += 1e-3
    with pytest.raises(ValueError, match="the reference and policy 2 have different values"):
        generate(Ensemble(changed), **call)


def test_weights_that_are_elsewhere_are_refused_and_hooks_of_accelerate_run() -> None:
    accelerate = pytest.importorskip("accelerate")
    models = sharing(tiny.llama, tiny.llama)
    accelerate.hooks.add_hook_to_module(
        models[0].lm_head, accelerate.hooks.AlignDevicesHook(execution_device="cpu")
    )
    call: dict[str, Any] = {"input_ids": IDS, "weights": [0.5], "seed": 1}
    agree(generate(Ensemble(models), one_head=True, **call), generate(Ensemble(models), **call))
    accelerate.cpu_offload(models[1], execution_device="cpu", offload_buffers=True)
    with pytest.raises(ValueError, match="the head of policy 1 is .* sharded or offloaded"):
        generate(Ensemble(models), input_ids=IDS, weights=[0.5], one_head=True)


def test_a_model_that_raises_is_left_as_it_was(models: list[Any]) -> None:
    before = [{**dict(m.named_modules()), "": None} for m in models]
    states = [vars(head).keys() for head in heads_of(models)]

    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    hook = models[2].model.norm.register_forward_hook(fails)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            generate(Ensemble(models), input_ids=IDS, weights=ROWS, one_head=True)
    finally:
        hook.remove()
    assert [{**dict(m.named_modules()), "": None} for m in models] == before
    assert [vars(head).keys() for head in heads_of(models)] == states


def test_other_threads_get_logits_meanwhile(models: list[Any]) -> None:
    call: dict[str, Any] = {"input_ids": IDS, "weights": ROWS, "max_new_tokens": 3, "seed": 1}
    expected = generate(Ensemble(models), **call)
    found: list[Any] = []

    def meanwhile(*_: Any) -> None:
        hook.remove()  # once
        for one_head in (False, True):
            thread = threading.Thread(
                target=lambda x=one_head: found.append(
                    generate(Ensemble(models), one_head=x, **call)
                )
            )
            thread.start()
            thread.join()

    hook = models[2].model.norm.register_forward_hook(meanwhile)
    found.append(generate(Ensemble(models), one_head=True, **call))
    assert len(found) == 3
    for out in found:
        agree(out, expected)
    assert all(type(head) is nn.Linear for head in heads_of(models))


def test_in_bfloat16_one_head_is_about_as_far_from_a_float32_head_as_separate_heads_are() -> None:
    ensemble = Ensemble.embedded(["helpful", "humorous"], dtype="bfloat16")
    models = ensemble.models
    for model in models[1:]:
        model.lm_head.weight = models[0].lm_head.weight
    out = generate(
        ensemble, world.prompts(32, seed=0), weights=[0.5, 0.5], max_new_tokens=24, seed=1
    )
    call = {"input_ids": out.sequences, "attention_mask": out.attention_mask}
    call["position_ids"] = (out.attention_mask.cumsum(1) - 1).clamp(min=0)
    for weights, far, near in (([0.5, 0.5], 0.0012, 0.0019), ([3.0, -2.0], 0.0072, 0.0025)):
        c = torch.tensor([[1.0 - sum(weights), *weights]], dtype=torch.float64)
        head = OneHead(dict(zip("abc", models, strict=True)), c, torch.device("cpu"))
        with torch.no_grad():
            logits = [model(**call).logits[:, -25:-1].flatten(0, 1) for model in models]
            with head.bypassed():
                hidden = [model(**call).logits[:, -25:-1].flatten(0, 1) for model in models]
            exact = [h.double() @ models[0].lm_head.weight.double().T for h in hidden]
            mixtures = [
                torch.stack([w * x.double() for w, x in zip(c[0], of, strict=True)]).sum(0)
                for of in (exact, logits)
            ] + [head.logits(hidden).double()]
        right, separate, one = (x.softmax(1) for x in mixtures)
        distances = [float(0.5 * (x - right).abs().sum(1).mean()) for x in (separate, one)]
        assert distances == pytest.approx([far, near], rel=0.3)


def test_decodes_that_overlap_leave_the_heads_in_their_places(models: list[Any]) -> None:
    labelled, c = {"a": models[0], "b": models[1]}, torch.ones(1, 2, dtype=torch.float64)
    first = OneHead(labelled, c, torch.device("cpu")).bypassed()
    with first:
        second = OneHead(labelled, c, torch.device("cpu")).bypassed()
        second.__enter__()
    with torch.no_grad():
        assert models[0](IDS).logits.shape[-1] == models[0].config.hidden_size
    second.__exit__(None, None, None)
    assert all(type(head) is nn.Linear for head in heads_of(models))
    assert models[0](IDS).logits.shape[-1] == tiny.V
