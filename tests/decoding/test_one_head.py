"""One head for models that share it: the tokens of separate heads and the float64 oracle's log pi*,
or a refusal by name."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import small_models
import tiny_models as tiny
import torch
import transformers
from torch import nn
from transformers import GPT2DoubleHeadsModel, LlamaForCausalLM

from mod_fused import Ensemble, custom_generate, generate, reference, world
from mod_fused.decoding.architectures import text_config
from mod_fused.decoding.one_head import FAMILIES, OneHead
from mod_fused.decoding.stacked_layers import FewRows
from mod_fused.guidance import Guidance, WorstCaseWeights

PROMPTS = tiny.PROMPTS
IDS = torch.tensor([[2, 3, 4], [5, 6, 7], [8, 9, 10]])
THIRD = 1.0 / 3.0
ROWS = [[0.25, 0.0, 0.75], [1.5, -0.5, 0.5], [0.5, 0.0, 0.5]]


def sharing(*makers: Callable[..., Any], seed: int = 0) -> list[Any]:
    """Models whose heads are equal, each a tensor of its own."""
    models = [make(seed + i, eos=None) for i, make in enumerate(makers)]
    for model in models[1:]:
        with torch.no_grad():
            model.lm_head.weight.copy_(models[0].lm_head.weight)
    return models


@pytest.fixture(scope="module")
def models() -> list[Any]:
    """GPT-2's head is tied to its embedding, Llama's is not."""
    return sharing(tiny.llama, tiny.gpt2, tiny.llama, tiny.gpt2)


@pytest.fixture(scope="module")
def ensemble(models: list[Any]) -> Ensemble:
    return Ensemble(models, tiny.tokenizer(eos_token=None))


def heads_of(models: list[Any]) -> list[Any]:
    return [model.get_output_embeddings() for model in models]


def counted(modules: list[Any], call: Any, *args: Any, **options: Any) -> tuple[int, Any]:
    """How often the modules' weights multiply, and the result. (A hook would be refused.)"""
    seen: list[int] = []
    wanted = {id(getattr(module, "weight", module)) for module in modules}

    def counts(forward: Any) -> Any:
        @functools.wraps(forward)
        def counted_forward(self: Any, *given: Any, **named: Any) -> Any:
            seen.extend([1] * (id(getattr(self, "weight", self)) in wanted))
            return forward(self, *given, **named)

        return counted_forward

    with pytest.MonkeyPatch.context() as patch:
        for kind in {FewRows, *map(type, modules)}:
            patch.setattr(kind, "forward", counts(kind.forward))
        out = call(*args, **options)
    return len(seen), out


def agree(out: Any, separate: Any) -> None:
    for name in ("sequences", "tokens", "lengths", "valid", "seeds", "finish_reasons", "texts"):
        mine, theirs = getattr(out, name), getattr(separate, name)
        same = torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
        assert same, name
    for name in ("logprobs", "sequences_scores", "scores", "logits"):
        mine, theirs = getattr(out, name), getattr(separate, name)
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0, equal_nan=True)


def compare(ensemble: Ensemble, *prompts: Any, **options: Any) -> Any:
    """Decode with one head and with a head for each model; every step of the first has one product
    with a head."""
    heads = heads_of([m for m in ensemble.models if m is not None])
    many, separate = counted(heads, generate, ensemble, *prompts, **options)
    once, out = counted(heads, generate, ensemble, *prompts, one_head=True, **options)
    assert 0 < once <= many / 2
    agree(out, separate)
    return out


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(
    "weights",
    [
        [0.5, 0.25, 0.25],
        [0.2, 0.3, 0.1],
        [2.0, -1.5, 0.25],
        [0.0, -0.5, 0.0],
        ROWS,
        [[0.1, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]],
        torch.tensor([THIRD, THIRD, THIRD]),
        torch.tensor([[2.0, -1.5, 0.5]]).expand(3, 3),
    ],
    ids=str,
)
def test_tokens_are_those_of_separate_heads(
    ensemble: Ensemble, weights: Any, sampled: bool
) -> None:
    options: dict[str, Any] = {"do_sample": sampled, "max_new_tokens": 10, "seed": [3, 4, 2**40]}
    compare(ensemble, PROMPTS, weights=weights, num_return_sequences=1 + 6 * sampled, **options)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_any_number_of_policies_shares_a_head(count: int) -> None:
    models = sharing(*[tiny.llama] * (count + 1), seed=10)
    weights = [[0.3 * (-1) ** i + 0.1 * row for i in range(count)] for row in range(2)]
    compare(Ensemble(models), input_ids=IDS[:2], weights=weights, seed=1, num_return_sequences=5)
    if count > 1:
        without = Ensemble([None, *models[1:]])
        compare(without, input_ids=IDS[:2], weights=weights, seed=1, num_return_sequences=5)


