"""The float64 oracle itself: against mpmath, against closed forms, and the theory it rests on."""

from __future__ import annotations

import itertools

import mpmath
import numpy as np
import pytest
from cases import BARRIERS, DIVERGENCES, KINDS
from scipy import optimize, special

from mod_fused import reference


def alpha_of(divergence: str) -> float:
    return float(divergence.split(":")[1])


# --- golden identity: optimal policies of closed form, found by an independent solver -------------


def f_prime(divergence: str, log_x: np.ndarray) -> np.ndarray:
    """f' at x = e^log_x, as printed."""
    x = np.exp(log_x)
    if divergence == "reverse_kl":
        return log_x + 1.0
    if divergence == "forward_kl":
        return -1.0 / x
    if divergence == "jsd":
        return np.log(2.0) + np.log(x / (1.0 + x))
    if divergence == "jeffrey":
        return log_x - 1.0 / x + 1.0
    a = alpha_of(divergence)
    return (1.0 - x**-a) / a


def optimum(divergence: str, lr: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """log of argmax_pi <pi, reward> - sum pi_ref f(pi / pi_ref), beta = 1, by Brent's method.

    The unknown is log tau, tau = sup f' - (max reward - Z); for Jeffrey it is max reward - Z.
    """
    below = reward.max() - reward
    if divergence == "reverse_kl":
        return reference.log_softmax(lr + reward)

    def log_x(unknown: float) -> np.ndarray:
        if divergence == "jeffrey":  # 1/x = omega(1 - y)
            return -np.log(special.wrightomega(1.0 - (unknown - below)))
        q = np.exp(unknown) + below
        if divergence == "forward_kl":
            return -np.log(q)
        if divergence == "jsd":
            return -np.log(np.expm1(q))
        return -np.log(alpha_of(divergence) * q) / alpha_of(divergence)

    low, high = (-60.0, 300.0) if divergence == "jeffrey" else (-60.0, 5.0)
    log_mass = lambda z: special.logsumexp(lr + log_x(z))  # noqa: E731
    root = optimize.brentq(log_mass, low, high, xtol=1e-15, rtol=1e-15)
    return lr + log_x(root)


def bandit(rng: np.random.Generator, arms: int, policies: int) -> tuple[np.ndarray, np.ndarray]:
    lr = reference.log_softmax(rng.normal(size=arms) * 1.5)
    return lr, rng.normal(size=(policies, arms)) * rng.choice([0.3, 1.0, 3.0])


def random_weights(rng: np.random.Generator, policies: int) -> np.ndarray:
    """On the simplex, off it, and with a negative one, in turn."""
    w = rng.dirichlet(np.ones(policies))
    kind = rng.integers(3)
    return w if kind == 0 else w * rng.uniform(0.3, 2.0) if kind == 1 else rng.normal(size=policies)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_golden_identity_mixing_optimal_policies_is_optimal_for_the_mixed_reward(divergence):
    rng = np.random.default_rng(11)
    for _ in range(60):
        lr, rewards = bandit(rng, int(rng.integers(2, 40)), int(rng.integers(1, 5)))
        w = random_weights(rng, len(rewards))
        policies = [optimum(divergence, lr, r) for r in rewards]
        mixed = reference.log_probs_row(lr, policies, w, divergence=divergence)
        assert np.abs(mixed - optimum(divergence, lr, w @ rewards)).max() <= 1e-9


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rewards_given_as_values_reach_the_same_optimum(divergence):
    rng = np.random.default_rng(12)
    for _ in range(30):
        lr, rewards = bandit(rng, 17, 3)
        w = random_weights(rng, 3)
        tilted = reference.log_probs_row(
            lr, [], [], divergence=divergence, values=rewards, value_weights=w
        )
        assert np.abs(tilted - optimum(divergence, lr, w @ rewards)).max() <= 1e-9


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_optimum_satisfies_the_first_order_condition(divergence):
    # reward - f'(pi/pi_ref) is the same for every arm: with strict convexity, the unique maximum.
    rng = np.random.default_rng(13)
    lr, rewards = bandit(rng, 12, 1)
    log_pi = reference.log_probs_row(lr, [], [], divergence=divergence, values=rewards)
    multiplier = rewards[0] - f_prime(divergence, log_pi - lr)
    assert np.ptp(multiplier) <= 1e-9
    assert abs(np.exp(log_pi).sum() - 1.0) <= 1e-12


# --- against mpmath: the textbook equation, bisected in Z, with 60 digits ------------------------


def mp_log_probs(divergence, lr, policies, w, tilt, shift=0.0, z=None):
    """log pi* by bisection of Z itself; `z` fixes it instead. `shift`: prefix_i - prefix_ref."""
    mp = mpmath.mp
    name, a = divergence.split(":")[0], None
    if name == "alpha":
        a = mp.mpf(alpha_of(divergence))
    slope = {
        "forward_kl": lambda x: -1 / x,
        "jsd": lambda x: mp.log(2) + mp.log(x / (1 + x)),
        "alpha": lambda x: (1 - x**-a) / a,
        "jeffrey": lambda x: mp.log(x) - 1 / x + 1,
    }[name]
    inverse = {
        "forward_kl": lambda y: -1 / y,
        "jsd": lambda y: 1 / (2 * mp.exp(-y) - 1),
        "alpha": lambda y: (1 - a * y) ** (-1 / a),
        "jeffrey": lambda y: 1 / mp.lambertw(mp.exp(1 - y)).real,
    }[name]
    p = [mp.exp(mp.mpf(x)) for x in lr]
    total = mp.fsum(p)
    p = [x / total for x in p]
    u = [mp.mpf(x) for x in tilt]
    for weight, policy in zip(w, policies, strict=True):
        q = [mp.exp(mp.mpf(x)) for x in policy]
        total = mp.fsum(q)
        for s in range(len(p)):
            ratio = q[s] / total / p[s] * mp.exp(mp.mpf(shift))
            u[s] += mp.mpf(weight) * slope(ratio)
    if z is None:
        best = max(range(len(u)), key=lambda s: u[s])
        low, high = u[best] - slope(1 / p[best]), u[best] - slope(mp.mpf(1))
        for _ in range(220):
            z = (low + high) / 2
            mass = mp.fsum(ps * inverse(us - z) for ps, us in zip(p, u, strict=True))
            low, high = (z, high) if mass > 1 else (low, z)
    pi = [ps * inverse(us - z) for ps, us in zip(p, u, strict=True)]
    total = mp.fsum(pi)
    return np.array([float(mp.log(x / total)) for x in pi])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divergence", BARRIERS)
def test_equals_the_textbook_equation_bisected_with_60_digits(divergence, kind):
    rng = np.random.default_rng(21)
    spread, apart = KINDS[kind]
    with mpmath.workdps(60):
        for tilt in (np.zeros(5), rng.normal(size=5) * 2.0):
            lr = reference.log_softmax(rng.normal(size=5) * spread)
            policies = [lr + rng.normal(size=5) * apart for _ in range(2)]
            w = rng.dirichlet([1.0, 1.0])
            got = reference.log_probs_row(lr, policies, w, divergence=divergence, values=tilt[None])
            expected = mp_log_probs(divergence, lr, policies, w, tilt)
            assert np.abs(got - expected).max() <= 1e-7
            assert np.abs(np.exp(got) - np.exp(expected)).max() <= 1e-12


@pytest.mark.parametrize("divergence", BARRIERS)
def test_zero_normalizer_equals_equation_6_as_printed(divergence):
    rng = np.random.default_rng(22)
    with mpmath.workdps(50):  # Z = 0 has an inverse for these weights
        for w in ([0.5, 0.5], [0.25, 0.5], [0.75, 0.5]):
            lr = reference.log_softmax(rng.normal(size=6))
            policies = [lr + 0.5 * rng.normal(size=6) for _ in range(2)]
            got = reference.log_probs_row(lr, policies, w, divergence=divergence, normalizer="zero")
            expected = mp_log_probs(divergence, lr, policies, w, np.zeros(6), z=0)
            assert np.abs(got - expected).max() <= 1e-9


def test_zero_normalizer_is_invalid_where_it_has_no_inverse():
    lr = np.log([0.5, 0.5])
    policy = np.log([0.999999, 0.000001])
    for divergence in ("jsd", "alpha:0.5"):  # w f' exceeds sup f' for the first token
        row = reference.log_probs_row(lr, [policy], [4.0], divergence=divergence, normalizer="zero")
        assert np.isnan(row).all()


@pytest.mark.parametrize("divergence", BARRIERS)
def test_the_solution_sums_to_one_before_it_is_renormalised(divergence):
    rng = np.random.default_rng(23)
    slope = reference.slope_of(divergence)
    for spread, apart in KINDS.values():
        lr = reference.log_softmax(rng.normal(size=4097) * spread)
        policy = reference.log_softmax(lr + rng.normal(size=4097) * apart)
        ratios = reference.solve_log_ratios(lr, slope.slope(policy - lr), slope)
        assert abs(np.exp(lr + ratios).sum() - 1.0) <= 1e-12
        assert np.abs(ratios - (policy - lr)).max() <= 1e-6  # one policy of weight 1: itself


@pytest.mark.parametrize("divergence", [d for d in BARRIERS if d != "jsd"])
def test_shifting_extreme_prefixes_to_minus_40_changes_nothing_visible(divergence):
    rng = np.random.default_rng(24)
    lr = reference.log_softmax(rng.normal(size=6) * 2.0)
    policy = lr + rng.normal(size=6)
    with mpmath.workdps(150):
        for shift in (-60.0, -250.0):
            got = reference.log_probs_row(
                lr, [policy], [1.0], divergence=divergence, prefix_logprobs=[0.0, shift]
            )
            expected = mp_log_probs(divergence, lr, [policy], [1.0], np.zeros(6), shift)
            assert 0.5 * np.abs(np.exp(got) - np.exp(expected)).sum() <= 2e-5


# --- the mixture's own mass of a response ---------------------------------------------------------


def response_tree(seed, vocab=3, depth=3):
    """By prefix: log-probabilities of the next token under the reference and two policies."""
    rng = np.random.default_rng(seed)
    prefixes = [p for n in range(depth) for p in itertools.product(range(vocab), repeat=n)]
    return {p: reference.log_softmax(rng.normal(size=(3, vocab)) * 2.0) for p in prefixes}


@pytest.mark.parametrize("divergence", BARRIERS)
@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, 0.0), (2.0, 1.5), (1.5, -0.5)], ids=str)
def test_own_mass_gives_the_mixture_of_whole_responses(divergence, weights):
    # pi*(y) = pi_ref(y) H(u(y) - Z) of every prefix y, where Z makes the continuations of a prefix
    # sum to its probability: the equation as it stands, in 40 digits, without a mass.
    tree = response_tree(31)
    zero = mpmath.mpf(0)
    whole = {(): [zero, zero, zero, zero]}  # log-probabilities: three models, then the mixture's
    with mpmath.workdps(40):
        for prefix, tokens in tree.items():
            models, own = whole[prefix][:3], whole[prefix][3]
            logs = [[m + mpmath.mpf(x) for x in t] for m, t in zip(models, tokens, strict=True)]
            log_pi = mp_whole_responses(divergence, logs[0], logs[1:], weights, own)
            got = reference.log_probs_row(
                tokens[0], tokens[1:], weights, divergence=divergence,
                prefix_logprobs=[float(x) for x in models], mixture_prefix_logprobs=float(own),
            )  # fmt: skip
            expected = np.array([float(x - own) for x in log_pi])
            assert np.abs(np.exp(got) - np.exp(expected)).max() <= 1e-9
            assert np.abs(got - expected).max() <= 1e-8
            for s, x in enumerate(log_pi):
                whole[(*prefix, s)] = [*(log[s] for log in logs), x]


