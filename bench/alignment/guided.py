"""The jobs of the study of value guidance for `loop.run`: trainings and decodes. It compares
tokenwise and blockwise control, best-of-N, MOD with one policy, and mixes of two objectives."""

from __future__ import annotations

import functools
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from mod_fused import Ensemble, guidance, recipes, world
from mod_fused.decoding.sequences import Rollouts, take
from mod_fused.training import embedded_policies as train
from mod_fused.training.embedded_scorers import new_scorer
from mod_fused.training.scorers import fit_scorer

from . import policies
from .decoding import BATCH, DECODE_SEED, SEED, Array, batches, decode, reference, scores
from .loop import Phase, load
from .policies import Policy, draw_answers, load_answers, load_policy
from .statistics import REWARD_SCALE, best_of_kl

PANELS = ("humorous", "helpful")
PAIR = ("helpful", "humorous")  # the two objectives decoded for at once
BETA = REWARD_SCALE  # J = w r - KL / BETA; also of the trainings by soft values, MAVIS and DPO
FUDGE_ABOVE = 0.5
LENGTH = "length"  # the reward log(T / T_max) of Controlled Decoding's first experiment
COLUMNS = (*world.OBJECTIVES, LENGTH, "tokens")  # what is measured of an answer
#: By method: how its scorers are trained; all other methods have those of CD-FUDGE.
SCORERS = {"CD-Q": "cd_q", "soft values": "soft", "FUDGE": "fudge"}
SCORERS |= {"MAVIS": "mavis", "MAVIS at half strength": "mavis"}


class Sizes(NamedTuple):
    """How much is trained and drawn."""

    prompts: int = 100  # held out; one answer to each with every method
    strengths: tuple[float, ...] = (2.5, 5.0, 7.5, 10.0, 20.0)  # of CD, nats per unit of reward
    multiples: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)  # of soft values and FUDGE
    mod: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25)  # weights of the one policy
    ks: tuple[int, ...] = (2, 4, 8)
    block_lengths: tuple[int, ...] = (4, 8, 16, 32, 64)
    best_of: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128)  # the largest is the pool's size
    on_policy: tuple[float, ...] = (0.5, 1.0)  # weights of the policy that CD steers
    length: tuple[float, ...] = (1.0, 2.0, 4.0)  # strengths of the length reward
    kept: tuple[float, ...] = (0.0, 0.1, 0.2, 0.4)  # shares of it taken off the other reward
    train_prompts: int = 800  # with `train.GROUP` answers each, for all trainings but MAVIS
    held_out: int = 60  # of them, for early stopping
    steps: int = 250  # of a scorer at most
    slow_steps: int = 600  # of soft values and FUDGE, whose labels teach less
    rate: float = 3e-3  # of a scorer, at its peak
    batch: int = 32  # answers in a step of a scorer
    policy_steps: int = 120
    mavis_prompts: int = 150  # each with a tree of roll-outs
    iterations: int = 3  # of MAVIS at most
    mavis_steps: int = 100  # of each iteration at most
    seeds: int = 3  # trainings of two objectives
    # Of helpful and humorous.
    weights: tuple[tuple[float, float], ...] = (
        (1.0, 0.0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.0, 1.0),
    )  # fmt: skip


TINY = Sizes(
    prompts=6, strengths=(2.0, 20.0), multiples=(1.0,), mod=(1.0,), ks=(2,), block_lengths=(32,),
    best_of=(2,), on_policy=(0.5,), length=(2.0,), kept=(0.2,), train_prompts=4, held_out=0,
    steps=2, slow_steps=2, batch=4, policy_steps=1, mavis_prompts=4, iterations=1,
    mavis_steps=1, seeds=2, weights=((1.0, 0.0), (0.5, 0.5)),
)  # fmt: skip


class Point(NamedTuple):
    """One way to decode, at one setting."""

    table: str  # "one", "blocks", "policy", "length", "transfer" or "two"
    objectives: tuple[str, ...]  # of its scorers and policies
    method: str
    strengths: tuple[float, ...] = ()  # of the scorers; without: no scorer
    weights: tuple[float, ...] = ()  # of the policies; without: no policy
    blocks: tuple[int, int] | None = None  # K and their length; None: tokenwise
    base: str = "reference"  # what is steered: this, or the policy tuned for an objective
    seed: int = 0  # of the trainings


