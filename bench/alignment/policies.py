"""The jobs of the study of policies for `loop.run`: trainings and decodes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mod_fused import recipes, world
from mod_fused.app.trade_off import simplex_grid
from mod_fused.divergence import DIVERGENCES
from mod_fused.training import embedded_policies as train

from .decoding import DECODE_SEED, SEED, Array, decode, reference, scores
from .loop import Phase, load

Weights = tuple[float, ...]
CENTRE: Weights = (1 / 3, 1 / 3, 1 / 3)
MIDPOINTS = ((0.5, 0.5, 0.0), (0.5, 0.0, 0.5), (0.0, 0.5, 0.5))
KEY = (CENTRE, *MIDPOINTS)  # the weights at which all methods are compared
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
POOL_PART = 64  # answers to each prompt in one job


class Sizes(NamedTuple):
    """How much is trained and drawn."""

    train_prompts: int = 1800  # with `train.GROUP` answers each; all training questions
    policy_steps: int = 200
    # How often the policies of MOD and the soup, and those retrained for equal weights, are
    # trained; each time on other answers in another order.
    train_seeds: int = 3
    prompts: int = 200  # held out
    samples: int = 2  # answers to each, 1 where greedy or mismatched
    pool: int = 256  # answers of the reference to each, for best-of-N and the optimum
    divergences: tuple[str, ...] = DIVERGENCES  # tuned and mixed with
    grid: tuple[Weights, ...] = GRID  # of MOD and the soups
    key: tuple[Weights, ...] = KEY  # where policies are retrained and all variants measured
    outside: tuple[Weights, ...] = OUTSIDE  # off the simplex
    worlds: int = 40  # tabular ones


#: Every kind of job in half a minute, to see that they run.
TINY = Sizes(
    train_prompts=8, policy_steps=2, train_seeds=2, prompts=6, pool=16, worlds=2,
    divergences=("reverse_kl", "jsd"), grid=(*CORNERS[:2], MIDPOINTS[0], CENTRE),
    key=(CENTRE, MIDPOINTS[0]), outside=OUTSIDE[-1:],
)  # fmt: skip


class Policy(NamedTuple):
    """One training."""

    divergence: str
    weights: Weights
    seed: int = 0


class Cell(NamedTuple):
    """One method at one weight vector. Methods: "mod", "soup" (Rewarded Soups, arXiv 2306.04488:
    the policies' parameters averaged), "retrained" (one policy tuned for the mix), "reference"."""

    method: str
    tuned: str  # the divergence that the policies were tuned with
    weights: Weights  # corners are the single policies
    mixed_by: str = ""  # the divergence to mix with; "mod" only, as are the next two
    normalizer: str = "exact"
    history: bool = False
    greedy: bool = False
    seed: int = 0  # of the training
    samples: int = 2


def policies(sizes: Sizes) -> list[Policy]:
    """All trainings: single objectives and mixes, then those of the other seeds."""
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


def compared(tuned: str, weights: Weights, **fields: Any) -> list[Cell]:
    """MOD, the soup and the retrained policy at one weight vector."""
    mod = Cell("mod", tuned, weights, mixed_by=tuned)
    cells = [mod, Cell("soup", tuned, weights), Cell("retrained", tuned, weights)]
    return [cell._replace(**fields) for cell in cells]


def cells(sizes: Sizes) -> list[Cell]:
    """All cells, each once."""
    n = sizes.samples
    at_rest = Cell("reference", "none", (0.0, 0.0, 0.0), samples=n)
    out = [at_rest, at_rest._replace(samples=1, greedy=True)]
    for tuned in sizes.divergences:
        mod = Cell("mod", tuned, CENTRE, mixed_by=tuned, samples=n)
        for weights in sizes.grid:
            # At a corner MOD and the soup are the same policy.
            out += compared(tuned, weights, samples=n)[: 1 if weights in CORNERS else 2]
        for weights in sizes.key:
            out += compared(tuned, weights, samples=n)
            out += compared(tuned, weights, greedy=True, samples=1)
            if tuned != "reverse_kl":  # which neither history nor Z changes
                out += [mod._replace(weights=weights, normalizer=z, history=h) for z, h in VARIANTS]
            others = (d for d in sizes.divergences if d != tuned)
            out += [mod._replace(weights=weights, mixed_by=d, samples=1) for d in others]
        for weights in sizes.outside:
            out += compared(tuned, weights, samples=n)[:2]
            if tuned != "reverse_kl":
                out.append(mod._replace(weights=weights, normalizer="zero"))
    for seed, tuned in product(range(1, sizes.train_seeds), sizes.divergences):
        out += compared(tuned, CENTRE, samples=n, seed=seed)
        for weights in (*CORNERS, *sizes.key):
            out += compared(tuned, weights, samples=n, seed=seed)[: 1 if weights in CORNERS else 2]
    return list(dict.fromkeys(out))


# --- what the jobs make ---------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def load_answers(work: Path, seed: int) -> train.Answers:
    """Answers to train on; the last ones stay in memory."""
    return load(work, "answers", seed)


@functools.lru_cache(maxsize=8)
def load_policy(work: Path, policy: Policy) -> Any:
    """A trained model."""
    model = copy.deepcopy(reference()[0])
    model.load_state_dict(load(work, "trainings", policy)["model"])
    return model.eval()


def mixed_rewards(answers: train.Answers, weights: Sequence[float]) -> Tensor:
    """sum_i w_i r_i of every answer, [N] float32; weights [3] as `world.OBJECTIVES` has them."""
    return torch.from_numpy(scores(answers.prompts, answers.responses)) @ torch.tensor(weights)


def least_loss(answers: train.Answers, weights: Sequence[float]) -> float:
    """`train.preference_loss` at the optimum of any divergence: the preferences' mean entropy."""
    rewards = mixed_rewards(answers, weights).view(-1, train.GROUP)
    return float(train.preference_loss(train.PREFERENCE_SCALE * rewards, rewards))


def draw_answers(work: Path, sizes: Any, seed: int) -> train.Answers:
    """The reference's answers to `sizes.train_prompts` prompts."""
    return train.draw_answers(*reference(), sizes.train_prompts, SEED + seed)


def train_policy(work: Path, sizes: Any, policy: Policy, start: Any = None) -> dict[str, Any]:
    """A copy of the reference, or `start` itself, tuned against the reference by f-DPO for
    sum_i w_i r_i in `sizes.policy_steps`."""
    model = copy.deepcopy(reference()[0]) if start is None else start
    answers = load_answers(work, policy.seed)
    losses = train.train_policy(
        model, answers.batch, answers.ref_logprobs, mixed_rewards(answers, policy.weights),
        sizes.policy_steps, policy.seed, str(policy), slope=train.slope_of(policy.divergence),
    )  # fmt: skip
    last = losses[-max(1, len(losses) // 4) :]
    record = {"loss": sum(last) / len(last), "first_loss": losses[0]}
    return {"model": model.state_dict(), "record": record}


def pool_parts(sizes: Any) -> range:
    """The jobs that draw `sizes.pool` answers to each prompt."""
    return range(-(-sizes.pool // POOL_PART))


def draw_pool(work: Path, sizes: Any, part: int) -> Array:
    """Rewards [N, K, 3] of the reference's answers, for best-of-N and the optimum."""
    size = min(POOL_PART, sizes.pool - part * POOL_PART)
    texts = [p for p in world.prompts(sizes.prompts, DECODE_SEED) for _ in range(size)]
    batch = train.sample(*reference(), texts, DECODE_SEED + part)
    found = scores(texts, train.response_texts(reference()[1], batch))
    return found.reshape(sizes.prompts, size, -1)


def _measure(work: Path, sizes: Sizes, cell: Cell) -> dict[str, Array]:
    """The result of `decode` for a cell."""
    ref = reference()[0]
    models = [ref, *(load_policy(work, policy) for policy in needed(cell))]
    weights: Sequence[float] = [1.0]
    options: dict[str, Any] = {"do_sample": not cell.greedy}
    if cell.method == "mod":
        weights = cell.weights
        options |= {
            "divergence": cell.mixed_by,
            "normalizer": cell.normalizer,
            "sequence_history": cell.history,
        }
    elif cell.method == "soup":
        models = [ref, recipes.soup(models, cell.weights)]
    elif cell.method == "reference":
        models = [ref, ref]
    prompts = world.prompts(sizes.prompts, DECODE_SEED)
    return decode(models, weights, prompts, cell.samples, **options)


def phases(sizes: Sizes) -> list[Phase]:
    """All jobs."""
    return [
        Phase("answers", draw_answers, range(sizes.train_seeds)),
        Phase("pool", draw_pool, pool_parts(sizes)),
        Phase("trainings", train_policy, policies(sizes)),
        Phase("cells", _measure, cells(sizes)),
    ]
