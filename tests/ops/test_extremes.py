"""Numbers near the ends of float32: the rule of mod_fused/reference/mixture.py, row by row, on
every backend."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import BARRIERS, check, logits, normal

from mod_fused import log_probs, reference

INF, NAN = float("inf"), float("nan")
LARGEST = torch.finfo(torch.float32).max
MILD = [0.5, 1.0, -1.0, 0.0]
FAR = [0.0, 1.0, -3e38, 2.0]
POWERS = ("forward_kl", "alpha:0.9", "jeffrey")  # q of a log-ratio of -80 is about e^80

# Divergences, reference, policies, weights, other arguments, and whether the row is valid. One row
# each; values and prefixes are written without the row.
Row = tuple[tuple[str, ...], Any, list[list[float]], Any, dict[str, Any], bool]
KL, OTHERS = ("reverse_kl",), (*BARRIERS, "alpha:0.01")
ALL = KL + OTHERS
TABLE: dict[str, Row] = {
    "a scaled logit overflows": (
        ALL, [1e38, 0.0], [[0.0, 0.0]], [0.5], {"scales": [4.0, 1.0]}, False,
    ),
    "a scaled logit overflows downwards": (
        ALL, [-1e38, 0.0, 1.0], [[0.0, 1.0, 2.0]], [0.5], {"scales": [4.0, 1.0]}, True,
    ),
    "one token, scaled far away": (ALL, [1.7], [[2.3]], [0.5], {"scales": [1.2e30, 3e30]}, True),
    "the largest weights": (KL, [0.0] * 2, [[0.0] * 2] * 2, [3e38, 3e38], {}, False),
    "1 - sum w is rounding": (KL, [NAN] * 4, [MILD], [1 - 2**-40], {}, True),
    "1 - sum w just counts": (KL, [NAN] * 4, [MILD], [1 + 2**-40 + 2**-52], {}, False),
    "1 - sum w of float32 is rounding": (
        KL, [NAN] * 4, [MILD, FAR], torch.tensor([0.5, 0.5 - 3 * 2**-24]), {}, True,
    ),
    "1 - sum w of float32 just counts": (
        KL, [NAN] * 4, [MILD, FAR], torch.tensor([0.5, 0.5 - 3.5 * 2**-24]), {}, False,
    ),
    "a weight beyond float32": (ALL, MILD, [MILD], "1e39", {}, False),
    "a weight that is no normal float32": (ALL, MILD, [[NAN] * 4], [1.1e-38], {}, True),
    "the least weight": (ALL, MILD, [[NAN] * 4], [1.2e-38], {}, False),
    "value weights": (ALL, MILD, [], [], {"values": [[NAN] * 4], "value_weights": [1.1e-38]}, True),
    "a value weight beyond float32": (
        ALL, MILD, [], [], {"values": [MILD], "value_weights": [1e39]}, False,
    ),
    "a sum overflows": (KL, [-3e38, 0.0], [[3e38, 0.0]], [1.5], {}, False),
    "a sum overflows downwards and comes back": (
        KL, [0.0] * 2, [[-3e38, 0.0], [3e38, 0.0]], [2.0, 2.0], {}, True,
    ),
    "all sums overflow downwards": (KL, [0.0] * 2, [[-3e38, -3e38]], [2.0], {}, False),
    "log pi* overflows": (KL, [3e38, -3e38], [[3e38, -3e38]], [0.5], {}, True),
    "almost on the simplex": (OTHERS, MILD, [[0.0, 3.0, 1.0, -3.0]], [0.995], {}, True),
    "the least float for -inf": (ALL, MILD, [[0.0, -LARGEST, 1.0, -LARGEST]], [0.75], {}, True),
    "log pi_i overflows": (OTHERS, MILD, [[0.0, 3e38, -3e38, 1.0]], [0.5], {}, True),
    "log pi_ref overflows": (ALL, [3e38, -3e38, 0.0], [[0.0] * 3], [0.5], {}, True),
    "Q of a token is too large": (POWERS, MILD, [FAR], [1e6], {}, True),
    "Q of a token within the floor is too large": (
        ("forward_kl", "jeffrey"), [0.0] * 4, [[0.0, 1.0, -78.0, 2.0]], [1e4], {}, True,
    ),
    "Q of all tokens is too large": (
        POWERS, MILD, [MILD], [1e22], {"prefix": [0.0, -200.0]}, False,
    ),
    "Q of all tokens, not in units of 1 / alpha": (
        ("alpha:0.05",), MILD, [MILD], [1e36], {}, False,
    ),
    "Q of a token is too small": (POWERS, MILD, [FAR], [-1e6], {}, False),
    "Q is too large but for its value": (
        ("forward_kl", "jeffrey"), MILD, [FAR], [200.0], {"values": [[0.0, 0.0, 5e36, 0.0]]}, True,
    ),
    "a reference at its floor": (OTHERS, [0.0, -80.0], [[0.0] * 2], [0.5], {}, True),
    "just not": (POWERS, MILD, [FAR], [-100.0], {}, True),
    "the least float as a value": (ALL, MILD, [], [], {"values": [[0.0, -LARGEST, 0.0, 1]]}, True),
    "the largest as a value": (OTHERS, MILD, [], [], {"values": [[0.0, LARGEST, 0.0, 1]]}, False),
    "a large value": (ALL, MILD, [], [], {"values": [[0.0, 1e36, 0.0, 1e4]]}, True),
    "a value of 10000": (
        (*ALL, "alpha:0.001"), MILD, [], [], {"values": [[0.0, 1e4, 0.0, 0.0]]}, True,
    ),
    "one large value at Z = 0": (
        ("jeffrey",), MILD, [], [],
        {"values": [[0.0, 1e30, 1e4, 0.0]], "normalizer": "zero"}, True,
    ),
    "large values at Z = 0": (
        ("jeffrey",), MILD, [], [],
        {"values": [[0.0, 2e37, 0.0, 0.0]], "normalizer": "zero"}, False,
    ),
    "log-ratios of 1e30": (
        ("forward_kl", "alpha:0.5", "alpha:0.01"), MILD, [MILD], [0.5],
        {"prefix": [-1e30, 1e30]}, True,
    ),
    "log-ratios of -1e307": (
        ("forward_kl", "alpha:0.5", "alpha:0.01", "jeffrey"), MILD, [FAR], [0.5],
        {"prefix": [1e307, -1e307]}, True,
    ),
    "a prefix of weight 0": (
        ALL, MILD, [MILD, MILD], [0.5, 0.0], {"prefix": [0.0, 0.0, NAN]}, True,
    ),
    "a prefix that counts": (OTHERS, MILD, [MILD], [0.5], {"prefix": [0.0, -INF]}, False),
    "an infinite prefix": (OTHERS, MILD, [MILD], [0.5], {"prefix": [0.0, INF]}, False),
    "an impossible prefix of the reference": (
        OTHERS, MILD, [MILD], [0.5], {"prefix": [-INF, 0.0]}, False,
    ),
    "a prefix under reverse KL": (KL, MILD, [MILD], [0.5], {"prefix": [0.0, -INF]}, True),
    "tau is small": (
        ("forward_kl",), MILD, [MILD], [1.0], {"prefix": [0.0, 82.8], "normalizer": "zero"}, True,
    ),
    "tau is the least": (
        ("forward_kl",), [0.0] * 2, [], [], {"values": [[-1e-36] * 2], "normalizer": "zero"}, False,
    ),
    "tau is too small": (
        ("forward_kl", "jsd"), MILD, [MILD], [1.0],
        {"prefix": [0.0, 82.95], "normalizer": "zero"}, False,
    ),
    "tau overflows": (
        ("alpha:0.5", "jsd"), MILD, [[0.0] * 4] * 3, [-3e38, -3e38, -3e38],
        {"normalizer": "zero"}, False,
    ),
    "tau overflows where Q does not": (
        ("alpha:0.5",), MILD, [MILD], [-3e38],
        {"prefix": [0.0, 200.0], "normalizer": "zero"}, False,
    ),
    # Both ends of the bracket at 1e-33: their product is none.
    "a token of 1e-33": (
        ("forward_kl",), [-49.4087257, -125.0038986], [[-49.594368, -125.0609818]], [50.0],
        {}, True,
    ),
    "a broken token that plausibility excludes": (
        ALL, [5.0, 0.0, 0.0, 0.0], [[0.0, NAN, 0.0, 0.0]], [0.5],
        {"plausibility": 0.5, "plausible": 0}, False,
    ),
    "plausibility of a broken tensor of weight 0": (
        ALL, MILD, [[0.0, NAN, 0.0, 0.0]], [0.0], {"plausibility": 0.1}, False,
    ),
    "plausibility of an empty tensor of weight 0": (
        ALL, MILD, [[-INF] * 4], [0.0], {"plausibility": 0.1}, False,
    ),
    "Q just inside the border": (
        OTHERS, [0.0] * 3, [], [], {"values": [[0.0, 9.99e36, -9.99e36]]}, True,
    ),
    "Q at the border": (OTHERS, [0.0, 0.0], [], [], {"values": [[0.0, 1e37]]}, False),
    "Q inside the border": (OTHERS, [0.0, 0.0], [], [], {"values": [[0.0, 9.5e36]]}, True),
    "a large value off the support": (
        OTHERS, [-200.0, 0.0, 1.0], [], [], {"values": [[2e37, 0.0, 0.0]]}, True,
    ),
    "a sum that plausibility leaves out overflows": (
        KL, [0.0, -50.0], [[0.0, 10.0]], [1e38], {"plausibility": 0.1, "plausible": 0}, True,
    ),
    "a reference far from its policy": (OTHERS, [1e17, 1e17], [[0.0, 3.0]], [0.5], {}, True),
    "policies far from their reference": (
        OTHERS, MILD, [[-1e17] * 4, [3e38] * 4, [0.0, 0.0, 3.0, 1.0]], [0.5, 0.5, -0.25], {}, True,
    ),
    "plausibility far from the peak": (
        ALL, MILD, [[3e38, -3e38, 2.9e38, 0.0]], [0.0], {"plausibility": 1e-30}, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_extreme_numbers_follow_the_rule(op, name):
    divergences, ref, policies, weights, options, valid = TABLE[name]
    options = dict(options)
    if isinstance(weights, str):  # as a tensor: only the device sees it
        weights = torch.tensor([float(weights)], dtype=torch.float64)
    if "values" in options:
        options["values"] = torch.tensor(options["values"])[:, None]
    if "prefix" in options:
        prefix = torch.tensor([options.pop("prefix")], dtype=torch.float64)
        options["prefix_logprobs"] = prefix
    if "scales" in options:
        options["logit_scales"] = options.pop("scales")
    if "plausibility" in options:
        options["plausibility_tensor"] = options.pop("plausible", 1)
    args = torch.tensor([ref]), [torch.tensor([p]) for p in policies], weights
    for divergence in divergences:
        log_p = check(op, *args, divergence=divergence, **options)
        assert valid != log_p.isnan().any(), divergence
        drawn = op.sample(*args, divergence=divergence, seed=1, **options)
        assert drawn.valid.tolist() == [valid], divergence


# With values of no effect the C++ backend takes another way.
VALUES = {"fused": {}, "with values": {"values": torch.zeros(1, 2, 64), "value_weights": [1.0]}}


def assert_same_everywhere(log_p: torch.Tensor, expected: np.ndarray) -> None:
    """Also where there is no mass to speak of, as a mask may leave just that."""
    expected = torch.from_numpy(expected)
    assert torch.equal(log_p == -INF, expected == -INF)
    at = expected > -INF
    error = (log_p.double() - expected)[at].abs() - 1e-5 * expected[at].abs()
    assert error.max() <= 2e-5


@pytest.mark.parametrize("options", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("divergence", (*BARRIERS, "alpha:0.01"))
def test_log_ratios_around_the_floor_are_clamped_there(op, divergence, options):
    ref = torch.zeros(2, 64)
    first, second = 0.1 * ref, 0.1 * ref
    first[:, 10:22] = torch.tensor(
        [-30.0, -55, -61, -70, -75, -79, -81, -83, -90, -115, -130, -300]
    )
    second[1, 13:18], second[:, 30] = 12.0, -79.5
    for weights in ([1.0, 0.0], [0.5, 0.25], [1.5, 20.0]):
        args = ref, [first, second], weights
        log_p = op.log_probs(*args, divergence=divergence, **options)
        expected = reference.log_probs(*args, divergence=divergence, **options)
        assert_same_everywhere(log_p, expected)


@pytest.mark.parametrize("normalizer", ["exact", "zero"])
@pytest.mark.parametrize("size", [70.0, 3e7, 1e20, 1e36])
def test_log_pi_of_jensen_shannon_goes_down_as_far_as_tilts_do(op, size, normalizer):
    # Tilts below 0: others leave no tau > 0 where Z = 0.
    values = -size * torch.tensor([[[1.0, 2.0, 1.5, 3.0], [0.25, 1.0, 0.5, 0.5]]])
    options = {"values": values, "divergence": "jsd", "normalizer": normalizer}
    args = torch.tensor([MILD, MILD]), [torch.tensor([[0.0, 1.0, 2.0, -1.0]] * 2)], [0.5]
    log_p = op.log_probs(*args, **options)
    assert_same_everywhere(log_p, reference.log_probs(*args, **options))


@pytest.mark.parametrize("divergence", (*BARRIERS, "alpha:0.01"))
def test_values_of_a_high_level_and_small_differences(op, divergence):
    # The sums that bound tau are float32.
    ref, _ = logits(29, 4, 40, 0, kind="typical")
    values = 2.0**20 + (0.8 * normal(30, 1, 4, 40)).round() / 8.0
    check(op, ref, [], [], values=values, divergence=divergence)


@pytest.mark.parametrize("divergence", ALL)
def test_a_first_tile_without_a_token_sets_no_level(op, divergence):
    ref, (policy,) = logits(28, 2, 2100, 1, kind="typical")
    for x in (ref, policy):
        x -= 110.0
        x[:, :1024] = -INF
    log_p = check(op, ref, [policy], [0.5], divergence=divergence)
    drawn = op.sample(ref, [policy], [0.5], divergence=divergence, seed=2)
    expected = log_p[torch.arange(2), drawn.tokens]
    assert (drawn.logprobs - expected).abs().max() <= 2e-5  # a float's rounding of log-linear keys


@pytest.mark.parametrize("divergence", ALL)
def test_a_first_tile_far_below_the_others(op, divergence):
    ref, (policy,) = logits(28, 2, 2100, 1, kind="typical")
    for x in (ref, policy):
        x[:, 1024:] += 74.0
    log_p = check(op, ref, [policy], [0.5], divergence=divergence)
    drawn = op.sample(ref, [policy], [0.5], divergence=divergence, seed=2)
    expected = log_p[torch.arange(2), drawn.tokens]
    assert (drawn.logprobs - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("weight", [0.1, 1.5, -0.5, -1.5])
@pytest.mark.parametrize("divergence", (*BARRIERS, "alpha:0.01"))
def test_two_far_log_ratios_of_any_size_and_sign(op, divergence, weight):
    far = torch.tensor([-12.0, -20, -40, -60, -75, -78, -150, -178.5, -300])
    policy = torch.zeros(9, 64)
    policy[:, 10], policy[:, 11] = far, far + 0.5
    args = torch.zeros(9, 64), [policy], [weight]
    log_p = op.log_probs(*args, divergence=divergence)
    assert_same_everywhere(log_p, reference.log_probs(*args, divergence=divergence))


@pytest.mark.parametrize("options", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("divergence", (*BARRIERS, "alpha:0.01"))
def test_tokens_leave_the_support_at_the_floor_of_the_reference(op, divergence, options):
    ref = torch.zeros(2, 64)
    ref[:, 5:9] = torch.tensor([-79.8, -80.2, -77.0, -83.0]) + math.log(60.0)
    policy = torch.zeros(2, 64)
    policy[1, 5:9] = 3.0
    log_p = op.log_probs(ref, [policy], [0.75], divergence=divergence, **options)
    expected = reference.log_probs(ref, [policy], [0.75], divergence=divergence, **options)
    assert (expected[:, 5:9] == -INF).tolist() == [[False, True, False, True]] * 2
    assert_same_everywhere(log_p, expected)


@pytest.mark.parametrize("options", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("divergence", (*BARRIERS, "alpha:0.01"))
def test_prefixes_are_shifted_up_to_their_floor(op, divergence, options):
    ref, policy = torch.zeros(2, 64), torch.zeros(2, 64)
    policy[:, :8] = torch.tensor([-50.0, -38.0, -30.0, 30.0, 60.0, 0.0, 5.0, 1.0])
    for short, other in ((39.5, 0.0), (43.0, 1.0), (43.0, 60.0), (-60.0, -100.0)):
        options = {**options, "prefix_logprobs": torch.tensor([[0.0, -short, other]] * 2)}
        args = ref, [policy, policy], [0.5, 0.25]
        log_p = op.log_probs(*args, divergence=divergence, **options)
        assert_same_everywhere(log_p, reference.log_probs(*args, divergence=divergence, **options))


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_temperatures_that_are_no_normal_float32_leave_the_best_token(op, divergence):
    args, seeds = (torch.tensor([MILD] * 8), [torch.tensor([MILD] * 8)], [0.5]), torch.arange(8)
    for temperature in (1e-38, 1e-40, 1e-45):
        drawn = op.sample(*args, divergence=divergence, seed=seeds, temperature=temperature)
        assert drawn.tokens.tolist() == [1] * 8


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-300, 1e-39, 1e39, INF, NAN])
def test_scales_that_are_no_positive_normal_float32_are_refused(scale):
    with pytest.raises(ValueError, match="logit_scales must be positive normal float32"):
        log_probs(torch.zeros(1, 3), [], [], values=torch.zeros(1, 1, 3), logit_scales=[scale])


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_plausibility_cuts_to_a_ten_thousandth(op, divergence):
    edge = math.log(0.01)
    ref = torch.tensor([[0.0, edge + 1e-4, edge - 1e-4]])
    options = {"divergence": divergence, "plausibility": 0.01}
    log_p = check(op, ref, [torch.zeros(1, 3)], [0.5], **options)
    assert log_p.isfinite().tolist() == [[True, True, False]]


def test_top_p_sees_masses_of_2_to_the_minus_33(op):
    # Of position 5899092 the second tile's exponential is 2^-26.7 of the first's: the tail, 2^-23
    # in all, wins where it is kept. Next to a top_p of 1 - 2^-24 it is.
    ref = torch.full((1, 2048), -33.0 * math.log(2.0))
    ref[0, 0], ref[0, 1:1024] = 0.0, -INF
    log_p = reference.log_probs(ref, [ref], [0.5], divergence="jsd")[0]
    for top_p, tail in ((1.0 - 2.0**-24, True), (1.0 - 2.0**-20, False)):
        final = np.exp(reference.filtered_log_probs(log_p, top_p=top_p))
        expected = reference.race(final, 0, 5899092)
        assert tail == (expected >= 1024)
        draw = {"divergence": "jsd", "seed": torch.tensor([0]), "position": 5899092, "top_p": top_p}
        assert op.sample(ref, [ref], [0.5], **draw).tokens.tolist() == [expected]
