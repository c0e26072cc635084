"""Divergences that users make: registered, copied, changed, and built on mod_fused's own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import logits
from kl_mixture import LAMBDA, KLMixture
from scipy.optimize import brentq
from scipy.special import log_softmax

import mod_fused
from mod_fused import divergence as divergences
from mod_fused.divergence import (
    AlphaDivergence,
    Divergence,
    ForwardKL,
    JeffreyDivergence,
    JensenShannonDivergence,
    ReverseKL,
    get_divergence,
    number_of,
)

BUILT_IN = (ReverseKL, ForwardKL, JensenShannonDivergence, AlphaDivergence, JeffreyDivergence)


@pytest.fixture(autouse=True)
def nothing_stays_registered() -> Iterator[None]:
    tables = divergences._CANONICAL, divergences._NUMBERED, divergences._NUMBERS
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.fixture
def kl_mixture() -> Divergence:
    return mod_fused.register_divergence(KLMixture())


def exact(ref: torch.Tensor, policies: list[torch.Tensor], weights: list[float]) -> np.ndarray:
    """pi* of one row from f' alone, in float64, every inverse by root finding."""
    log_ref = log_softmax(ref.double().numpy())
    ratios = [log_softmax(p.double().numpy()) - log_ref for p in policies]

    def slope(d):  # f'(e^d)
        return LAMBDA * d - (1.0 - LAMBDA) * np.exp(-d)

    u = sum(w * slope(d) for w, d in zip(weights, ratios, strict=True))

    def log_ratios(z):
        return np.array([brentq(lambda d, y=y: slope(d) - y, -100, 200, xtol=1e-13) for y in u - z])

    z = brentq(lambda z: np.log(np.exp(log_ref + log_ratios(z)).sum()), -30, 30, xtol=1e-12)
    return np.exp(log_ref + log_ratios(z))


def test_a_registered_divergence_equals_its_definition_and_cpu_refuses_it(op, kl_mixture):
    ref, policies = logits(7, 2, 40, 2, kind="typical")
    if op.backend == "cpu":
        with pytest.raises(ValueError, match="does not know the registered divergence"):
            op.log_probs(ref, policies, [0.5, 0.4], divergence="kl_mixture")
        return
    for divergence in ("kl_mixture", kl_mixture):
        got = op.log_probs(ref, policies, [0.5, 0.4], divergence=divergence).double().exp().numpy()
        for row in range(2):
            expected = exact(ref[row], [p[row] for p in policies], [0.5, 0.4])
            assert 0.5 * np.abs(got[row] - expected).sum() <= 2e-5


def test_the_default_backend_is_one_that_knows_it(kl_mixture):
    ref, policies = logits(8, 3, 2000, 2)
    arguments = ref, policies, [0.5, 0.5]
    drawn = mod_fused.sample(*arguments, divergence="kl_mixture", seed=3)
    explicit = mod_fused.sample(*arguments, divergence=kl_mixture, seed=3, backend="torch")
    assert drawn.valid.all() and torch.equal(drawn.tokens, explicit.tokens)


def named(name: str, **changes: object) -> Divergence:
    return type("Changed", (KLMixture,), {"name": name, **changes})()


@pytest.mark.parametrize(
    ("divergence", "error", "message"),
    [
        (ForwardKL, TypeError, "got type"),
        (named("jsd"), ValueError, "taken"),
        (named("fkl"), ValueError, "taken"),
        (named("alpha"), ValueError, "taken"),
        (named("Two Words"), ValueError, "lower-case identifier"),
        (named("mine", deficit=Divergence.deficit), TypeError, "does not define deficit"),
        (named("mine", triton=(1, 2)), ValueError, "got 2 of them"),
        (named("mine", deficit=lambda self, d: d), ValueError, "must decrease"),
        (named("mine", bounded=True), ValueError, "must be positive"),
        (named("mine", log_ratio=lambda self, q: -q), ValueError, "not the inverse"),
        (named("mine", log_slope=lambda self, q: -q), ValueError, "log_slope"),
    ],
)
def test_what_cannot_be_a_divergence_is_refused(divergence, error, message):
    before = dict(divergences._CANONICAL)
    with pytest.raises(error, match=message):
        mod_fused.register_divergence(divergence)
    assert divergences._CANONICAL == before


def test_an_object_that_is_not_registered_is_refused():
    ref, policies = logits(9, 1, 8, 1)
    with pytest.raises(TypeError, match="register_divergence"):
        mod_fused.log_probs(ref, policies, [1.0], divergence=KLMixture())


# --- mathematics of one's own on top of mod_fused's -----------------------------------------------

REF, POLICIES = logits(10, 2, 40, 2, kind="typical")
CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "deficit": {"deficit": lambda self, d: torch.exp(-2.0 * d)},
    "log_ratio": {"log_ratio": lambda self, q: -2.0 * torch.log(q)},
    "log_slope": {"log_slope": lambda self, q: 0.0 * q},
    "supremum": {"supremum": 3.0},
    "bounded": {"bounded": None},
    "clamped": {"clamped": None},
    "name": {"name": "mine"},
    "triton": {"triton": KLMixture.triton},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("base", BUILT_IN, ids=lambda base: base.__name__)
def test_a_subclass_never_passes_for_the_divergence_it_is_made_of(base, changes):
    changed = type("Changed", (base,), dict(changes))()
    for function in (mod_fused.log_probs, mod_fused.sample):
        with pytest.raises(TypeError, match="register_divergence.*got Changed"):
            function(REF, POLICIES, [0.5, 0.4], divergence=changed)
    assert changed != base() and base() != changed


