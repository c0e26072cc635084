"""Decodes the cells of the study and measures their answers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from mod_fused import Ensemble, recipes
from mod_fused.decoding.options import support_cut
from mod_fused.guidance import Guidance

from ..alignment.decoding import DECODE_SEED, Array, answers
from ..alignment.loop import Phase, load
from ..alignment.statistics import REWARD_SCALE, divergence_of_answers
from . import models, training
from .jobs import REVERSE_KL, Cell, Policy, Sizes, cells, needed, nonzero, policies, tried
from .prompts import conversations, questions
from .rewards import OBJECTIVES, scores

POOL_SEED = 1 << 40  # another for each half: neighbouring topics share no noise
#: By name: the options of `mod_fused.generate`. Resampled answers are weighted afterwards, which is
#: the mean over the choice that `num_candidates` makes.
RULES: dict[str, dict[str, Any]] = {
    "token by token": {},
    "own mass": {"sequence_history": True},
    "resampled": {"sequence_history": True},
}


def asked(sizes: Sizes, cell: Cell) -> list[str]:
    """The questions of a cell."""
    if cell.validation:
        return questions("validation", sizes.validation)
    count = getattr(sizes, cell.asked)
    return questions("held out", sizes.prompts)[cell.seed * sizes.many :][:count]


@functools.lru_cache(maxsize=3)
def _merged(work: Path, sizes: Sizes, policy: Policy) -> Any:
    base = training.load_pruned(work) if policy.pruned else training.base(sizes)
    return models.merged(base[0], training.adapter(work, policy))


def ensemble_of(work: Path, sizes: Sizes, cell: Cell) -> tuple[Ensemble, list[float]]:
    """The models of a cell and the weights to decode with."""
    reference, tokenizer = training.base(sizes)
    chosen = needed(cell)
    weights = [cell.weights[i] for i in nonzero(cell.weights)]
    if not chosen:
        return Ensemble([reference], tokenizer), []
    if cell.method == "soup":
        parts = [_merged(work, sizes, policy) for policy in chosen]
        return Ensemble([reference, recipes.soup([reference, *parts], weights)], tokenizer), [1.0]
    if any(policy.pruned for policy in chosen):
        parts = [_merged(work, sizes, policy) for policy in chosen]
        if cell.method == "sizes, corrected":
            # w f'(pi / pi_ref) with the pruned model as the reference of the policy tuned from it.
            parts.append(training.load_pruned(work)[0])
            weights.append(-weights[1])
        return Ensemble([reference, *parts], tokenizer), weights
    folders = [training.adapter(work, policy) for policy in chosen]
    ensemble = Ensemble.from_adapters(reference, folders, tokenizers=tokenizer)
    return ensemble, [1.0] if cell.method == "retrained" else weights


def measure(work: Path, sizes: Sizes, cell: Cell) -> dict[str, Array]:
    """The result of `answers` for a cell."""
    ensemble, weights = ensemble_of(work, sizes, cell)
    # The decoder's cut, for each method of the divergence: also for single policies and soups.
    cut = support_cut("auto", cell.tuned)
    options: dict[str, Any] = {"divergence": cell.tuned, "plausibility": cut}
    options |= RULES[cell.rule]
    if cell.method == "guided":
        names = [OBJECTIVES[i] for i in nonzero(cell.weights)]
        scorers = [training.load_scorer(work, sizes, name) for name in names]
        options["value_fn"] = Guidance(scorers, candidates=sizes.scored)
        options["value_weights"] = [cell.strength * x for x in cell.weights if x]
    if cell.method == "reference":  # alone, as a policy: its log-ratio to itself is 0
        ensemble, weights = Ensemble([None, *ensemble.models], ensemble.tokenizers * 2), [1.0]
    if cell.rule == "resampled":
        options["num_return_sequences"] = sizes.candidates
    # A question has the same noise with every method.
    options["seed"] = DECODE_SEED + cell.seed * sizes.many
    if cell.validation:
        options["seed"] = training.VALIDATION_SEED
    found = answers(
        ensemble, weights, conversations(asked(sizes, cell)), scores,
        batch=training.BATCH // options.get("num_return_sequences", 1),
        max_new_tokens=sizes.max_new_tokens, **options,
    )  # fmt: skip
    if not found["valid"].all():
        raise ValueError(f"{cell} has invalid steps")
    return found


def draw_pool(work: Path, sizes: Sizes, part: int) -> Array:
    """Rewards [N, K, 3] of the reference's answers to every second question, for best-of-N."""
    reference, tokenizer = training.base(sizes)
    found = answers(
        Ensemble([None, reference], tokenizer), [1.0],
        conversations(questions("held out", sizes.prompts)[part::2]), scores,
        batch=max(1, training.BATCH // sizes.pool), max_new_tokens=sizes.max_new_tokens,
        num_return_sequences=sizes.pool, seed=POOL_SEED * (part + 1),
    )  # fmt: skip
    return found["rewards"].swapaxes(0, 1).astype(float)


def guided(work: Path, sizes: Sizes) -> list[Cell]:
    """Guidance at the strengths with the most J on validation questions, on held-out ones."""
    best: dict[Any, tuple[float, Cell]] = {}
    for cell in tried(sizes):
        found = load(work, "tried", cell)
        objective = REWARD_SCALE * found["rewards"] @ np.array(cell.weights)
        mean = float((objective - divergence_of_answers(REVERSE_KL, found["kl"])).mean())
        best[cell.weights] = max(best.get(cell.weights, (-np.inf, cell)), (mean, cell))
    return [cell._replace(validation=False, asked="few") for _, cell in best.values()]


def measure_guided(work: Path, sizes: Sizes, place: int) -> tuple[Cell, dict[str, Array]]:
    """A cell of `guided`, and the result of `answers` for it."""
    cell = guided(work, sizes)[place]
    return cell, measure(work, sizes, cell)


def phases(sizes: Sizes) -> list[Phase]:
    """All jobs; makes sure that there is a model."""
    if not sizes.model:
        models.prepare(sizes.generated)
    every = policies(sizes)
    places = range(len({cell.weights for cell in tried(sizes)}))
    return [
        Phase("answers", training.draw_answers, range(sizes.seeds)),
        Phase("frozen", training.freeze, range(sizes.seeds)),
        Phase("scorers", training.train_scorer, OBJECTIVES[:2]),
        Phase("pruned", training.imitate, ["model"]),
        Phase("trainings", training.train_policy, every),
        Phase("pool", draw_pool, range(2)),
        Phase("cells", measure, cells(sizes)),
        Phase("tried", measure, tried(sizes)),
        Phase("guided", measure_guided, places),
    ]
