"""The jobs of the study of value guidance for `loop.run`: trainings and decodes. It compares
tokenwise and blockwise control, best-of-N, MOD with one policy, and mixes of two objectives."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mod_fused import Ensemble, guidance, world
from mod_fused.decoding.sequences import Rollouts
from mod_fused.divergence import DIVERGENCES
from mod_fused.torch_kernels.philox import split_mix
from mod_fused.training import embedded_policies as train
from mod_fused.training.embedded_scorers import new_scorer
from mod_fused.training.scorers import fit_scorer, rewards_of

from .decoding import BATCH, DECODE_SEED, SEED, Array, decode, reference, scores
from .loop import Job, Phases, load
from .policies import Policy, load_answers, load_policy, train_policy
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

    @property
    def name(self) -> str:
        """The unique name of its file."""
        return f"{self.objective}-{self.method}-{self.setting}"


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
def _scorer(work: Path, name: str) -> Any:
    scorer = new_scorer(reference()[0])
    scorer.load_state_dict(load(work, name)["model"])
    return scorer.eval()


def _answers(work: Path, sizes: Sizes) -> train.Answers:
    return train.draw_answers(*reference(), sizes.train_prompts, SEED)


def _pool(work: Path, sizes: Sizes) -> Array:
    """[N, K, 5]: rewards of the reference's answers, and their values by the scorers of PANELS."""
    texts = [
        p for p in world.prompts(sizes.prompts, DECODE_SEED) for _ in range(max(sizes.best_of))
    ]
    batch = train.sample(*reference(), texts, DECODE_SEED)
    parts = list(zip(batch.ids.split(BATCH), batch.attention_mask.split(BATCH), strict=True))
    columns = [scores(texts, train.response_texts(reference()[1], batch))]
    for objective in PANELS:
        value = guidance.prefix_score([_shipped()[objective][1]])
        columns.append(torch.cat([value(*part) for part in parts]).numpy()[:, None])
    return np.concatenate(columns, 1).astype(float).reshape(sizes.prompts, -1, 5)


def _fit(work: Path, sizes: Sizes, objective: str, method: str, steps: int) -> dict[str, Any]:
    """A dense scorer trained on the reference's answers."""
    ref, a = reference()[0], load_answers(work, SEED)
    scorer, rewards = new_scorer(ref), rewards_of(world.REWARDS[objective], a.prompts, a.responses)
    if method == "fudge":
        rewards = (rewards > FUDGE_ABOVE).float()
    rollouts = Rollouts(*a.batch, torch.zeros(a.batch.ids.shape))
    fit_scorer(
        scorer, rollouts, rewards, method=method, reference=ref, steps=steps,
        batch_size=sizes.batch, seed=SEED,
    )  # fmt: skip
    return {"model": scorer.state_dict()}


def _mavis(work: Path, sizes: Sizes, objective: str) -> dict[str, Any]:
    """MAVIS's value model, and the statistics of its iterations."""
    prompts = world.prompts(sizes.mavis_prompts, SEED, held_out=False)
    scorer = new_scorer(reference()[0])
    history = guidance.train_mavis(
        scorer, *reference(), prompts, world.REWARDS[objective], beta=BETA,
        iterations=sizes.iterations, max_new_tokens=train.MAX_NEW_TOKENS, seed=SEED,
        steps=sizes.mavis_steps, batch_size=sizes.batch,
    )  # fmt: skip
    return {"model": scorer.state_dict(), "history": history}


def _retrain(work: Path, sizes: Sizes, pair: tuple[float, float]) -> dict[str, Any]:
    """A policy tuned for the mix."""
    of = dict(zip(PAIR, pair, strict=True))
    policy = Policy("reverse_kl", tuple(of.get(name, 0.0) for name in world.OBJECTIVES), SEED)
    model, _ = train_policy(load_answers(work, SEED), policy, sizes.policy_steps)
    return {"model": model.state_dict()}


def _blockwise(sizes: Sizes, objective: str, k: int) -> dict[str, Array]:
    """Best of K blocks by the shipped scorer's value of the prefix; its KL is the bound."""
    prompts = world.prompts(sizes.prompts, DECODE_SEED)
    noise = split_mix(DECODE_SEED, len(prompts), torch.device("cpu")).tolist()
    alone, score = Ensemble([reference()[0]], reference()[1]), _shipped()[objective][1]
    each, parts = max(1, BATCH // k), []
    for start in range(0, len(prompts), each):
        part = prompts[start : start + each]
        out = guidance.blockwise_best_of_k(
            alone, part, score_fn=guidance.prefix_score([score]), k=k,
            block_length=sizes.block_length, max_new_tokens=train.MAX_NEW_TOKENS,
            seed=noise[start : start + each],
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
        models, weights = [*models, load_policy(work, f"policy-{x}")], [1.0]
    elif method == "MAVIS":
        value_models = [_scorer(work, f"mavis-{name}") for name in PAIR]
        options = guidance.mavis(value_models, x, beta=BETA, candidates=None)
    elif method == "CD":
        scorers = [_shipped()[name][1] for name in PAIR]
        options = guidance.controlled_decoding(scorers, [BETA * w for w in x])
    elif method == "FUDGE":
        scorer = _scorer(work, f"fudge-{objective}")
        options = guidance.fudge(scorer, candidates=sizes.candidates, strength=x)
    else:
        trained = TRAINED.get(method)
        scorer = _scorer(work, f"{trained}-{objective}") if trained else _shipped()[objective][1]
        options = guidance.controlled_decoding([scorer], [x])
        if method.startswith("under "):
            options["divergence"] = method.removeprefix("under ")
    found = decode(models, weights, world.prompts(sizes.prompts, DECODE_SEED), **options)
    if not found["valid"].all():
        raise ValueError(f"{method} at {x} has invalid steps for {objective}")
    return {"rewards": found["rewards"][0], "kl": found["kl"][0]}


def phases(sizes: Sizes) -> Phases:
    """All jobs."""
    steps = {method: sizes.steps for method in TRAINED.values()} | {"fudge": sizes.fudge_steps}
    trainings = [
        Job(f"{method}-{objective}", _fit, (sizes, objective, method, n))
        for objective in PANELS
        for method, n in steps.items()
    ]
    trainings += [Job(f"mavis-{objective}", _mavis, (sizes, objective)) for objective in PAIR]
    mixes = [pair for pair in sizes.weights if 0.0 not in pair]
    trainings += [Job(f"policy-{pair}", _retrain, (sizes, pair)) for pair in mixes]
    return [
        ("answers of the reference", [Job(f"answers-s{SEED}", _answers, (sizes,))]),
        ("trainings", trainings),
        ("pool", [Job("pool", _pool, (sizes,))]),
        ("points", [Job(p.name, _measure, (sizes, p)) for p in points(sizes)]),
    ]