def points(sizes: Sizes) -> list[Point]:
    """All points to decode."""
    out, (k, *_) = [], sizes.ks[1:] or sizes.ks
    block = k, sizes.block_lengths[len(sizes.block_lengths) // 2]
    strong = sizes.strengths[1::2]
    for name, other in (PANELS, PANELS[::-1]):
        own = (name,)
        settings = dict.fromkeys(("CD-FUDGE", "CD-Q"), sizes.strengths)
        settings |= dict.fromkeys(("soft values", "FUDGE"), sizes.multiples)
        out.append(Point("one", own, "reference"))
        out += [Point("one", own, by, (x,)) for by, xs in settings.items() for x in xs]
        out += [Point("one", own, "MOD", weights=(w,)) for w in sizes.mod]
        every = product(sizes.block_lengths, sizes.ks)
        out += [Point("blocks", own, "blockwise", (1.0,), blocks=(k, n)) for n, k in every]
        for w in sizes.on_policy:
            out += [Point("policy", own, "CD", (x,), (w,)) for x in sizes.strengths[:2]]
            for blocks in (block, (block[0], max(sizes.block_lengths))):
                out.append(Point("policy", own, "CD, blockwise", (1.0,), (w,), blocks))
        moved = Point("transfer", own, "base", base=other)
        out += [moved] + [moved._replace(method="CD", strengths=(x,)) for x in strong]
        out.append(moved._replace(method="CD, blockwise", strengths=(1.0,), blocks=block))
    out.append(Point("length", (LENGTH,), "reference"))
    out += [Point("length", (LENGTH,), "CD", (x,)) for x in sizes.length]
    out += [Point("length", (LENGTH,), "CD, blockwise", (1.0,), blocks=(k, block[1]))
            for k in sizes.ks]  # fmt: skip
    for share, name in product(sizes.kept, PANELS):
        both = Point("length", (name, LENGTH), "CD", (strong[0], -strong[0] * share))
        blockwise = both._replace(method="CD, blockwise", strengths=(1.0, -share), blocks=block)
        out += [both, blockwise]
    for seed, w in product(range(sizes.seeds), sizes.weights):
        tilt = tuple(BETA * x for x in w)
        half = tuple(x / 2 for x in tilt)
        for by in ("MAVIS", "CD"):
            out.append(Point("two", PAIR, by, tilt, seed=seed))
            out.append(Point("two", PAIR, f"{by} at half strength", half, seed=seed))
        out.append(Point("two", PAIR, "soft values", w, seed=seed))
        for by in ("MOD", "soup", "retrained"):
            out.append(Point("two", PAIR, by, weights=w, seed=seed))
    return list(dict.fromkeys(out))


def scorers_of(point: Point) -> list[tuple[str, str, int]]:
    """The trainings of a point's scorers: method, objective, seed."""
    method = SCORERS.get(point.method, "cd_fudge")
    names = point.objectives[: len(point.strengths)]
    return [(method, name, point.seed) for name in names]


def _tuned(objectives: tuple[str, ...], weights: tuple[float, ...], seed: int) -> Policy:
    of = dict(zip(objectives, weights, strict=True))
    return Policy("reverse_kl", tuple(of.get(name, 0.0) for name in world.OBJECTIVES), seed)


def policies_of(point: Point) -> list[Policy]:
    """The trainings of a point's policies."""
    if point.method == "retrained":
        return [_tuned(point.objectives, point.weights, point.seed)]
    names = point.objectives[: len(point.weights)]
    return [_tuned((name,), (1.0,), point.seed) for name in names]


def _columns(rewards: Array, lengths: Array) -> Array:
    return np.column_stack([rewards, np.log(lengths / train.MAX_NEW_TOKENS), lengths])


@functools.lru_cache(maxsize=16)
def _scorer(work: Path, method: str, objective: str, seed: int) -> Any:
    scorer = new_scorer(reference()[0])
    scorer.load_state_dict(load(work, "scorers", (method, objective, seed))["model"])
    return scorer.eval()


def _pool(work: Path, sizes: Sizes, seed: int) -> Array:
    """[N, K, 7] of the reference's answers: `COLUMNS`, and values by the scorers of PANELS."""
    k = max(sizes.best_of)
    texts = [p for p in world.prompts(sizes.prompts, DECODE_SEED) for _ in range(k)]
    batch = train.sample(*reference(), texts, seed)
    parts = list(zip(batch.ids.split(BATCH), batch.attention_mask.split(BATCH), strict=True))
    rewards = scores(texts, train.response_texts(reference()[1], batch))
    columns = [_columns(rewards, batch.response_mask.sum(1).numpy())]
    for objective in PANELS:
        value = guidance.prefix_score([_scorer(work, "cd_fudge", objective, 0)])
        columns.append(torch.cat([value(*part) for part in parts]).numpy()[:, None])
    return np.concatenate(columns, 1).astype(float).reshape(sizes.prompts, k, -1)


def _train_scorer(work: Path, sizes: Sizes, scorer_of: tuple[str, str, int]) -> dict[str, Any]:
    """A dense scorer, trained by a method on the reference's answers (MAVIS: on those of its own
    policies) until it predicts held-out rewards no better."""
    method, objective, seed = scorer_of
    if method == "mavis":
        return _mavis(sizes, objective, seed)
    ref, a = reference()[0], load_answers(work, seed)
    columns = _columns(scores(a.prompts, a.responses), a.batch.response_mask.sum(1).numpy())
    rewards = torch.from_numpy(columns[:, COLUMNS.index(objective)]).float()
    if method == "fudge":
        rewards = (rewards > FUDGE_ABOVE).float()
    rollouts = Rollouts(*a.batch, torch.zeros(a.batch.ids.shape))
    rows = torch.arange(len(rewards))
    used, kept = rows.tensor_split([len(rows) - sizes.held_out * train.GROUP])
    scorer, held_out = new_scorer(ref), (take(rollouts, kept), rewards[kept]) if len(kept) else None
    fitted = fit_scorer(
        scorer, take(rollouts, used), rewards[used], method=method, reference=ref,
        beta=BETA if method == "soft" else None, batch_size=sizes.batch, peak_lr=sizes.rate,
        steps=sizes.slow_steps if method in ("soft", "fudge") else sizes.steps,
        held_out=held_out, seed=SEED + seed,
    )  # fmt: skip
    found = dict(fitted.correlations).get(fitted.best, [])
    return {"model": scorer.state_dict(), "steps": fitted.best, "correlations": found}


def _mavis(sizes: Sizes, objective: str, seed: int) -> dict[str, Any]:
    prompts = world.prompts(sizes.mavis_prompts + sizes.held_out, SEED + seed, held_out=False)
    scorer = new_scorer(reference()[0])
    history = guidance.train_mavis(
        scorer, *reference(), prompts[: sizes.mavis_prompts], world.REWARDS[objective], beta=BETA,
        iterations=sizes.iterations, branches=2, block_length=16,
        held_out_prompts=prompts[sizes.mavis_prompts :], max_new_tokens=train.MAX_NEW_TOKENS,
        seed=SEED + seed, steps=sizes.mavis_steps, batch_size=sizes.batch, peak_lr=sizes.rate,
    )  # fmt: skip
    return {"model": scorer.state_dict(), "history": history}


def _blockwise(
    models: list[Any], weights: list[float], prompts: list[str], score_fn: Any, k: int, length: int
) -> dict[str, Array]:
    """Best of K blocks, as `_measure`. KL is that of the models plus, for each block, the estimate
    of `best_of_kl` from the block's probability."""
    parts = []
    for part, seeds in batches(prompts, max(1, BATCH // k)):
        out = guidance.blockwise_best_of_k(
            Ensemble(models, reference()[1]), part, weights=weights, score_fn=score_fn, k=k,
            block_length=length, max_new_tokens=train.MAX_NEW_TOKENS, seed=seeds,
            plausibility=None, return_model_logprobs=True,
        )  # fmt: skip
        assert out.model_logprobs is not None
        drawn = out.logprobs.double()
        kl = drawn.sum(1) - out.model_logprobs[..., 0].double().sum(1)
        blocks = F.pad(drawn, (0, -drawn.shape[1] % length)).view(len(drawn), -1, length)
        chosen = best_of_kl(k, blocks.sum(2).exp().numpy())  # 0 behind the end
        found = _columns(scores(part, out.texts or ()), out.lengths.numpy())
        parts.append((found, kl.numpy() + chosen.sum(1)))
    return dict(zip(("scores", "kl"), map(np.concatenate, zip(*parts, strict=True)), strict=True))


def _measure(work: Path, sizes: Sizes, point: Point) -> dict[str, Array]:
    """One answer to each prompt: `COLUMNS` [N, 5], and log-ratios to the base [N]."""
    base = reference()[0]
    if point.base != "reference":
        base = load_policy(work, _tuned((point.base,), (1.0,), 0))
    models, weights = [base, *(load_policy(work, p) for p in policies_of(point))], [*point.weights]
    if point.method == "soup":
        models[1:] = [recipes.soup(models, weights)]
    if point.method in ("soup", "retrained"):
        weights = [1.0]
    transform = F.logsigmoid if point.method in ("soft values", "FUDGE") else None
    scorers = [guidance.Scorer(_scorer(work, *x), transform) for x in scorers_of(point)]
    tokenwise = bool(scorers) and point.blocks is None
    if not weights and not tokenwise:
        models, weights = [None, base], [1.0]
    prompts = world.prompts(sizes.prompts, DECODE_SEED)
    if point.blocks is not None:
        score_fn = guidance.prefix_score(scorers, point.strengths)
        return _blockwise(models, weights, prompts, score_fn, *point.blocks)
    options: dict[str, Any] = {}
    if tokenwise:
        options = {"value_fn": guidance.Guidance(scorers), "value_weights": [*point.strengths]}
    found = decode(models, weights, prompts, **options)
    if not found["valid"].all():
        raise ValueError(f"{point} has invalid steps")
    return {"scores": _columns(found["rewards"][0], found["length"][0]), "kl": found["kl"][0]}


def phases(sizes: Sizes) -> list[Phase]:
    """All jobs."""
    every = points(sizes)
    scorers = dict.fromkeys(x for point in every for x in scorers_of(point))
    tuned = dict.fromkeys(x for point in every for x in policies_of(point))
    return [
        Phase("answers", draw_answers, range(sizes.seeds)),
        Phase("trainings", policies.train_policy, [*tuned]),
        Phase("scorers", _train_scorer, [*scorers]),
        Phase("pool", _pool, [DECODE_SEED]),
        Phase("points", _measure, every),
    ]
