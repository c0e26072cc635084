"""Each recipe against its paper's formula, written out in float64 from the raw logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny_models as tiny
import torch
from cases import assert_matches_oracle, assert_tokens_are_the_oracle_s, normal

import mod_fused
from mod_fused import Ensemble, generate, recipes

BATCH, VOCAB = 6, 1100


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def contrast(expert: np.ndarray, score: np.ndarray, alpha: float) -> np.ndarray:
    """The score on the tokens of at least alpha times the expert's largest probability."""
    p = np.exp(log_softmax(expert))
    return np.where(p >= alpha * p.max(axis=-1, keepdims=True), score, -np.inf)


class Method(NamedTuple):
    call: Callable[..., dict[str, Any]]  # of logits or models
    score: Callable[..., np.ndarray]  # of raw logits float64: what the paper's softmax is taken of
    tensors: int
    positive: tuple[int, ...]  # the tensors of which a logit of -inf is defined: probability 0


METHODS = {
    "dexperts": Method(
        lambda b, e, a: recipes.dexperts(b, e, a, alpha=1.75),
        lambda b, e, a: b + 1.75 * (e - a),
        3,
        (0, 1),
    ),
    "proxy_tuning": Method(
        lambda m, t, u: recipes.proxy_tuning(m, t, u), lambda m, t, u: m + t - u, 3, (0, 1)
    ),
    "proxy_tuning_weaker": Method(
        lambda m, t, u: recipes.proxy_tuning(m, t, u, alpha=0.4),
        lambda m, t, u: m + 0.4 * (t - u),
        3,
        (0, 1),
    ),
    "contrastive_decoding": Method(
        lambda e, a: recipes.contrastive_decoding(e, a, alpha=0.02),
        lambda e, a: contrast(e, log_softmax(e) - log_softmax(a), 0.02),
        2,
        (0,),
    ),
    "contrastive_decoding_temperature": Method(
        lambda e, a: recipes.contrastive_decoding(e, a, amateur_temperature=0.5),
        lambda e, a: contrast(e, log_softmax(e) - log_softmax(a / 0.5), 0.1),
        2,
        (0,),
    ),
    "contrastive_decoding_beta": Method(
        lambda e, a: recipes.contrastive_decoding(e, a, alpha=0.01, beta=0.5),
        lambda e, a: contrast(e, 1.5 * e - 0.5 * a, 0.01),
        2,
        (0,),
    ),
    "classifier_free_guidance": Method(
        lambda u, c: recipes.classifier_free_guidance(u, c, gamma=1.5),
        lambda u, c: log_softmax(u) + 1.5 * (log_softmax(c) - log_softmax(u)),
        2,
        (1,),
    ),
    "realignment": Method(
        lambda s, a: recipes.realignment(s, a, lam=0.3), lambda s, a: 0.3 * a + 0.7 * s, 2, (0, 1)
    ),
    "realignment_beyond": Method(
        lambda s, a: recipes.realignment(s, a, lam=2.0), lambda s, a: 2.0 * a - s, 2, (1,)
    ),
    "genarm": Method(
        lambda b, r: recipes.genarm(b, [r], beta=0.8),
        lambda b, r: log_softmax(b) + log_softmax(r) / 0.8,
        2,
        (0, 1),
    ),
    "genarm_objectives": Method(
        lambda b, r, s: recipes.genarm(b, [r, s], beta=2.0, weights=[0.7, 1.4]),
        lambda b, r, s: log_softmax(b) + (0.7 * log_softmax(r) + 1.4 * log_softmax(s)) / 2.0,
        3,
        (0, 1, 2),
    ),
}
EACH = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def tensors_and_formula(
    method: Method, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[list[torch.Tensor], np.ndarray]:
    """Logits with -inf where the formula allows it, and the log-probabilities that it gives."""
    tensors = list(normal(seed, method.tensors, BATCH, VOCAB).mul(2.5).to(dtype).unbind(0))
    for i in method.positive:
        tensors[i][:, 10 * (i + 1) : 10 * (i + 1) + 7] = -torch.inf
        tensors[i][:, VOCAB // 2 :: 3 + i] = -torch.inf
    score = method.score(*(x.double().numpy() for x in tensors))
    assert not np.isnan(score).any() and (score == -np.inf).any()
    return tensors, log_softmax(score)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_probabilities_are_the_papers(op, method: Method, dtype: torch.dtype) -> None:
    tensors, expected = tensors_and_formula(method, 1, dtype)
    assert_matches_oracle(op.log_probs(**method.call(*tensors)), expected)


@EACH
def test_greedy_and_sampled_tokens_are_the_papers(op, method: Method) -> None:
    tensors, expected = tensors_and_formula(method, 2)
    recipe = method.call(*tensors)
    greedy = op.sample(**recipe, temperature=0.0)
    assert greedy.tokens.tolist() == expected.argmax(axis=-1).tolist()
    seeds = torch.arange(100, 100 + BATCH)
    for temperature in (1.0, 0.7):
        drawn = op.sample(**recipe, temperature=temperature, seed=seeds, position=3)
        assert drawn.valid.all()
        assert_tokens_are_the_oracle_s(
            drawn.tokens, expected, seeds, [3] * BATCH, temperature=temperature
        )
        chosen = expected[range(BATCH), drawn.tokens]
        np.testing.assert_allclose(drawn.logprobs.numpy(), chosen, atol=2e-5)


@EACH
def test_nothing_is_copied(method: Method) -> None:
    tensors = normal(3, method.tensors, 2, 50).unbind(0)
    recipe = method.call(*tensors)
    used = [x for x in [recipe["ref_logits"], *recipe["policy_logits"]] if x is not None]
    assert [id(x) for x in used] == [id(x) for x in tensors]


def test_a_logit_of_minus_infinity_under_a_negative_weight_excludes_its_token(op) -> None:
    base, expert, anti = normal(4, 3, 2, 60).unbind(0)
    anti[:, 7] = -torch.inf
    log_p = op.log_probs(**recipes.dexperts(base, expert, anti, alpha=1.0))
    assert (log_p[:, 7] == -torch.inf).all() and log_p[:, :7].isfinite().all()


def test_the_original_contrast_is_the_limit_of_a_large_beta(op) -> None:
    expert, amateur = normal(5, 2, 4, 300).unbind(0)
    original = op.sample(**recipes.contrastive_decoding(expert, amateur), temperature=0.0)
    limit = recipes.contrastive_decoding(expert, amateur, beta=1e4)
    assert torch.equal(op.sample(**limit, temperature=0.0).tokens, original.tokens)
    small = recipes.contrastive_decoding(expert, amateur, beta=0.0)
    assert not torch.equal(op.sample(**small, temperature=0.0).tokens, original.tokens)


@EACH
def test_models_in_place_of_logits_serve_generate(method: Method) -> None:
    bigrams = [tiny.bigram(seed) for seed in range(method.tensors)]
    models, options = recipes.for_generate(method.call(*bigrams))
    assert not {"ref_logits", "policy_logits"} & options.keys()
    prompt = torch.tensor([[3], [4], [5]])
    out = generate(Ensemble(models), input_ids=prompt, seed=1, max_new_tokens=5, **options)
    for step in range(5):
        so_far = out.sequences[:, : 1 + step]
        expected = log_softmax(method.score(*(b(so_far).double().numpy() for b in bigrams)))
        chosen = expected[range(3), out.tokens[:, step]]
        np.testing.assert_allclose(out.logprobs[:, step].numpy(), chosen, atol=2e-5)


def test_guidance_of_one_model_by_its_prompt() -> None:
    model = tiny.gpt2(3, eos=None)
    models, options = recipes.for_generate(
        recipes.classifier_free_guidance(model, model, gamma=2.0)
    )
    prompts = [["it"], ["the red fox saw it"]]
    ensemble = Ensemble(models, tiny.tokenizer(eos_token=None))
    out = generate(ensemble, prompts, seed=0, max_new_tokens=8, **options)
    response = out.tokens[0].tolist()
    without, given = (
        log_softmax(
            tiny.teacher_forced(model, [tiny.VOCAB[w] for w in p[0].split()], response)
            .double()
            .numpy()
        )
        for p in prompts
    )
    expected = log_softmax(without + 2.0 * (given - without))[range(8), response]
    np.testing.assert_allclose(out.logprobs[0].numpy(), expected, atol=1e-4)


X = torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recipes.dexperts(X, X, X, alpha=0.0), "alpha must be positive and finite, got 0"),
        (lambda: recipes.dexperts(X, X, X, alpha=-1), "alpha must be positive and finite, got -1"),
        (lambda: recipes.proxy_tuning(X, X, X, alpha=float("inf")), "alpha must be positive"),
        (lambda: recipes.proxy_tuning(X, X, X, alpha=float("nan")), "alpha must be positive"),
        (lambda: recipes.contrastive_decoding(X, X, alpha=0.0), r"alpha must be in \(0, 1\]"),
        (lambda: recipes.contrastive_decoding(X, X, alpha=1.5), r"alpha must be in \(0, 1\]"),
        (lambda: recipes.contrastive_decoding(X, X, beta=-0.5), "beta must be at least 0"),
        (
            lambda: recipes.contrastive_decoding(X, X, amateur_temperature=0),
            "amateur_temperature must be positive",
        ),
        (lambda: recipes.classifier_free_guidance(X, X, gamma=-1.0), "gamma must be at least 0"),
        (lambda: recipes.realignment(X, X, lam=float("nan")), "lam must be at least 0"),
        (lambda: recipes.genarm(X, [X], beta=0.0), "beta must be positive"),
        (lambda: recipes.genarm(X, [X, X], weights=[1.0]), r"per reward model \(2\), got 1"),
    ],
)
def test_numbers_out_of_range_are_value_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_other_misuse_is_refused_here_or_by_the_op(op) -> None:
    with pytest.raises(TypeError, match="alpha must be a number, got str"):
        recipes.dexperts(X, X, X, alpha="2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="weights must be a number, got NoneType"):
        recipes.genarm(X, [X], weights=[None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"policy_logits\[1\] must have as many rows"):
        op.sample(**recipes.dexperts(X, X, X[:1], alpha=1.0))
    with pytest.raises(ValueError, match="at most 8 policies, got 9"):
        op.sample(**recipes.genarm(X, [X] * 8))
    assert mod_fused.recipes is recipes


def test_the_soup_is_the_mean_of_the_parameters_and_goes_on_outside_the_simplex():
    models = Ensemble.embedded(dtype=torch.float32).models
    ref, *tuned = (dict(m.named_parameters()) for m in models)
    for weights in ([1.0, 0.0, 0.0], [0.25, 0.25, 0.5], [1.5, -0.5, 0.0], [1.0, 1.0, 1.0]):
        merged = dict(recipes.soup(models, weights).named_parameters())
        for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"):
            left = 1.0 - sum(weights)
            expected = left * ref[name].double()
            for w, policy in zip(weights, tuned, strict=True):
                expected = expected + w * policy[name].double()
            torch.testing.assert_close(merged[name].double(), expected, atol=1e-5, rtol=0)


def test_a_soup_of_bfloat16_is_rounded_once_and_leaves_its_models_alone():
    models = [torch.nn.Linear(8, 8, dtype=torch.bfloat16) for _ in range(3)]
    before = [{k: x.clone() for k, x in m.state_dict().items()} for m in models]
    merged = recipes.soup(models, [0.3, 0.45])
    for name, x in merged.state_dict().items():
        ref, one, two = (m.state_dict()[name].double() for m in models)
        exact = 0.25 * ref + 0.3 * one + 0.45 * two
        assert ((x.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6).all()
    for model, kept in zip(models, before, strict=True):
        assert all(torch.equal(model.state_dict()[k], x) for k, x in kept.items())
    assert all(map(torch.equal, recipes.soup(models[:1], []).parameters(), models[0].parameters()))


@pytest.mark.parametrize(
    ("models", "weights", "error", "said"),
    [
        ([], [], ValueError, "got none"),
        ([torch.nn.Linear(2, 2)] * 3, [1.0], ValueError, "2 finite numbers"),
        ([torch.nn.Linear(2, 2)] * 2, [float("nan")], ValueError, "finite"),
        ([torch.nn.Linear(2, 2)] * 2, ["1"], TypeError, "weights"),
        ([torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)], [1.0], ValueError, "'bias'"),
        ([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False)], [1.0], ValueError, "'bias'"),
        ([torch.nn.Linear(2, 2), torch.nn.Bilinear(2, 2, 2)], [1.0], ValueError, "got Bilinear"),
        ([None, torch.nn.Linear(2, 2)], [1.0], TypeError, "torch modules"),
    ],
)
def test_models_that_make_no_soup_are_refused(models, weights, error, said):
    with pytest.raises(error, match=said):
        recipes.soup(models, weights)