def test_log_probabilities_are_the_float64_oracles(models: list[Any]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "seed": 2, "output_logits": True}
    out = generate(Ensemble(models), input_ids=IDS, weights=ROWS, one_head=True, **options)
    assert out.logits is not None
    doubles = [copy.deepcopy(model).double() for model in models]
    with torch.no_grad():
        logits = [
            model(out.sequences).logits[:, IDS.shape[1] - 1 : -1].numpy() for model in doubles
        ]
    for step, found in enumerate(out.logits):
        for row, weights in enumerate(ROWS):
            now = [x[row, step] for x in logits]
            expected = torch.from_numpy(reference.log_probs_row(now[0], now[1:], weights=weights))
            assert 0.5 * (found[row].double().exp() - expected.exp()).abs().sum() <= 2e-5


def even(step: int, sequences: torch.Tensor) -> torch.Tensor:
    allowed = torch.arange(tiny.V) % 2 == sequences[:, -1:] % 2
    return allowed


def likes(step: int, sequences: torch.Tensor) -> torch.Tensor:
    return torch.stack([tiny.TASTE[: tiny.V], -(tiny.TASTE[: tiny.V] ** 2)])[:, None].expand(
        2, len(sequences), tiny.V
    )


def likes_some(step: int, sequences: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([3, 9, 4, 12, 20]).expand(len(sequences), 5)
    return tiny.TASTE[ids][None].float(), ids


def swaps(step: int, sequences: torch.Tensor, *_: torch.Tensor) -> torch.Tensor | None:
    return torch.arange(len(sequences)).flip(0) if step == 3 else None


SCORERS = [tiny.llama(20, eos=None), tiny.gpt2(21, eos=None)]
COMPOSED: dict[str, dict[str, Any]] = {
    "logit_bias": {"logit_bias": [{3: 5.0}, {}, {4: -2.0, 9: 3.0}]},
    "repetition_penalty": {"repetition_penalty": [1.3, 1.0, 2.0]},
    "mask": {"mask_fn": even, "bad_words_ids": [[4], [5, 6]]},
    "values": {"value_fn": likes, "value_weights": [[0.5, 0.1], [2.0, 0.0], [1.0, 1.0]]},
    "candidates of values": {"value_fn": likes_some, "value_weights": [1.5]},
    "scorers": {"value_fn": Guidance(SCORERS), "value_weights": [0.5, -0.25]},
    "weighed scorers": {
        "value_fn": Guidance(SCORERS),
        "value_weights": WorstCaseWeights(2.0),
    },
    "filters": {"temperature": [0.7, 0.0, 2.0], "top_k": 12, "top_p": 0.9, "min_p": 0.01},
    "stop strings": {"stop_strings": ["fox", "cat"], "min_new_tokens": 2},
    "criteria": {"stopping_criteria": lambda ids, scores: scores[-1].amax(1) > -1.0},
    "scores": {"output_scores": True, "output_logits": True, "top_k": 5},
    "no plausibility": {"plausibility": None, "plausibility_tensor": 3},
    "history": {"sequence_history": True, "normalizer": "zero"},
    "no cache": {"use_cache": False},
    "resampling": {"resample_fn": swaps},
    "vocabulary": {"vocab_size": tiny.V - 5},
    "beams": {"num_beams": 3, "seed": None, "length_penalty": 0.5, "num_return_sequences": 2},
}


@pytest.mark.parametrize("name", COMPOSED)
def test_one_head_goes_with_everything_that_reads_the_mixture_alone(
    ensemble: Ensemble, name: str
) -> None:
    options: dict[str, Any] = {"weights": ROWS, "max_new_tokens": 8, "seed": 5}
    options |= {"num_return_sequences": 4} | COMPOSED[name]
    if name == "criteria":
        options["output_scores"] = True
    compare(ensemble, PROMPTS, **options)


def test_a_stream_shows_the_tokens(ensemble: Ensemble) -> None:
    shown: list[list[int]] = []
    out = generate(
        ensemble,
        PROMPTS,
        weights=ROWS,
        one_head=True,
        seed=1,
        streamer=lambda step, tokens: shown.append(tokens.tolist()),
    )
    assert torch.equal(torch.tensor(shown).T, out.tokens)


def test_two_calls_draw_the_tokens_of_one(ensemble: Ensemble) -> None:
    call: dict[str, Any] = {"weights": ROWS, "one_head": True}
    half = generate(ensemble, PROMPTS, max_new_tokens=5, seed=1, **call)
    rest = generate(
        ensemble,
        input_ids=half.sequences,
        attention_mask=half.attention_mask,
        max_new_tokens=5,
        seed=half.seeds,
        position=half.lengths,
        **call,
    )
    whole = generate(ensemble, PROMPTS, max_new_tokens=10, seed=1, weights=ROWS)
    assert torch.equal(torch.cat([half.tokens, rest.tokens], dim=1), whole.tokens)


def test_models_of_coefficient_0_do_not_run(models: list[Any]) -> None:
    def run(weights: Any, **options: Any) -> tuple[list[int], Any]:
        seen: list[int] = []
        hooks = [
            model.register_forward_pre_hook(lambda *_, i=i: seen.append(i))
            for i, model in enumerate(models)
        ]
        call: dict[str, Any] = {"input_ids": IDS, "weights": weights, "max_new_tokens": 2}
        out = generate(Ensemble(models), one_head=True, seed=1, **call, **options)
        for hook in hooks:
            hook.remove()
        return seen, out

    assert run([0.5, 0.0, 0.5])[0] == [1, 3, 1, 3]
    calls, _ = counted(heads_of(models), run, [0.0, 1.0, 0.0])
    assert calls == 2
    # Of one model there is nothing to mix.
    callables = Ensemble([tiny.bigram(0), tiny.bigram(1)])
    call: dict[str, Any] = {"input_ids": IDS, "weights": [1.0], "seed": 1}
    agree(generate(callables, one_head=True, **call), generate(callables, **call))
    wide = [tiny.llama(i, tiny.V + 40, eos=None) for i in range(2)]
    wide[1].lm_head.weight = wide[0].lm_head.weight
    # The vocabulary stays that of all models.
    other = Ensemble([wide[0], models[1], wide[1]])
    call = {"input_ids": IDS, "weights": [0.0, 0.6], "seed": 1, "num_return_sequences": 20}
    out = compare(other, output_logits=True, **call)
    assert out.logits[0].shape[1] == tiny.V


def test_a_model_is_looked_at_only_in_rows_where_it_counts(models: list[Any]) -> None:
    weights = [[0.5, 0.25, 0.25], [0.0, 1.5, -0.25], [0.25, 0.0, 0.0]]
    for bad in (float("nan"), float("inf")):
        hook = models[1].transformer.ln_f.register_forward_hook(
            lambda module, args, hidden, bad=bad: hidden.index_fill(0, torch.tensor([1, 2]), bad)
        )
        try:
            out = generate(Ensemble(models), input_ids=IDS, weights=weights, one_head=True, seed=1)
        finally:
            hook.remove()
        right = generate(Ensemble(models), input_ids=IDS, weights=weights, seed=1)
        assert out.valid.tolist() == [True, True, False]
        assert torch.equal(out.tokens[:2], right.tokens[:2])


def test_a_reference_whose_coefficient_is_rounding_is_not_looked_at(models: list[Any]) -> None:
    weights = [[0.5, 0.25, 0.5], [0.7, 0.2, 0.1], [0.25, 0.0, 0.0]]
    assert 1.0 - sum(weights[1]) != 0.0
    hook = models[0].model.norm.register_forward_hook(
        lambda module, args, hidden: hidden.index_fill(0, torch.tensor([1, 2]), float("nan"))
    )
    try:
        out = generate(Ensemble(models), input_ids=IDS, weights=weights, one_head=True, seed=1)
    finally:
        hook.remove()
    right = generate(Ensemble(models), input_ids=IDS, weights=weights, seed=1)
    assert out.valid.tolist() == [True, True, False]
    assert torch.equal(out.tokens[:2], right.tokens[:2])


def test_weights_beyond_float32_make_a_row_invalid(models: list[Any]) -> None:
    rows = [[0.5, 0.5, 0.25], [1e300, 0.5, 0.0], [3e38, 3e38, 0.0]]
    weights = torch.tensor(rows, dtype=torch.float64)
    flat = copy.deepcopy(models)  # whatever the weights, the logits are 0
    for model in flat:
        torch.nn.init.zeros_(model.lm_head.weight)
    for ensemble in (Ensemble(models), Ensemble(flat)):
        call: dict[str, Any] = {"input_ids": IDS, "weights": weights, "seed": 1}
        out = generate(ensemble, one_head=True, **call)
        assert out.valid.tolist() == [True, False, False]
        assert torch.equal(out.valid, generate(ensemble, **call).valid)


def test_a_bias_counts_once(models: list[Any]) -> None:
    biased = copy.deepcopy(models)
    bias = torch.randn(tiny.V, generator=torch.Generator().manual_seed(0))
    for model in biased:
        model.lm_head.bias = nn.Parameter(bias.clone())
    for weights in (ROWS, [0.2, 0.3, 0.1], torch.tensor([THIRD, THIRD, THIRD])):
        compare(Ensemble(biased), input_ids=IDS, weights=weights, seed=1)
    without = Ensemble([None, *biased[1:]])
    compare(without, input_ids=IDS, weights=[1.5, -0.75, 0.25], seed=1)
    with pytest.raises(ValueError, match="a bias, and the coefficients do not sum to one"):
        generate(without, input_ids=IDS, weights=[0.5, 0.25, 0.5], one_head=True)


def test_adapters_on_bases_of_their_own_share_an_untouched_head() -> None:
    peft = pytest.importorskip("peft")

    def adapted(seed: int, **options: Any) -> Any:
        config = peft.LoraConfig(
            **{"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **options}
        )
        model = peft.get_peft_model(tiny.llama(0, eos=None), config).eval()
        return tiny.vivid(model, seed) if seed is None else _with_adapter(model, seed)

    policies = [adapted(1), adapted(2)]
    ensemble = Ensemble([tiny.llama(0, eos=None), *policies])
    for weights in ([0.5, 0.5], [0.75, -0.5]):
        compare(ensemble, input_ids=IDS, weights=weights, seed=1, num_return_sequences=4)
    for options in (
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
    ):
        other = Ensemble([tiny.llama(0, eos=None), adapted(1, **options), policies[1]])
        with pytest.raises(ValueError, match="the head of policy 1 is a peft"):
            generate(other, input_ids=IDS, weights=[0.75, -0.5], one_head=True)
    merged = adapted(1, target_modules=["q_proj", "lm_head"]).merge_and_unload()
    with pytest.raises(ValueError, match="heads of policy 1 and policy 2 have different values"):
        generate(
            Ensemble([None, policies[0], merged]), input_ids=IDS, weights=[0.5, 0.5], one_head=True
        )


@pytest.mark.parametrize("forward", ["stacked", "separate"])
def test_adapters_of_one_base_share_its_head(forward: str) -> None:
    peft = pytest.importorskip("peft")
    targets = {"x": ["q_proj", "v_proj"], "y": ["up_proj"], "z": ["q_proj", "lm_head"]}
    model: Any = tiny.llama(0, eos=None)
    for name, layers in targets.items():
        config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=layers)
        if name == "x":
            model = peft.get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    ensemble = Ensemble.from_adapters(_with_adapter(model.eval(), 1), forward=forward)
    heads = heads_of(ensemble.models[:3])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1]])
    call: dict[str, Any] = {"input_ids": IDS, "attention_mask": mask, "seed": 1}
    call |= {"num_return_sequences": 4, "max_new_tokens": 6, "top_k": 15}
    for weights in ([0.75, -0.5, 0.0], [[0.5, 0.5, 0.0], [0.2, 0.0, 0.0], [0.7, 1.0, 0.0]]):
        call["weights"] = weights
        many, separate = counted(heads, generate, ensemble, **call)
        once, out = counted(heads, generate, ensemble, one_head=True, **call)
        agree(out, separate)
        assert (once, many) == (6, 6 if forward == "stacked" else 18)
    call["weights"] = [0.5, 0.25, 0.25]
    with pytest.raises(ValueError, match="the head of policy 3 is a mod_fused"):
        generate(ensemble, one_head=True, **call)
    agree(generate(ensemble, one_head="auto", **call), generate(ensemble, **call))


