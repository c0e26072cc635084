"""What is trained and what is measured: sizes, weights, cells."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from mod_fused.sweep import simplex_grid

from ..problem import DIVERGENCES
from .measuring import Cell

CENTRE = (1 / 3, 1 / 3, 1 / 3)
MIDPOINTS = ((0.5, 0.5, 0.0), (0.5, 0.0, 0.5), (0.0, 0.5, 0.5))
KEY = (CENTRE, *MIDPOINTS)  # where everything is compared
CORNERS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
GRID = (*simplex_grid(3, 5), CENTRE)
SCALES = (0.5, 1.0, 1.5, 2.0, 3.0)  # sums of equal weights: reward against KL
EQUAL = tuple((scale / 3,) * 3 for scale in SCALES)
OUTSIDE = (
    (1.5, -0.5, 0.0),
    (-0.5, 0.0, 1.5),
    (1.0, 1.0, 0.0),
    (2.0, 0.0, 0.0),
    *(w for w in EQUAL if w != CENTRE),
)
VARIANTS = (("exact", False), ("zero", False), ("exact", True), ("zero", True))
REFERENCE = Cell("reference", "none", (0.0, 0.0, 0.0))


class Sizes(NamedTuple):
    """How much is trained and drawn.

    Attributes:
        train_prompts: prompts with `train.GROUP` answers each; 1800 is every training question.
        steps: of each policy.
        train_seeds: trainings of each policy that MOD and the soup use and of those retrained for
            equal weights, each on other answers in another order.
        prompts, samples: held-out prompts, answers to each (1 where greedy or mismatched).
        pool: answers of the reference to each prompt, for best-of-N and the optimum.
        divergences: tuned and mixed with.
        grid: weights of MOD and the soups.
        key: weights at which policies are retrained and all variants measured.
        outside: weights off the simplex.
    """

    train_prompts: int = 1800
    steps: int = 200
    train_seeds: int = 3
    prompts: int = 200
    samples: int = 2
    pool: int = 256
    divergences: tuple[str, ...] = DIVERGENCES
    grid: tuple[tuple[float, ...], ...] = GRID
    key: tuple[tuple[float, ...], ...] = KEY
    outside: tuple[tuple[float, ...], ...] = OUTSIDE


#: A run of every kind of job in half a minute, to see that it runs.
TINY = Sizes(
    train_prompts=8,
    steps=2,
    train_seeds=2,
    prompts=6,
    samples=2,
    pool=16,
    divergences=("reverse_kl", "jsd"),
    grid=(*CORNERS[:2], MIDPOINTS[0], CENTRE),
    key=(CENTRE, MIDPOINTS[0]),
    outside=OUTSIDE[-1:],
)


class Policy(NamedTuple):
    """One training."""

    divergence: str
    weights: tuple[float, ...]
    seed: int = 0

    @property
    def name(self) -> str:
        """A file name that no other training has."""
        weights = "_".join(f"{w:.3g}" for w in self.weights)
        return f"policy-{self.divergence.replace(':', '')}-{weights}-s{self.seed}"


def policies(sizes: Sizes) -> list[Policy]:
    """All trainings: single objectives and retrained mixtures, then the other seeds."""
    out = [Policy(d, w) for d in sizes.divergences for w in CORNERS]
    out += [Policy(d, w) for w in sizes.key for d in sizes.divergences]
    for seed in range(1, sizes.train_seeds):
        out += [Policy(d, w, seed) for d in sizes.divergences for w in (*CORNERS, CENTRE)]
    return out


def needed(cell: Cell) -> list[Policy]:
    """The trained policies of a cell."""
    if cell.method == "reference":
        return []
    chosen = [cell.weights] if cell.method == "retrained" else CORNERS
    return [Policy(cell.tuned, w, cell.seed) for w in chosen]


def compared(tuned: str, weights: tuple[float, ...], **fields: object) -> list[Cell]:
    """MOD, the soup and the retrained policy at one weight vector."""
    mod = Cell("mod", tuned, weights, mixed_by=tuned)
    cells = [mod, Cell("soup", tuned, weights), Cell("retrained", tuned, weights)]
    return [cell._replace(**fields) for cell in cells]  # type: ignore[arg-type]


def cells(sizes: Sizes) -> list[Cell]:
    """All cells, each once."""
    n = sizes.samples
    out = [REFERENCE._replace(samples=n), REFERENCE._replace(samples=1, greedy=True)]
    for tuned in sizes.divergences:
        mod = Cell("mod", tuned, CENTRE, mixed_by=tuned, samples=n)
        for weights in sizes.grid:
            out.append(mod._replace(weights=weights))
            if weights not in CORNERS:  # there the soup is the policy
                out.append(Cell("soup", tuned, weights, samples=n))
        for weights in sizes.key:
            out += compared(tuned, weights, samples=n)
            out += compared(tuned, weights, greedy=True, samples=1)
            if tuned != "reverse_kl":  # where neither history nor Z matters
                out += [mod._replace(weights=weights, normalizer=z, history=h) for z, h in VARIANTS]
            others = (d for d in sizes.divergences if d != tuned)
            out += [mod._replace(weights=weights, mixed_by=d, samples=1) for d in others]
        for weights in sizes.outside:
            out += compared(tuned, weights, samples=n)[:2]
            if tuned != "reverse_kl":
                out.append(mod._replace(weights=weights, normalizer="zero"))
    for seed, tuned in product(range(1, sizes.train_seeds), sizes.divergences):
        out += compared(tuned, CENTRE, samples=n, seed=seed)
        for weights in (*CORNERS, *(w for w in sizes.key if w != CENTRE)):
            mod, soup, _ = compared(tuned, weights, samples=n, seed=seed)
            out += [mod] if weights in CORNERS else [mod, soup]
    return list(dict.fromkeys(out))
