"""`python -m bench.alignment.sizes`: three policies of different sizes, which no soup can merge.

Each first imitates the reference, then is tuned for one reward. MOD of the three stands beside
choosing one of the models.
"""

from __future__ import annotations

import copy
import functools
import sys
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mod_fused import world
from mod_fused.decoding.options import DEFAULT_PLAUSIBILITY
from mod_fused.decoding.sequences import take
from mod_fused.training.fitting import fit, shuffled
from mod_fused.world.rewards import find_topic

from . import command, policies, statistics
from .decoding import DECODE_SEED, SEED, Array, decode, reference
from .loop import Phase, load
from .policies import CORNERS, KEY, Policy, Weights
from .statistics import REWARD_SCALE, over_seeds

#: Layers, and tokens of padding in the vocabulary, of the policy for each objective.
SHAPES = {"helpful": (1, 0), "harmless": (2, 56), "humorous": (4, 0)}
NOTHING: Weights = (0.0, 0.0, 0.0)  # the reference
BEST_OF = 16


class Sizes(NamedTuple):
    """How much is trained and drawn."""

    train_prompts: int = 1200  # with `train.GROUP` answers each
    imitation_steps: int = 700
    policy_steps: int = 200
    seeds: int = 3  # trainings
    prompts: int = 200  # held out, one answer to each
    routing_prompts: int = 300  # not held out: where models are chosen
    pool: int = 64  # answers of the reference to each held-out prompt
    weights: tuple[Weights, ...] = (*KEY, *CORNERS)


TINY = Sizes(4, 2, 2, 2, 4, 4, 16, (KEY[0], CORNERS[0]))


class Cell(NamedTuple):
    """MOD at one weight vector, which may be one of the models; training -1 is the reference's."""

    weights: Weights
    seed: int
    held_out: bool = True
    cut: bool = False  # without what the reference finds less likely than 1e-3 of its peak


def cells(sizes: Sizes) -> list[Cell]:
    """All cells."""
    seeds, mixes = range(sizes.seeds), dict.fromkeys((*sizes.weights, *CORNERS))
    out = [Cell(w, s, cut=cut) for cut in (False, True) for s, w in product(seeds, mixes)]
    out += [Cell(w, s, held_out=False) for s, w in product(seeds, CORNERS)]
    return [*out, Cell(NOTHING, -1), Cell(NOTHING, -1, held_out=False)]


def build(objective: str) -> Any:
    """A model of the objective's size with random weights, else like the reference."""
    model, (layers, padding) = reference()[0], SHAPES[objective]
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    config.vocab_size += padding
    return type(model)(config)


def _imitate(work: Path, sizes: Sizes, objective: str) -> dict[str, Any]:
    """A model that has learned the reference's next-token distributions on its answers."""
    torch.manual_seed(SEED)
    model, (teacher, tokenizer) = build(objective), reference()
    answers = policies.load_answers(work, 0)
    order = shuffled(len(answers.prompts), sizes.imitation_steps * 32, SEED)

    def loss_at(step: int) -> torch.Tensor:
        batch = take(answers.batch, order[step * 32 : (step + 1) * 32])
        keep = batch.response_mask[:, 1:].bool()

        def log_probs(of: Any) -> torch.Tensor:
            hidden = of.model(input_ids=batch.ids, attention_mask=batch.attention_mask)[0]
            return of.lm_head(hidden[:, :-1][keep]).log_softmax(-1)[:, : len(tokenizer)]

        with torch.no_grad():
            wanted = log_probs(teacher)
        return (wanted.exp() * (wanted - log_probs(model))).sum(-1).mean()

    losses = fit(model, sizes.imitation_steps, 4e-3, loss_at, None)[-20:]
    count = sum(p.numel() for p in model.parameters())
    record = {"parameters": count, "vocabulary": model.config.vocab_size}
    return {"model": model.state_dict(), "record": record | {"loss": float(np.mean(losses))}}


def _tune(work: Path, sizes: Sizes, policy: Policy) -> dict[str, Any]:
    objective = world.OBJECTIVES[policy.weights.index(1.0)]
    model = build(objective)
    model.load_state_dict(load(work, "imitations", objective)["model"])
    return policies.train_policy(work, sizes, policy, model)


@functools.lru_cache(maxsize=1)
def _trained(work: Path, seed: int) -> list[Any]:
    """The policies of one training."""
    models = [build(objective) for objective in world.OBJECTIVES]
    for model, weights in zip(models, CORNERS, strict=True):
        found = load(work, "trainings", Policy("reverse_kl", weights, seed))
        model.load_state_dict(found["model"])
    return [model.eval() for model in models]


def _prompts(sizes: Sizes, held_out: bool) -> list[str]:
    count = sizes.prompts if held_out else sizes.routing_prompts
    return world.prompts(count, DECODE_SEED, held_out=held_out)