def _with_adapter(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def test_one_model_in_two_places(models: list[Any]) -> None:
    twice = Ensemble([models[0], models[1], models[1]])
    compare(twice, input_ids=IDS, weights=[0.75, -0.5], seed=1)


def test_transformers_own_loop_takes_it(models: list[Any]) -> None:
    first, *policies = models
    options: dict[str, Any] = {"custom_generate": custom_generate, "policies": policies}
    options |= {"weights": [0.5, -0.25, 0.25], "seed": 3, "do_sample": True, "top_k": 0}
    options |= {"max_new_tokens": 6}
    heads = heads_of(models)
    many, separate = counted(heads, first.generate, IDS, **options)
    once, tokens = counted(heads, first.generate, IDS, one_head=True, **options)
    assert torch.equal(tokens, separate) and (once, many) == (6, 24)


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


@contextmanager
def _where_it_runs(kind: str) -> Iterator[None]:
    """Skip a family that another version of transformers than the pinned one lacks or cannot run
    small."""
    pins = (Path(__file__).parents[2] / "requirements-dev.txt").read_text()
    pinned = f"transformers=={transformers.__version__}" in pins
    if kind not in small_models.kinds():
        pytest.skip("not in this version of transformers")
    try:
        yield
    except (AttributeError, ValueError) as error:
        if pinned:
            raise
        pytest.skip(f"this version of transformers cannot run it small: {error}")


def _pair(kind: str, **options: Any) -> list[Any]:
    """Two small models with equal heads; a bias is not 0, and a scale of logits not 1."""
    models = [small_models.small_model(kind, seed, **options) for seed in (1, 2)]
    heads = heads_of(models)
    with torch.no_grad():
        heads[1].weight.copy_(heads[0].weight)
        for head in heads:
            if head.bias is not None:
                head.bias.copy_(torch.linspace(-1.0, 1.0, len(head.bias)))
    for model in models:
        for owner, name in ((model, "logit_scale"), (model.config, "logits_scaling")):
            if kind != "minicpm3" and getattr(owner, name, None) is not None:
                setattr(owner, name, 0.4)
    return models


def _apart(models: list[Any], head: OneHead, coefficients: torch.Tensor) -> float:
    """Total variation between log pi* of separate heads, in float64, and that of one head."""
    ids = torch.randint(3, small_models.VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = [model(ids).logits[:, -1].double() for model in models]
        with head.bypassed():
            hidden = [model(ids).logits[:, -1] for model in models]
        found = head.logits(hidden).double().softmax(-1)
    expected = sum(c[:, None] * x for c, x in zip(coefficients.T, logits, strict=True))
    return float(0.5 * (expected.softmax(-1) - found).abs().sum(-1).max())


COEFFICIENTS = torch.tensor([[1.7, -0.7], [0.25, 0.75]], dtype=torch.float64)
CAPPED = ("beam", "gemma2", "nanochat", "vaultgemma")


SLOW = {"gemma3"}  # with the images that it reads a model is large


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in sorted(FAMILIES)],
)
def test_a_family_mixes_before_its_head_as_behind_it(kind: str) -> None:
    with _where_it_runs(kind):
        models = _pair(kind, **{"final_logit_softcapping": None} if kind in CAPPED else {})
        labelled = dict(zip("ab", models, strict=True))
        head = OneHead(labelled, COEFFICIENTS, torch.device("cpu"))
        assert _apart(models, head, COEFFICIENTS) <= 2e-5


@pytest.mark.parametrize("kind", CAPPED)
def test_a_soft_cap_is_refused_for_it_gives_another_mixture(kind: str) -> None:
    with _where_it_runs(kind):
        models = _pair(kind)
    with pytest.raises(ValueError, match="policy 1 .* has a soft-cap on its logits"):
        generate(Ensemble([None, *models]), input_ids=IDS, weights=[0.5, 0.5], one_head=True)
    caps = [text_config(model) for model in models]
    limits = [config.final_logit_softcapping for config in caps]
    for config in caps:
        config.final_logit_softcapping = None
    head = OneHead(dict(zip("ab", models, strict=True)), COEFFICIENTS, torch.device("cpu"))
    for config, limit in zip(caps, limits, strict=True):
        config.final_logit_softcapping = limit
    assert _apart(models, head, COEFFICIENTS) > 1e-3
