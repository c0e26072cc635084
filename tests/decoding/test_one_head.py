"""One head for models that share it: the tokens of separate heads and the float64 oracle's log pi*,
or a refusal by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import shared_heads
import tiny_models as tiny
import torch
from shared_heads import (
    IDS,
    PROMPTS,
    ROWS,
    SCORERS,
    THIRD,
    agree,
    compare,
    counted,
    heads_of,
    sharing,
)
from torch import nn

from mod_fused import Ensemble, custom_generate, generate, reference
from mod_fused.guidance import Guidance, WorstCaseWeights

models, ensemble = shared_heads.models, shared_heads.ensemble


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


def last_layer(model: Any) -> Any:
    """The module whose output is the last hidden state."""
    return model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm


@pytest.mark.parametrize(
    ("at", "weights", "bad"),
    [
        (1, [[0.5, 0.25, 0.25], [0.0, 1.5, -0.25], [0.25, 0.0, 0.0]], float("nan")),
        (1, [[0.5, 0.25, 0.25], [0.0, 1.5, -0.25], [0.25, 0.0, 0.0]], float("inf")),
        # The reference's coefficient is rounding in the second row, not 0.
        (0, [[0.5, 0.25, 0.5], [0.7, 0.2, 0.1], [0.25, 0.0, 0.0]], float("nan")),
    ],
)
def test_a_model_is_looked_at_only_in_rows_where_it_counts(
    models: list[Any], at: int, weights: list[list[float]], bad: float
) -> None:
    assert (at == 0) == (1.0 - sum(weights[1]) not in (0.0, -0.25))
    hook = last_layer(models[at]).register_forward_hook(
        lambda module, args, hidden: hidden.index_fill(0, torch.tensor([1, 2]), bad)
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