def _measure(work: Path, sizes: Sizes, cell: Cell) -> dict[str, Array]:
    models = [reference()[0], *_trained(work, max(cell.seed, 0))]
    options = {"plausibility": DEFAULT_PLAUSIBILITY} if cell.cut else {}
    return decode(models, cell.weights, _prompts(sizes, cell.held_out), **options)


def phases(sizes: Sizes) -> list[Phase]:
    """All jobs."""
    seeds = range(sizes.seeds)
    wanted = [Policy("reverse_kl", w, s) for s in seeds for w in CORNERS]
    return [
        Phase("answers", policies.draw_answers, seeds),
        Phase("pool", policies.draw_pool, policies.pool_parts(sizes)),
        Phase("imitations", _imitate, list(SHAPES)),
        Phase("trainings", _tune, wanted),
        Phase("cells", _measure, cells(sizes)),
    ]


def _values(found: dict[str, Array], weights: Weights) -> Array:
    """[N, 3]: weighted reward, KL and J = 10 w r - KL of each answer."""
    weighted, kl = found["rewards"][0] @ np.array(weights), found["kl"][0]
    return np.stack([weighted, kl, REWARD_SCALE * weighted - kl], axis=1)


def _methods(work: Path, sizes: Sizes, weights: Weights, seed: int) -> dict[str, Array]:
    """By method: the means [3] over the held-out prompts, with the policies of one training. "cut":
    by the reference."""

    def of(*cell: Any) -> dict[str, Array]:
        return load(work, "cells", Cell(*cell))

    def each(held_out: bool) -> Array:
        found = [of(NOTHING, -1, held_out), *(of(w, seed, held_out) for w in CORNERS)]
        return np.stack([_values(x, weights) for x in found])

    topics, asked = ([find_topic(p) for p in _prompts(sizes, x)] for x in (False, True))
    known, found = each(False), each(True)
    pool = np.concatenate([load(work, "pool", p) for p in policies.pool_parts(sizes)], axis=1)
    best = statistics.best_of(pool.astype(float), np.array(weights), BEST_OF) @ np.array(weights)
    bound = statistics.best_of_kl(BEST_OF)
    out = {"MOD": _values(of(weights, seed), weights).mean(0)}
    out["MOD, cut"] = _values(of(weights, seed, True, True), weights).mean(0)
    policies_cut = [_values(of(w, seed, True, True), weights).mean(0) for w in CORNERS]
    out["best policy in hindsight, cut"] = max(policies_cut, key=lambda x: x[2])
    for name, by in {"reward": 0, "J": 2}.items():
        out[f"best model, by {name}"] = statistics.routed([], known, asked, found, by)
        out[f"routed by topic, by {name}"] = statistics.routed(topics, known, asked, found, by)
    ratios = [of(w, seed)["log_ratios"][0] for w in CORNERS]
    out["a policy at random"] = statistics.at_random(found[1:], np.stack(ratios), np.array(weights))
    out["reference"] = found[0].mean(0)
    out[f"best of {BEST_OF}"] = np.array([best.mean(), bound, REWARD_SCALE * best.mean() - bound])
    return out


def _records(work: Path, sizes: Sizes, weights: Weights) -> list[dict[str, Any]]:
    """Each method at one weight vector: means over the trainings, and those of MOD, cut if the
    method is, less the method."""
    found = [_methods(work, sizes, weights, seed) for seed in range(sizes.seeds)]
    records = []
    for method in found[0]:
        record: dict[str, Any] = {"weights": weights, "method": method}
        for k, name in enumerate(("weighted", "kl", "objective")):
            over = [x[method][k] for x in found]
            untrained = method in ("reference", f"best of {BEST_OF}")
            record[name] = [round(over[0], 5)] if untrained else over_seeds(over)
            mod = "MOD, cut" if method.endswith(", cut") else "MOD"
            if method != mod and name != "kl":
                record[f"{name} lead"] = over_seeds([x[mod][k] - x[method][k] for x in found])
        records.append(record)
    return records


def summary(work: Path, sizes: Sizes) -> dict[str, Any]:
    """The records of all methods, and what was trained."""
    models = []
    for objective, weights in zip(world.OBJECTIVES, CORNERS, strict=True):
        tuned = [
            load(work, "trainings", Policy("reverse_kl", weights, s))["record"]["loss"]
            for s in range(sizes.seeds)
        ]
        record = {"objective": objective, "layers": SHAPES[objective][0]}
        record |= load(work, "imitations", objective)["record"]
        models.append(record | {"tuned": [round(x, 4) for x in tuned]})
    every = [record for w in sizes.weights for record in _records(work, sizes, w)]
    return {"sizes": sizes._asdict(), "models": models, "methods": every}


if __name__ == "__main__":
    raise SystemExit(command.main("bench.alignment.sizes", sys.modules[__name__], summary))
