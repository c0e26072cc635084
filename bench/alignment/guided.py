"""The jobs of the study of value guidance for `loop.run`: trainings and decodes. It compares
tokenwise and blockwise control, best-of-N, MOD with one policy, and mixes of two objectives."""

from __future__ import annotations

import functools
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mod_fused import Ensemble, guidance, world
from mod_fused.decoding.sequences import Rollouts
from mod_fused.divergence import DIVERGENCES
from mod_fused.training import embedded_policies as train
from mod_fused.training.embedded_scorers import new_scorer
from mod_fused.training.scorers import fit_scorer, rewards_of

from .decoding import BATCH, DECODE_SEED, SEED, Array, batches, decode, reference, scores
from .loop import Phase, load
from .policies import Policy, draw_answers, load_answers, load_policy, train_policy
from .statistics import REWARD_SCALE

PANELS = ("humorous", "helpful")
PAIR = ("helpful", "humorous")  # the two objectives decoded for at once
PAIR_COLUMNS = [world.OBJECTIVES.index(name) for name in PAIR]
BETA = REWARD_SCALE  # total strength of two objectives, in nats per unit of reward
FUDGE_ABOVE = 0.5
ONE_STRENGTH = 10.0  # at which the divergences are compared


class Sizes(NamedTuple):
    """How much is trained and drawn."""

    prompts: int = 200  # held out; one answer to each with every method
    strengths: tuple[float, ...] = (1.0, 2.5, 5.0, 10.0, 20.0, 40.0)  # of tokenwise control
    fudge: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)  # of FUDGE's log-probability
    candidates: int = 50  # the reference's tokens that FUDGE scores
    blocks: tuple[int, ...] = (4, 8, 16)  # K
    block_length: int = 8
    best_of: tuple[int, ...] = (4, 16)  # N; the largest is also the number of answers drawn
    mod: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5, 2.0)  # weights of the one DPO policy
    train_prompts: int = 800  # with `train.GROUP` answers each, for all trainings but MAVIS
    steps: int = 200  # of CD-Q and of CD-FUDGE beside it
    fudge_steps: int = 120
    policy_steps: int = 80
    mavis_steps: int = 80  # each iteration
    batch: int = 32  # answers in a step of a scorer
    mavis_prompts: int = 500
    iterations: int = 3
    # Of helpful and humorous; policies are retrained for the mixes among them.
    weights: tuple[tuple[float, float], ...] = (
        (1.0, 0.0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.0, 1.0),
    )  # fmt: skip


TINY = Sizes(
    prompts=6, strengths=(2.0, 20.0), fudge=(1.0,), blocks=(2,), block_length=32, best_of=(2,),
    mod=(1.0,), train_prompts=4, steps=2, fudge_steps=1, policy_steps=1, mavis_steps=1, batch=4,
    mavis_prompts=4, iterations=1, weights=((1.0, 0.0), (0.5, 0.5)),
)  # fmt: skip


class Point(NamedTuple):
    """One method at one setting: a strength, K, a weight, or the weights of two objectives."""

    objective: str  # the panel, or "both"
    method: str
    setting: Any


#: Tokenwise control by scorers trained here: the names of their methods.
TRAINED = {"CD-Q": "cd_q", "CD-FUDGE, as CD-Q": "cd_fudge"}


def points(sizes: Sizes) -> list[Point]:
    """All points to decode."""
    out = []
    for objective in PANELS:
        settings: dict[str, Any] = {"reference": (0.0,), "CD-FUDGE": sizes.strengths}
        settings |= {f"under {d}": (ONE_STRENGTH,) for d in DIVERGENCES}
        settings |= {name: sizes.strengths for name in TRAINED}
        settings |= {"FUDGE": sizes.fudge, "MOD": sizes.mod, "blockwise": sizes.blocks}
        out += [Point(objective, name, x) for name, xs in settings.items() for x in xs]
    for pair in sizes.weights:
        methods = ("MAVIS", "CD", "MOD", *["retrained"] * (0.0 not in pair))
        out += [Point("both", name, pair) for name in methods]
    return out


@functools.cache
def _shipped() -> dict[str, tuple[Any, Any]]:
    """By objective: the policy and the scorer of the package."""
    policies = Ensemble.embedded(list(PAIR), dtype=torch.float32).models[1:]
    scorers = guidance.Guidance.embedded(list(PAIR)).scorers
    return {n: (p, s.model) for n, p, s in zip(PAIR, policies, scorers, strict=True)}


@functools.cache
def _scorer(work: Path, method: str, objective: str) -> Any:
    scorer = new_scorer(reference()[0])
    scorer.load_state_dict(load(work, "scorers", (method, objective))["model"])
    return scorer.eval()


def _pool(work: Path, sizes: Sizes, seed: int) -> Array:
    """[N, K, 5]: rewards of the reference's answers, and their values by the scorers of PANELS."""
    texts = [
        p for p in world.prompts(sizes.prompts, DECODE_SEED) for _ in range(max(sizes.best_of))
    ]
    batch = train.sample(*reference(), texts, seed)
    parts = list(zip(batch.ids.split(BATCH), batch.attention_mask.split(BATCH), strict=True))
    columns = [scores(texts, train.response_texts(reference()[1], batch))]
    for objective in PANELS:
        value = guidance.prefix_score([_shipped()[objective][1]])
        columns.append(torch.cat([value(*part) for part in parts]).numpy()[:, None])
    return np.concatenate(columns, 1).astype(float).reshape(sizes.prompts, -1, 5)