def mp_whole_responses(divergence, log_ref, log_policies, weights, log_total):
    """log pi_ref(y) H(u(y) - Z) of responses y, with Z such that they sum to e^log_total."""
    mp, name = mpmath.mp, divergence.split(":")[0]
    a = mp.mpf(alpha_of(divergence)) if name == "alpha" else None
    slope, inverse = {
        "forward_kl": (lambda x: -1 / x, lambda y: -1 / y),
        "jsd": (lambda x: mp.log(x / (1 + x)), lambda y: 1 / mp.expm1(-y)),
        "alpha": (lambda x: -(x**-a), lambda y: (-y) ** (-1 / a)),
        "jeffrey": (lambda x: mp.log(x) - 1 / x, lambda y: 1 / mp.lambertw(mp.exp(-y)).real),
    }[name]
    u = [
        mp.fsum(
            w * slope(mp.exp(x[s] - log_ref[s])) for w, x in zip(weights, log_policies, strict=True)
        )
        for s in range(len(log_ref))
    ]
    best = max(range(len(u)), key=lambda s: u[s])

    def log_pi(rho):  # rho: the log-ratio of the response of the largest u
        z = u[best] - slope(mp.exp(rho))
        return [x + mp.log(inverse(v - z)) for x, v in zip(log_ref, u, strict=True)]

    total = mp.exp(log_total)
    low, high = mp.mpf(-200), log_total - log_ref[best]
    for _ in range(160):
        rho = (low + high) / 2
        mass = mp.fsum(mp.exp(x) for x in log_pi(rho))
        low, high = (rho, high) if mass < total else (low, rho)
    return log_pi(rho)