@pytest.mark.parametrize("base", BUILT_IN, ids=lambda base: base.__name__)
def test_a_registered_subclass_runs_its_own_mathematics(op, base):
    own = {"name": "own", "supremum": 0.0, "bounded": False, "clamped": True}
    divergence = mod_fused.register_divergence(type("Own", (KLMixture, base), own)())
    if op.backend == "cpu":
        with pytest.raises(ValueError, match="does not know the registered divergence 'own'"):
            op.log_probs(REF, POLICIES, [0.5, 0.4], divergence=divergence)
        return
    got = op.log_probs(REF, POLICIES, [0.5, 0.4], divergence=divergence).double().exp().numpy()
    for row in range(2):
        expected = exact(REF[row], [p[row] for p in POLICIES], [0.5, 0.4])
        assert 0.5 * np.abs(got[row] - expected).sum() <= 2e-5


# --- the same, a copy, another ------------------------------------------------------------------


class Stateful(KLMixture):
    """Holds numbers, a tensor and what else a divergence may be made of."""

    name = "stateful"

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.table = {"coefficients": [torch.tensor([scale, 2.0]), np.array([1.0, 2.0])]}


@pytest.mark.parametrize("make", [Stateful, KLMixture])
def test_copies_of_a_registered_divergence_are_that_one(make):
    registered = mod_fused.register_divergence(make())
    copies = [copy.copy(registered), copy.deepcopy(registered), make()]
    copies.append(pickle.loads(pickle.dumps(registered)))
    for x in copies:
        assert get_divergence(x) is registered and x == registered and hash(x) == hash(registered)
    seeds = torch.arange(2)
    drawn = [
        mod_fused.sample(REF, POLICIES, [0.5, 0.4], divergence=x, seed=seeds).logprobs
        for x in [registered.name, *copies]
    ]
    assert all(torch.equal(x, drawn[0]) for x in drawn)


def test_a_name_alone_makes_no_divergence_equal():
    registered = mod_fused.register_divergence(Stateful())
    changed = copy.deepcopy(registered)
    changed.table["coefficients"][0][1] = 2.5
    instance = copy.deepcopy(registered)
    instance.deficit = lambda d: -d
    for other in (
        Stateful(2.0),
        changed,
        instance,
        named("stateful"),
        type("S", (Stateful,), {})(),
    ):
        assert other != registered
        with pytest.raises(TypeError, match="'stateful', which is not the registered one"):
            mod_fused.log_probs(REF, POLICIES, [0.5, 0.4], divergence=other)


@pytest.mark.parametrize("make", [*BUILT_IN, KLMixture])
def test_a_known_divergence_cannot_be_changed(make):
    known = mod_fused.register_divergence(make()) if make is KLMixture else make()
    for name in ("alpha", "name", "supremum", "deficit", "anything"):
        with pytest.raises(AttributeError):
            setattr(known, name, 0.3)
    assert mod_fused.get_divergence(known) == known


@pytest.mark.parametrize("make", BUILT_IN)
@pytest.mark.parametrize("change", [{"name": "jsd"}, {"alpha": "half"}, {"log_slope": torch.exp}])
def test_a_built_in_divergence_that_was_changed_all_the_same_is_refused(make, change):
    changed = make()
    vars(changed).update(change)
    with pytest.raises((TypeError, ValueError), match="did not set|alpha must be a number"):
        mod_fused.log_probs(REF, POLICIES, [0.5, 0.4], divergence=changed)


def test_another_alpha_in_the_object_is_another_alpha_everywhere(op):
    changed = AlphaDivergence(0.5)
    vars(changed)["alpha"] = 0.3
    assert changed.name == "alpha:0.3" and changed == AlphaDivergence(0.3)
    arguments = REF, POLICIES, [0.5, 0.4]
    expected = op.log_probs(*arguments, divergence="alpha:0.3")
    assert torch.equal(op.log_probs(*arguments, divergence=changed), expected)


# --- numbers ------------------------------------------------------------------------------------


def test_numbers_depend_on_names_alone():
    mod_fused.register_divergence(named("first"))
    second = number_of(mod_fused.register_divergence(named("second")))
    for table in (divergences._CANONICAL, divergences._NUMBERED, divergences._NUMBERS):
        for _ in range(2):
            table.pop(next(reversed(table)))  # as in another process
    assert number_of(mod_fused.register_divergence(named("second"))) == second
    numbers = [number_of(get_divergence(name)) for name in divergences._CANONICAL]
    assert len(set(numbers)) == len(numbers) and 3 not in numbers  # which is alpha's
    assert number_of(get_divergence("alpha:0.25")) == 3


def test_a_number_that_nobody_registered_is_refused():
    packed = [REF, *POLICIES], [None] * 7, [1, 40, 0, 1, 10**6], [0.0, 1.0, 0.5, 0.4]
    with pytest.raises(ValueError, match="1000000 belongs to none that is registered"):
        torch.ops.mod_fused.log_probs_torch(*packed)


def test_registered_divergences_and_objects_are_traced(kl_mixture):
    def step(ref: torch.Tensor, divergence: Divergence) -> Any:
        options = {"seed": 1, "divergence": divergence, "backend": "torch"}
        return mod_fused.sample(ref, POLICIES, [0.5, 0.4], **options)[:2]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for divergence in (kl_mixture, *(AlphaDivergence(a) for a in (0.1, 0.2, 0.3)), ForwardKL()):
        for x, y in zip(compiled(REF, divergence), step(REF, divergence), strict=True):
            assert torch.equal(x, y)