def _train_scorer(work: Path, sizes: Sizes, scorer_of: tuple[str, str]) -> dict[str, Any]:
    """A dense scorer trained by a method for an objective, on the reference's answers but MAVIS's;
    with the statistics of MAVIS's iterations."""
    method, objective = scorer_of
    if method == "mavis":
        return _mavis(sizes, objective)
    ref, a = reference()[0], load_answers(work, SEED)
    scorer, rewards = new_scorer(ref), rewards_of(world.REWARDS[objective], a.prompts, a.responses)
    steps = sizes.steps
    if method == "fudge":
        rewards, steps = (rewards > FUDGE_ABOVE).float(), sizes.fudge_steps
    rollouts = Rollouts(*a.batch, torch.zeros(a.batch.ids.shape))
    fit_scorer(
        scorer, rollouts, rewards, method=method, reference=ref, steps=steps,
        batch_size=sizes.batch, seed=SEED,
    )  # fmt: skip
    return {"model": scorer.state_dict()}


def _mavis(sizes: Sizes, objective: str) -> dict[str, Any]:
    prompts = world.prompts(sizes.mavis_prompts, SEED, held_out=False)
    scorer = new_scorer(reference()[0])
    history = guidance.train_mavis(
        scorer, *reference(), prompts, world.REWARDS[objective], beta=BETA,
        iterations=sizes.iterations, max_new_tokens=train.MAX_NEW_TOKENS, seed=SEED,
        steps=sizes.mavis_steps, batch_size=sizes.batch,
    )  # fmt: skip
    return {"model": scorer.state_dict(), "history": history.iterations}


def mixed_policy(pair: tuple[float, float]) -> Policy:
    """The policy tuned for the mix."""
    of = dict(zip(PAIR, pair, strict=True))
    return Policy("reverse_kl", tuple(of.get(name, 0.0) for name in world.OBJECTIVES), SEED)


def _blockwise(sizes: Sizes, objective: str, k: int) -> dict[str, Array]:
    """Best of K blocks by the shipped scorer's value of the prefix; its KL is the bound."""
    alone, parts = Ensemble([reference()[0]], reference()[1]), []
    score_fn = guidance.prefix_score([_shipped()[objective][1]])
    for part, seeds in batches(world.prompts(sizes.prompts, DECODE_SEED), max(1, BATCH // k)):
        out = guidance.blockwise_best_of_k(
            alone, part, score_fn=score_fn, k=k, block_length=sizes.block_length,
            max_new_tokens=train.MAX_NEW_TOKENS, seed=seeds,
        )  # fmt: skip
        parts.append((scores(part, out.texts or ()), out.kl_bound.double().numpy()))
    rewards, kl = (np.concatenate(x) for x in zip(*parts, strict=True))
    return {"rewards": rewards, "kl": kl}


def _measure(work: Path, sizes: Sizes, point: Point) -> dict[str, Array]:
    """One answer to each prompt: rewards [N, 3] and log-ratios, or the bound on KL, [N]."""
    objective, method, x = point
    if method == "blockwise":
        return _blockwise(sizes, objective, x)
    models, weights, options = [reference()[0]], [], {}
    if method == "reference":
        models, weights = [None, *models], [1.0]
    elif method == "MOD":
        names = PAIR if objective == "both" else [objective]
        models += [_shipped()[name][0] for name in names]
        weights = list(x) if objective == "both" else [x]
    elif method == "retrained":
        models, weights = [*models, load_policy(work, mixed_policy(x))], [1.0]
    elif method == "MAVIS":
        value_models = [_scorer(work, "mavis", name) for name in PAIR]
        options = guidance.mavis(value_models, x, beta=BETA, candidates=None)
    elif method == "CD":
        scorers = [_shipped()[name][1] for name in PAIR]
        options = guidance.controlled_decoding(scorers, [BETA * w for w in x])
    elif method == "FUDGE":
        scorer = _scorer(work, "fudge", objective)
        options = guidance.fudge(scorer, candidates=sizes.candidates, strength=x)
    else:
        trained = TRAINED.get(method)
        scorer = _scorer(work, trained, objective) if trained else _shipped()[objective][1]
        options = guidance.controlled_decoding([scorer], [x])
        if method.startswith("under "):
            options["divergence"] = method.removeprefix("under ")
    found = decode(models, weights, world.prompts(sizes.prompts, DECODE_SEED), **options)
    if not found["valid"].all():
        raise ValueError(f"{method} at {x} has invalid steps for {objective}")
    return {"rewards": found["rewards"][0], "kl": found["kl"][0]}


def phases(sizes: Sizes) -> list[Phase]:
    """All jobs."""
    methods = (*TRAINED.values(), "fudge", "mavis")
    mixes = [mixed_policy(pair) for pair in sizes.weights if 0.0 not in pair]
    return [
        Phase("answers", draw_answers, [SEED]),
        Phase("scorers", _train_scorer, [*product(methods, PANELS)]),
        Phase("trainings", train_policy, mixes),
        Phase("pool", _pool, [DECODE_SEED]),
        Phase("points", _measure, points(sizes)),
    ]