@pytest.mark.parametrize("divergence", [*BARRIERS, "alpha:0.02"])
def test_own_mass_at_a_corner_is_the_policy(divergence):
    rng = np.random.default_rng(32)
    lr, policy, other = reference.log_softmax(rng.normal(size=(3, 40)) * 3.0)
    for prefix in (0.0, -7.0, -300.0, 150.0, -2000.0, 1500.0):
        got = reference.log_probs_row(
            lr, [policy, other], [1.0, 0.0], divergence=divergence,
            prefix_logprobs=[-4.0, prefix, 9.0], mixture_prefix_logprobs=prefix,
        )  # fmt: skip
        assert np.abs(np.exp(got) - np.exp(policy)).max() <= 1e-11


# --- the published observations -------------------------------------------------------------------


def chi_squared_optimum(ref: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """argmax <pi, reward> - chi^2(pi, ref): f = (x-1)^2, f'(0) = -2 finite, so arms can reach 0."""

    def mass(z: float) -> float:
        return float((ref * np.maximum(0.0, 1.0 + (reward - z) / 2.0)).sum() - 1.0)

    z = optimize.brentq(mass, reward.min() - 10.0, reward.max() + 10.0, xtol=1e-14)
    return ref * np.maximum(0.0, 1.0 + (reward - z) / 2.0)


def test_without_a_barrier_identical_policies_have_different_optima():
    # Four arms. Both rewards push arm 3 out; how far below the others it is leaves no trace in the
    # policy, yet it decides the optimum of the mix. So no rule from policies to optimum can exist.
    ref = np.full(4, 0.25)
    other = np.array([0.0, 0.0, 0.0, 12.0])
    reward_a, reward_b = np.array([1.0, 0.5, 0.0, -8.0]), np.array([1.0, 0.5, 0.0, -20.0])
    policy_a, policy_b = (chi_squared_optimum(ref, r) for r in (reward_a, reward_b))
    assert policy_a[3] == 0.0
    assert np.abs(policy_a - policy_b).max() <= 1e-12
    optimum_a, optimum_b = (
        chi_squared_optimum(ref, 0.5 * r + 0.5 * other) for r in (reward_a, reward_b)
    )
    assert np.abs(optimum_a - optimum_b).max() >= 0.1
    for divergence in BARRIERS:  # a barrier keeps the trace
        a, b = (optimum(divergence, np.log(ref), r) for r in (reward_a, reward_b))
        assert abs(a[3] - b[3]) >= 0.1


def test_kl_bound_value_lost_is_at_most_2_beta_L():
    # MOD: if max |log pi_i - log pi_i*| <= L for every i, then V* - V <= 2 beta L.
    rng = np.random.default_rng(31)
    closest = 0.0
    for _ in range(300):
        beta, lipschitz = rng.choice([0.1, 1.0, 5.0]), rng.choice([0.01, 0.3, 2.0])
        arms = int(rng.integers(2, 30))
        lr, rewards = bandit(rng, arms, 3)
        w = rng.dirichlet(np.ones(3))
        exact = [reference.log_softmax(lr + r / beta) for r in rewards]
        # Perturbations aligned between policies are the bad ones.
        signs = rng.permutation(np.resize([1.0, -1.0], arms))
        bad = signs * rng.uniform(0.0, lipschitz, size=(3, 1))
        perturbed = [reference.log_softmax(e + d) for e, d in zip(exact, bad, strict=True)]
        bound = max(np.abs(p - e).max() for p, e in zip(perturbed, exact, strict=True))

        def value(log_pi: np.ndarray, lr=lr, rewards=rewards, w=w, beta=beta) -> float:
            return float(np.exp(log_pi) @ (w @ rewards - beta * (log_pi - lr)))

        best = reference.log_softmax(lr + w @ rewards / beta)
        lost = value(best) - value(reference.log_probs_row(lr, perturbed, w))
        assert -1e-9 <= lost <= 2.0 * beta * bound
        closest = max(closest, lost / (2.0 * beta * bound))
    assert closest >= 0.1  # the inputs do try the bound
