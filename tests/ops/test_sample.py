"""Draws: their statistics, what they may depend on, and the tokens themselves."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from cases import (
    DIVERGENCES,
    assert_proposal_logprobs_are_the_oracle_s,
    assert_tokens_are_the_oracle_s,
    logits,
    normal,
)
from make_golden import PATH, POSITIONS, SEEDS, mixture_inputs, mixture_options, tail_log_probs
from scipy import stats

from mod_fused import reference

pytestmark = pytest.mark.sanitized

INF = math.inf
GOLDEN = json.loads(PATH.read_text())


def many_draws(op, row, count, *, chunk=2048, **kwargs):
    """`count` draws from pi* = softmax(row [V]), at positions 0, 1, ... of one seed."""
    tokens = []
    for start in range(0, count, chunk):
        rows = min(chunk, count - start)
        position = torch.arange(start, start + rows)
        seed = torch.full((rows,), 77)
        drawn = op.sample(
            None, [row.expand(rows, -1)], [1.0], seed=seed, position=position, **kwargs
        )
        assert drawn.valid.all()
        tokens.append(drawn.tokens)
    return torch.cat(tokens).numpy()


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_draws_follow_the_distribution_over_the_full_vocabulary(op):
    # Chi-squared over every token of two tiles, those expected fewer than 5 times pooled.
    # False-alarm rate 1e-6.
    row = normal(41, 1100)
    p = np.exp(reference.log_softmax(reference.to_float64(row)))
    count = 1 << 14
    seen = np.bincount(many_draws(op, row, count), minlength=1100)
    rare = p * count < 5.0
    expected = np.append(p[~rare], p[rare].sum()) * count
    observed = np.append(seen[~rare], seen[rare].sum())
    assert stats.chisquare(observed, expected).pvalue > 1e-6


def test_the_tail_table_holds_as_many_draws_as_the_tail_has_mass():
    # z-test over 4,194,304 draws of 2047 tokens 18 nats down (table made by the float64 oracle).
    # False-alarm rate 6e-7.
    tail = GOLDEN["tail"]
    mass = 1.0 - math.exp(tail_log_probs()[tail["head"]])
    mean = tail["draws"] * mass
    assert mean > 100
    assert abs(len(tail["draws_of_tail"]) - mean) <= 5.0 * math.sqrt(mean)
    assert {token // 1024 for _, token in tail["draws_of_tail"]} == {0, 1}


@pytest.mark.slow
def test_tokens_18_nats_down_are_drawn_exactly_when_their_turn_comes(op):
    # Every draw of the 4,194,304 that a tail token wins, and others that none does. A uniform of 24
    # bits draws no such token, or too many. GPU backends can afford all draws.
    tail = GOLDEN["tail"]
    expected = dict(tail["draws_of_tail"])
    step = {"torch": 4099, "cpu": 67}.get(op.backend, 1)
    positions = range(0, tail["draws"], step)
    positions = torch.tensor(sorted({*positions, *expected}))
    row = torch.from_numpy(tail_log_probs()).float()
    for chunk in positions.split(2048):
        seed = torch.full((len(chunk),), tail["seed"])
        tokens = op.sample(
            None, [row.expand(len(chunk), -1)], [1.0], seed=seed, position=chunk
        ).tokens
        assert tokens.tolist() == [expected.get(n, tail["head"]) for n in chunk.tolist()]


@pytest.mark.parametrize("case", GOLDEN["tokens"], ids=lambda c: f"{c['divergence']}-{c['vocab']}")
def test_golden_tokens(op, case):
    assert GOLDEN["scheme_version"] == reference.SCHEME_VERSION
    drawn = op.sample(
        *mixture_inputs(case), **mixture_options(case), **case["filters"],
        seed=torch.tensor(SEEDS), position=torch.tensor(POSITIONS),
    )  # fmt: skip
    pairs = zip(case["tokens"], drawn.tokens.tolist(), strict=True)
    assert [(want, got) for want, got in pairs if want is not None and want != got] == []
    assert case["tokens"].count(None) <= 1


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.slow
def test_tokens_and_their_log_probabilities_are_the_oracle_s(op, divergence):
    ref, policies = logits(42, 40, 2500, 2, kind="typical", excluded=0.05)
    weights, scales = [0.5, 0.25], [1.0, 0.75, 1.25]
    seeds, positions = torch.arange(40) * 7919 - 1000, torch.arange(40) ** 5
    drawn = op.sample(
        ref, policies, weights, divergence=divergence, logit_scales=scales, seed=seeds,
        position=positions, return_model_logprobs=True,
    )  # fmt: skip
    log_p = reference.log_probs(ref, policies, weights, divergence=divergence, logit_scales=scales)
    assert drawn.valid.all() and drawn.valid.dtype == torch.bool
    assert drawn.tokens.dtype == torch.int64 and drawn.logprobs.dtype == torch.float32
    assert_tokens_are_the_oracle_s(drawn.tokens, log_p, seeds, positions)
    at = np.arange(40), drawn.tokens.numpy()
    assert np.abs(drawn.logprobs.numpy() - log_p[at]).max() <= 1e-4
    assert drawn.model_logprobs.shape == (40, 3) and drawn.model_logprobs.dtype == torch.float32
    for column, (x, scale) in enumerate(zip([ref, *policies], scales, strict=True)):
        expected = reference.log_softmax(reference.to_float64(x) * scale)[at]
        assert np.abs(drawn.model_logprobs[:, column].numpy() - expected).max() <= 1e-4


@pytest.mark.parametrize("normalizer", ["exact", "zero"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_proposal_logprobs_are_log_pi_without_filters_and_0_at_temperature_0(
    op, divergence, normalizer
):
    ref, policies = logits(41, 6, 2100, 2, kind="typical")
    ref[1] += 1000.0  # log-linear sums begin at another level
    options = {"divergence": divergence, "normalizer": normalizer, "seed": 3}
    plain = op.sample(ref, policies, [0.4, 0.3], **options)
    drawn = op.sample(ref, policies, [0.4, 0.3], **options, return_proposal_logprobs=True)
    assert plain.proposal_logprobs is None and torch.equal(plain.tokens, drawn.tokens)
    assert torch.equal(plain.logprobs, drawn.logprobs) and drawn.valid.all()
    torch.testing.assert_close(drawn.proposal_logprobs, drawn.logprobs, atol=1e-6, rtol=1e-5)
    options |= {"temperature": 0.0, "top_p": 0.5, "return_proposal_logprobs": True}
    assert not op.sample(ref, policies, [0.4, 0.3], **options).proposal_logprobs.any()


@pytest.mark.parametrize("temperature", [1e-3, 0.05, 0.3, 30.0, 1e6])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.5}])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_proposal_logprobs_at_any_temperature(op, divergence, filters, temperature):
    ref, policies = logits(42, 8, 1500, 1, kind="apart")
    log_p = reference.log_probs(ref, policies, [0.5], divergence=divergence)
    filters = {**filters, "temperature": temperature}
    options = {"divergence": divergence, "seed": 7, "return_proposal_logprobs": True}
    drawn = op.sample(ref, policies, [0.5], **options, **filters)
    bound = 1e-4 * max(1.0, 0.1 / temperature)  # the keys' rounding grows by 1 / T
    assert_proposal_logprobs_are_the_oracle_s(drawn, log_p, bound, **filters)


def test_model_logprobs_without_a_reference_and_only_when_asked(op):
    _, policies = logits(51, 4, 700, 2)
    drawn = op.sample(None, policies, [0.5, 0.0], seed=1, return_model_logprobs=True)
    at = np.arange(4), drawn.tokens.numpy()
    for column, x in enumerate(policies):  # the one of weight 0 too
        expected = reference.log_softmax(reference.to_float64(x))[at]
        assert np.abs(drawn.model_logprobs[:, column].numpy() - expected).max() <= 1e-4
    assert drawn.model_logprobs.shape == (4, 2)
    plain = op.sample(None, policies, [0.5, 0.0], seed=1)
    assert plain.model_logprobs is None and torch.equal(plain.tokens, drawn.tokens)


# --- seeds and positions --------------------------------------------------------------------------


def test_an_integer_seed_gives_row_b_the_seed_splitmix64_of_seed_plus_b(op):
    row = normal(43, 1500).expand(9, -1)
    for seed in (0, 5, -5, 2**63 - 4):
        tokens = op.sample(row, [row], [0.5], seed=seed).tokens
        seeds = torch.tensor(reference.row_seeds(seed, 9))
        assert torch.equal(tokens, op.sample(row, [row], [0.5], seed=seeds).tokens)
        assert torch.equal(tokens, op.sample(row, [row], [0.5], seed=seeds.tolist()).tokens)
        assert len(set(tokens.tolist())) > 4  # equal prompts differ


def test_every_row_uses_its_own_seed_and_permuted_rows_give_permuted_tokens(op):
    ref, policies = logits(44, 16, 1500, 1)
    seeds, positions = torch.arange(100, 116), torch.arange(16) % 3
    tokens = op.sample(ref, policies, [0.5], seed=seeds, position=positions).tokens
    order = torch.from_numpy(np.random.default_rng(44).permutation(16))
    permuted = op.sample(
        ref[order], [policies[0][order]], [0.5], seed=seeds[order], position=positions[order]
    )
    assert torch.equal(permuted.tokens, tokens[order])
    flat = torch.zeros(64, 1500)
    drawn = op.sample(flat, [flat], [0.5], seed=torch.arange(64)).tokens.tolist()
    assert len(set(drawn)) > 50
    assert drawn == [reference.race(np.ones(1500), seed) for seed in range(64)]


def test_all_64_bits_of_seed_and_position_count(op):
    flat = torch.zeros(8, 3000)
    big = torch.tensor([0, 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**33])
    seeds = torch.tensor([0, 1, -1, 2**32, -(2**32), 2**62, -(2**63), 2**33])
    by_position = op.sample(flat, [flat], [1.0], seed=torch.zeros(8).long(), position=big).tokens
    by_seed = op.sample(flat, [flat], [1.0], seed=seeds).tokens
    p = np.ones(3000)
    assert by_position.tolist() == [reference.race(p, 0, n) for n in big.tolist()]
    assert by_seed.tolist() == [reference.race(p, seed) for seed in seeds.tolist()]
    assert len(set(by_position.tolist())) == len(set(by_seed.tolist())) == 8


def test_position_changes_the_draw_and_may_be_a_number_a_list_or_a_tensor(op):
    flat = torch.zeros(5, 4000)
    at = {n: op.sample(flat, [flat], [0.5], seed=3, position=n).tokens for n in range(6)}
    assert len({tuple(tokens.tolist()) for tokens in at.values()}) == 6
    for form in (torch.full((5,), 4), [4] * 5):
        assert torch.equal(op.sample(flat, [flat], [0.5], seed=3, position=form).tokens, at[4])


def test_without_a_seed_manual_seed_reproduces_and_calls_differ(op):
    flat = torch.zeros(6, 4000)
    torch.manual_seed(11)
    first, second = (op.sample(flat, [flat], [0.5]).tokens for _ in range(2))
    torch.manual_seed(11)
    assert torch.equal(op.sample(flat, [flat], [0.5]).tokens, first)
    assert not torch.equal(first, second) and len(set(first.tolist())) > 3


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "jeffrey"])
@pytest.mark.slow
def test_a_row_draws_the_same_token_alone_and_among_any_batch_mates(op, divergence):
    ref, (policy,) = logits(45, 1, 2500, 1, kind="typical")
    others_ref, (others,) = logits(46, 7, 2500, 1, kind="mild")
    others_ref[0, 3] = math.nan
    others[1] = -INF
    for trial in range(12):
        seed, position = torch.tensor([900 + trial]), torch.tensor([trial])
        alone = op.sample(ref, [policy], [0.5], divergence=divergence, seed=seed, position=position)
        slot = trial % 7
        x, y = others_ref.clone(), others.clone()
        x[slot], y[slot] = ref[0], policy[0]
        seeds, positions = torch.arange(7), torch.arange(7)
        seeds[slot], positions[slot] = seed[0], position[0]
        # The mates filter, are masked, are greedy or broken; this row is and does nothing.
        top_k, top_p = torch.full((7,), 3), torch.full((7,), 0.5)
        min_p, temperature = torch.full((7,), 0.3), torch.tensor([0.0, 2.0, 0.5, -1.0, 1.0, 9, 1])
        mask = torch.zeros(7, 2500, dtype=torch.bool)
        mask[:, ::3] = True
        top_k[slot], top_p[slot], min_p[slot], temperature[slot] = 0, 1.0, 0.0, 1.0
        mask[slot] = True
        batch = op.sample(
            x, [y], [0.5], divergence=divergence, seed=seeds, position=positions, top_k=top_k,
            top_p=top_p, min_p=min_p, temperature=temperature, mask=mask,
        )  # fmt: skip
        assert batch.tokens[slot] == alone.tokens[0]
        assert batch.valid[slot] and abs(batch.logprobs[slot] - alone.logprobs[0]) <= 1e-5


# --- greedy and ties ------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_temperature_zero_is_the_argmax_whatever_the_seed(op, divergence):
    ref, policies = logits(47, 12, 3000, 2, kind="apart", excluded=0.05)
    log_p = reference.log_probs(ref, policies, [0.5, 0.25], divergence=divergence)
    drawn = [
        op.sample(ref, policies, [0.5, 0.25], divergence=divergence, temperature=0, seed=seed)
        for seed in (1, 2)
    ]
    assert torch.equal(drawn[0].tokens, drawn[1].tokens)
    assert drawn[0].tokens.tolist() == log_p.argmax(axis=1).tolist()
    assert np.abs(drawn[0].logprobs.numpy() - log_p.max(axis=1)).max() <= 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_greedy_ties_go_to_the_lowest_id_that_the_mask_allows(op, divergence):
    ref, policies = logits(48, 3, 2600, 2, kind="mild")
    for x in (ref, *policies):
        x[:, [2500, 17, 1030]] = x.amax(dim=1, keepdim=True) + 3.0  # three equal best tokens
    mask = torch.ones(3, 2600, dtype=torch.bool)
    mask[1, 17] = False
    mask[2, [17, 1030]] = False
    for policies_then in (policies, policies[::-1]):
        tokens = op.sample(
            ref, policies_then, [0.5, 0.25], divergence=divergence, temperature=0.0, mask=mask
        ).tokens
        assert tokens.tolist() == [17, 1030, 2500]


@pytest.mark.slow
def test_reverse_kl_greedy_decides_on_the_fixed_order_float32_accumulation(op):
    # Logits of few bits tie or nearly tie all the time; the contract fixes s = c_0 l_0,
    # s = fma(c_i, l_i, s) in float32 on the raw logits, c_0 = 1 - sum w.
    rng = np.random.default_rng(49)
    rows = [
        torch.from_numpy(np.round(rng.normal(size=(400, 3000)) * 12) / 4).bfloat16() for _ in "123"
    ]
    weights = torch.tensor([0.3, 0.6])
    w = weights.double().numpy()
    terms = list(zip([1.0 - w.sum(), *w], map(reference.to_float64, rows), strict=True))

    def accumulate(terms):
        s = np.zeros((400, 3000), dtype=np.float32)
        for c, x in terms:  # a product of two float32 is exact in float64
            s = (np.float64(np.float32(c)) * x + s).astype(np.float32)
        return s.argmax(axis=1)

    tokens = op.sample(rows[0], rows[1:], weights, temperature=0).tokens.numpy()
    assert (tokens == accumulate(terms)).all()
    assert (tokens != accumulate(terms[::-1])).any()  # the order does decide


def test_an_expanded_row_and_a_copied_one_draw_the_same(op):
    row = normal(50, 1, 1400)
    seeds = torch.arange(6)
    expanded = op.sample(row.expand(6, -1), [row.expand(6, -1)], [0.5], seed=seeds)
    copied = op.sample(row.repeat(6, 1), [row.repeat(6, 1)], [0.5], seed=seeds)
    assert torch.equal(expanded.tokens, copied.tokens)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("level", [1e12, 1e15, 1e17])
def test_model_logprobs_keep_their_log_sums_at_any_level(op, level, divergence):
    ref, policy = torch.full((1, 3), level), torch.tensor([[0.0, 1.0, 2.0]])
    options = {"divergence": divergence, "seed": 0, "return_model_logprobs": True}
    drawn = op.sample(ref, [policy], [1.0], **options)
    expected = torch.log_softmax(torch.stack([torch.zeros(3), policy[0]]).double(), 1)
    found = drawn.model_logprobs[0].double()
    assert torch.allclose(found, expected[:, drawn.tokens[0]], atol=1e-6)
