"""`generate`: the right distribution at every step, each row on its own, each end in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from tiny_models import by_hand, ids_of

from mod_fused import Ensemble, generate

PROMPTS = tiny.PROMPTS
WEIGHTS = [0.6, 0.7]


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    return tiny.three_models()


@pytest.mark.parametrize("policy", [1, 2])
def test_greedy_at_a_corner_is_the_policys_own_generate(policy: int) -> None:
    models = [tiny.llama(0), tiny.gpt2(1), tiny.llama(2, tiny.V + 9)]
    tokenizer = tiny.tokenizer(pad_token="<unk>", padding_side="left")
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    # The end is what the policy says first in the second row; the others get there later or never.
    first = tiny.teacher_forced(models[policy], ids_of(PROMPTS[1]), [0])[0]
    eos = int(first[: tiny.V].argmax())
    for model in models:
        model.generation_config.eos_token_id = eos
    expected = models[policy].generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=15,
        do_sample=False,
        suppress_tokens=list(range(tiny.V, tiny.V + 9)) if policy == 2 else None,
    )
    weights = [1.0, 0.0] if policy == 1 else [0.0, 1.0]
    out = generate(
        Ensemble(models, tokenizer), PROMPTS, weights=weights, do_sample=False, max_new_tokens=15
    )
    assert torch.equal(out.sequences, expected)
    assert out.lengths[1] == 1 and out.finish_reasons[1] == "eos"
    assert len({tuple(row) for row in out.tokens.tolist()}) == 3  # the rows say different things


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_a_batch_of_mixed_lengths_equals_one_by_one(ensemble: Ensemble, divergence: str) -> None:
    options: dict[str, Any] = {
        "divergence": divergence,
        "sequence_history": True,
        "max_new_tokens": 8,
        "top_k": 9,
    }
    weights = [[0.6, 0.7], [1.0, 0.0], [0.2, 0.3]]
    temperature = [1.5, 0.7, 1.0]
    together = generate(
        ensemble, PROMPTS, weights=weights, temperature=temperature, seed=[7, 8, 9], **options
    )
    assert len({tuple(row) for row in together.tokens.tolist()}) == 3
    for row in range(3):
        alone = generate(
            ensemble,
            PROMPTS[row],
            weights=weights[row],
            temperature=temperature[row],
            seed=[7 + row],
            **options,
        )
        assert torch.equal(alone.tokens[0], together.tokens[row])
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[row], atol=1e-4, rtol=0)
        assert alone.texts == together.texts[row : row + 1]


def test_a_row_does_not_depend_on_its_place_or_its_company(ensemble: Ensemble) -> None:
    order = [2, 0, 1]
    seeds = torch.tensor([5, -6, 2**62])
    first = generate(ensemble, PROMPTS, weights=WEIGHTS, seed=seeds)
    moved = generate(
        ensemble, [PROMPTS[i] for i in order], weights=WEIGHTS, seed=seeds[order].tolist()
    )
    assert torch.equal(moved.tokens, first.tokens[order])
    same_seed = generate(ensemble, [PROMPTS[0]] * 2, weights=WEIGHTS, seed=[5, 5])
    assert torch.equal(same_seed.tokens, first.tokens[[0, 0]])


def test_cached_equals_recomputed(ensemble: Ensemble) -> None:
    options: dict[str, Any] = {
        "weights": WEIGHTS,
        "divergence": "jeffrey",
        "seed": 3,
        "max_new_tokens": 8,
    }
    options["return_model_logprobs"] = True
    cached = generate(ensemble, PROMPTS, **options)
    recomputed = generate(ensemble, PROMPTS, use_cache=False, **options)
    assert torch.equal(cached.tokens, recomputed.tokens)
    torch.testing.assert_close(cached.model_logprobs, recomputed.model_logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "alpha:0.5", "jeffrey"])
@pytest.mark.parametrize("history", [False, True])
def test_log_probabilities_are_those_of_full_passes_and_the_oracle(
    ensemble: Ensemble, divergence: str, history: bool
) -> None:
    out = generate(
        ensemble,
        PROMPTS,
        weights=WEIGHTS,
        divergence=divergence,
        sequence_history=history,
        max_new_tokens=8,
        seed=0,
        return_model_logprobs=True,
    )
    for row, prompt in enumerate(PROMPTS):
        drawn, each = by_hand(
            ensemble.models,
            [ids_of(prompt)] * 3,
            out.tokens[row].tolist(),
            history,
            weights=WEIGHTS,
            divergence=divergence,
        )
        np.testing.assert_allclose(out.model_logprobs[row].numpy(), each, atol=1e-4)
        np.testing.assert_allclose(out.logprobs[row].numpy(), drawn, atol=1e-3)


def test_history_matters_from_the_second_token_except_for_reverse_kl(ensemble: Ensemble) -> None:
    for divergence in ("reverse_kl", "jsd"):
        runs = [
            generate(
                ensemble,
                PROMPTS,
                weights=WEIGHTS,
                divergence=divergence,
                sequence_history=history,
                mask_fn=lambda step, ids: torch.arange(tiny.V).expand(3, -1) == 3 + step,
                max_new_tokens=4,
            )
            for history in (False, True)
        ]
        assert torch.equal(runs[0].tokens, runs[1].tokens)  # the mask leaves one token
        difference = (runs[0].logprobs - runs[1].logprobs).abs()
        assert difference[:, 0].max() <= 1e-5
        assert (difference[:, 1:].amin() > 1e-2) == (divergence == "jsd")


def test_off_reverse_kl_what_the_reference_finds_implausible_is_excluded_by_default(
    ensemble: Ensemble,
) -> None:
    def last_logprobs(masked: bool = True, **options: Any) -> torch.Tensor:
        # The mask leaves the reference's least likely token: NaN where it is excluded.
        least = torch.zeros(3, tiny.V, dtype=torch.bool)
        least[torch.arange(3), worst] = True
        options |= {"mask_fn": lambda step, ids: least} if masked else {}
        out = generate(ensemble, PROMPTS, max_new_tokens=1, seed=1, **options)
        return out.logprobs[:, 0]

    reference = ensemble.models[0]
    logits = torch.cat([tiny.teacher_forced(reference, tiny.ids_of(p), [3]) for p in PROMPTS])
    worst = logits[:, : tiny.V].argmin(1)
    jsd: dict[str, Any] = {"weights": WEIGHTS, "divergence": "jsd"}
    cut = last_logprobs(False, **jsd, plausibility=1e-3)
    assert torch.equal(last_logprobs(False, **jsd), cut)
    assert not torch.equal(
        last_logprobs(False, **jsd), last_logprobs(False, **jsd, plausibility=None)
    )
    # A mask may leave nothing plausible: then there is no cut by default.
    assert last_logprobs(**jsd).isfinite().all()
    assert last_logprobs(**jsd, plausibility=0.2).isnan().all()
    assert last_logprobs(weights=WEIGHTS).isfinite().all()  # reverse KL has no cut
    assert last_logprobs(weights=WEIGHTS, plausibility=0.2).isnan().all()
    # One number for each prompt.
    each = last_logprobs(**jsd, plausibility=[0.2, 0.0, 0.2])
    assert each.isnan().tolist() == [True, False, True]
    # A corner is exactly its model: by row, with weights by row.
    for weights, corners in (([1.0, 0.0], [0, 1, 2]), ([[1.0, 0.0], WEIGHTS, WEIGHTS], [0])):
        auto, off, cut = (
            last_logprobs(False, **jsd | {"weights": weights}, plausibility=p)
            for p in ("auto", None, 0.5)
        )
        assert torch.equal(auto[corners], off[corners])
        assert torch.equal(auto, off) == (len(corners) == 3)
        assert not torch.equal(auto[corners], cut[corners])  # a number acts there, too
    with pytest.raises(ValueError, match="one number or B, None or 'auto', got 'off'"):
        last_logprobs(weights=WEIGHTS, plausibility="off")
    with pytest.raises(ValueError, match="plausibility_tensor must be between 0 and 2"):
        last_logprobs(weights=WEIGHTS, plausibility_tensor=7)


def test_each_model_may_have_its_own_prompts(ensemble: Ensemble) -> None:
    prompts = [PROMPTS, ["it is", "a red bird sat", "the"], ["fox", "then it", "cat and dog"]]
    options: dict[str, Any] = {
        "weights": WEIGHTS,
        "divergence": "forward_kl",
        "sequence_history": True,
        "seed": 1,
    }
    out = generate(ensemble, prompts, return_model_logprobs=True, **options)
    width = max(len(ids_of(p)) for p in PROMPTS)
    assert out.sequences.shape == (3, width + 20)
    for row in range(3):
        assert out.sequences[row, :width].tolist()[-len(ids_of(PROMPTS[row])) :] == ids_of(
            PROMPTS[row]
        )
        drawn, each = by_hand(
            ensemble.models,
            [ids_of(p[row]) for p in prompts],
            out.tokens[row].tolist(),
            True,
            weights=WEIGHTS,
            divergence="forward_kl",
        )
        np.testing.assert_allclose(out.model_logprobs[row].numpy(), each, atol=1e-4)
        np.testing.assert_allclose(out.logprobs[row].numpy(), drawn, atol=1e-3)
    as_ids = [ensemble.encode(prompts)[k] for k in range(2)]
    masks = [torch.ones_like(i) if m is None else m for i, m in zip(*as_ids, strict=True)]
    again = generate(ensemble, input_ids=as_ids[0], attention_mask=masks, **options)
    assert torch.equal(again.tokens, out.tokens)


def test_padded_vocabularies_are_cut_to_the_narrowest_or_to_vocab_size() -> None:
    def favours_padding(tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(tokens), 12)
        logits[:, 10:] = 50.0
        return logits

    prompt = torch.zeros(64, 1, dtype=torch.int64)
    two = Ensemble([lambda tokens: torch.zeros(len(tokens), 10), favours_padding])
    out = generate(
        two,
        input_ids=prompt,
        weights=[1.0],
        seed=0,
        max_new_tokens=4,
        return_model_logprobs=True,
    )
    assert int(out.tokens.max()) == 9
    torch.testing.assert_close(out.model_logprobs, torch.full((64, 4, 2), -np.log(10.0)).float())
    out = generate(two, input_ids=prompt, weights=[1.0], seed=0, max_new_tokens=4, vocab_size=4)
    assert int(out.tokens.max()) == 3
    torch.testing.assert_close(out.logprobs, torch.full((64, 4), -np.log(4.0)).float())


def test_without_a_reference_it_is_the_weighted_product_of_the_policies() -> None:
    models = [tiny.llama(0, eos=None), tiny.gpt2(1, eos=None)]
    out = generate(
        Ensemble([None, *models], tiny.tokenizer(eos_token=None)),
        PROMPTS[0],
        weights=[0.5, 0.8],
        seed=0,
        return_model_logprobs=True,
    )
    response = out.tokens[0].tolist()
    logs = [
        tiny.teacher_forced(m, ids_of(PROMPTS[0]), response).double().log_softmax(-1)
        for m in models
    ]
    expected = (0.5 * logs[0] + 0.8 * logs[1]).log_softmax(-1)[range(20), response]
    torch.testing.assert_close(out.logprobs[0].double(), expected, atol=1e-4, rtol=0)
    assert out.model_logprobs.shape == (1, 20, 2)


def splitmix64(state: int) -> int:
    """One step of SplitMix64 as int64."""
    mask = 2**64 - 1
    z = state = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z


def test_one_seed_gives_each_row_its_own() -> None:
    assert splitmix64(0) % 2**64 == 0xE220A8397B1DCDAF  # the published first value
    models = Ensemble([tiny.bigram(0), tiny.bigram(1)])
    options: dict[str, Any] = {"input_ids": torch.full((3, 1), 4), "weights": [0.5]}
    one = generate(models, seed=11, **options)
    each = generate(models, seed=[splitmix64(11 + row) for row in range(3)], **options)
    assert torch.equal(one.tokens, each.tokens)
    unsigned = generate(models, seed=[splitmix64(11 + r) % 2**64 for r in range(3)], **options)
    assert torch.equal(one.tokens, unsigned.tokens)
    assert len({tuple(row) for row in one.tokens.tolist()}) == 3


def test_without_a_seed_torchs_own_decides() -> None:
    models = Ensemble([tiny.bigram(0), tiny.bigram(1)])
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(generate(models, input_ids=torch.full((2, 1), 4), weights=[0.5]).tokens)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0][0], runs[0][1])
    # Each step draws new noise: one distribution, twenty tokens, not all the same.
    flat = Ensemble([lambda tokens: torch.zeros(len(tokens), 50)] * 2)
    tokens = generate(flat, input_ids=torch.full((1, 1), 4), weights=[0.5], seed=0).tokens
    assert len(set(tokens[0].tolist())) > 10


@pytest.mark.parametrize("packed", [False, True])
def test_a_mask_function_decides_what_may_come(packed: bool) -> None:
    seen: list[torch.Tensor] = []

    def no_repetition(step: int, sequences: torch.Tensor) -> torch.Tensor:
        seen.append(sequences.clone())
        allowed = torch.ones(len(sequences), 8, dtype=torch.bool).scatter(1, sequences, False)
        return (allowed * 2 ** torch.arange(8)).sum(1, keepdim=True).int() if packed else allowed

    models = Ensemble([lambda tokens: torch.zeros(len(tokens), 8)] * 2)
    out = generate(
        models,
        input_ids=torch.tensor([[0, 3], [2, 1]]),
        weights=[0.5],
        mask_fn=no_repetition,
        max_new_tokens=7,
        pad_token_id=0,
        seed=0,
    )
    assert [sorted(row) for row in out.sequences[:, :8].tolist()] == [list(range(8))] * 2
    assert out.finish_reasons == ["invalid"] * 2  # nothing is left for the seventh token
    assert out.lengths.tolist() == [6, 6] and out.logprobs[:, 6].isnan().all()
    assert all(torch.equal(s, out.sequences[:, : 2 + i]) for i, s in enumerate(seen))


def test_values_steer_as_the_formula_says() -> None:
    tables = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))

    def values(step: int, sequences: torch.Tensor) -> torch.Tensor:
        return tables[:, None].expand(2, len(sequences), 8).contiguous() * (step + 1)

    zeros = Ensemble([lambda tokens: torch.zeros(len(tokens), 8)])
    options: dict[str, Any] = {"input_ids": torch.zeros(2, 1, dtype=torch.int64), "seed": 0}
    out = generate(
        zeros,
        weights=[],
        value_fn=values,
        value_weights=[[1.0, 2.0], [-1.0, 0.5]],
        max_new_tokens=3,
        **options,
    )
    for row, v in enumerate(([1.0, 2.0], [-1.0, 0.5])):
        tilt = v[0] * tables[0] + v[1] * tables[1]
        expected = torch.stack([(tilt * (s + 1)).log_softmax(-1) for s in range(3)])
        torch.testing.assert_close(out.logprobs[row], expected[range(3), out.tokens[row].tolist()])

    out = generate(
        zeros,
        weights=[],
        value_fn=lambda step, ids: (torch.zeros(1, 2, 2), torch.tensor([[1, 2], [6, -1]])),
        max_new_tokens=30,
        **options,
    )
    assert set(out.tokens[0].tolist()) == {1, 2} and set(out.tokens[1].tolist()) == {6}


def test_parameters_may_differ_from_row_to_row_as_lists_or_tensors() -> None:
    models = Ensemble([tiny.bigram(0), tiny.bigram(1)])
    rows: dict[str, list[Any]] = {
        "weights": [[0.5], [1.5]],
        "temperature": [0.0, 2.0],
        "top_k": [0, 5],
        "top_p": [0.7, 1.0],
        "min_p": [0.0, 0.1],
        "seed": [3, 4],
    }
    options: dict[str, Any] = {"max_new_tokens": 15}
    ids = torch.tensor([[3], [4]])
    out = generate(models, input_ids=ids, **rows, **options)
    tensors = {name: torch.tensor(value) for name, value in rows.items()}
    assert torch.equal(generate(models, input_ids=ids, **tensors, **options).tokens, out.tokens)
    for row in range(2):
        alone = {name: value[row] for name, value in rows.items()} | {"seed": [rows["seed"][row]]}
        one = generate(models, input_ids=ids[row : row + 1], **alone, **options)
        assert torch.equal(one.tokens[0], out.tokens[row])
    greedy = generate(models, input_ids=ids, weights=rows["weights"], do_sample=False, **options)
    assert torch.equal(greedy.tokens[0], out.tokens[0])
    assert not torch.equal(greedy.tokens[1], out.tokens[1])


def test_log_probabilities_may_enter_a_loss() -> None:
    models = Ensemble([tiny.bigram(0), tiny.bigram(1)])
    out = generate(models, input_ids=torch.full((2, 1), 4), weights=[0.5], seed=0)
    scale = torch.ones((), requires_grad=True)
    (scale * out.logprobs).sum().backward()
    assert scale.grad == out.logprobs.sum()
    assert out.model_logprobs is None  # nobody asked for them


def test_callables_need_no_transformers() -> None:
    done = tiny.without_transformers(
        "import torch\n"
        "from mod_fused.decoding.generate import generate\n"
        "from mod_fused.decoding.ensemble import Ensemble\n"
        "step = lambda tokens: torch.eye(5)[(tokens[:, -1] + 1) % 5] * 100\n"
        "out = generate(Ensemble([step, step]), input_ids=torch.tensor([[0], [2]]),\n"
        "               weights=[0.5], max_new_tokens=4)\n"
        "print(out.tokens.tolist(), out.texts)\n"
    )
    assert done.stdout.strip() == "[[1, 2, 3, 4], [3, 4, 0, 1]] None", done.stderr
