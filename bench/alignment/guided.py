"""Answers under value guidance: tokenwise, block by block, best of N, two objectives at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mod_fused import Ensemble, guidance, world
from mod_fused.fitting import Rollouts
from mod_fused.guidance.policy_iteration import Iteration
from mod_fused.guidance.train import new_scorer
from mod_fused.guidance.trainer import fit_scorer, rewards_of
from mod_fused.model_state import positions_of
from mod_fused.philox import split_mix
from mod_fused.world import train

from ..problem import DIVERGENCES
from .measuring import BATCH, decode, scores
from .statistics import REWARD_SCALE, best_of, best_of_kl
from .training import Answers, draw_answers, train_policy

Array = np.ndarray
SEED = 0
DECODE_SEED = 1
PANELS = ("humorous", "helpful")
PAIR = ("helpful", "humorous")  # the two objectives decoded for at once
PAIR_COLUMNS = [world.OBJECTIVES.index(name) for name in PAIR]
BETA = REWARD_SCALE  # total strength of two objectives; what a reward of 1 is worth in nats
FUDGE_ABOVE = 0.5
ONE_STRENGTH = 10.0  # at which the divergences are compared


class Sizes(NamedTuple):
    """How much is trained and drawn.

    Attributes:
        prompts: held-out prompts, one answer to each with every method.
        strengths: of tokenwise control; fudge: the same for FUDGE's log-probability.
        candidates: the reference's tokens that FUDGE scores.
        blocks: K of the blockwise choice; block_length: tokens of a block.
        best_of: N, the largest is also the number of answers drawn for each prompt.
        mod: weights of the one DPO policy.
        train_prompts: prompts with `train.GROUP` answers each, for all trainings but MAVIS.
        steps: of CD-Q and of CD-FUDGE beside it; fudge_steps, policy_steps, mavis_steps (each
            iteration) likewise.
        batch: answers in a step of a scorer.
        mavis_prompts, iterations: of MAVIS.
        weights: of helpful and humorous; policies are retrained for the mixes among them.
    """

    prompts: int = 200
    strengths: tuple[float, ...] = (1.0, 2.5, 5.0, 10.0, 20.0, 40.0)
    fudge: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    candidates: int = 50
    blocks: tuple[int, ...] = (4, 8, 16)
    block_length: int = 8
    best_of: tuple[int, ...] = (4, 16)
    mod: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5, 2.0)
    train_prompts: int = 800
    steps: int = 200
    fudge_steps: int = 120
    policy_steps: int = 80
    mavis_steps: int = 80
    batch: int = 32
    mavis_prompts: int = 500
    iterations: int = 3
    weights: tuple[tuple[float, float], ...] = (
        (1.0, 0.0),
        (0.75, 0.25),
        (0.5, 0.5),
        (0.25, 0.75),
        (0.0, 1.0),
    )


QUICK = Sizes(
    prompts=6,
    strengths=(2.0, 20.0),
    fudge=(1.0,),
    blocks=(2,),
    block_length=32,
    best_of=(2,),
    mod=(1.0,),
    train_prompts=4,
    steps=2,
    fudge_steps=1,
    policy_steps=1,
    mavis_steps=1,
    batch=4,
    mavis_prompts=4,
    iterations=1,
    weights=((1.0, 0.0), (0.5, 0.5)),
)


class Point(NamedTuple):
    """What one method reached at one setting.

    Attributes:
        objective: the panel, or "both".
        method, setting: its name and its strength, K, N or weight; of two objectives the weights.
        rewards: [N, 3].
        kl: [N] nats: log pi* - log pi_ref of the answers, or the bound on KL where `bound`.
    """

    objective: str
    method: str
    setting: Any
    rewards: Array
    kl: Array
    bound: bool = False


def value_of_prefix(scorer: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """A dense scorer as the score_fn of blockwise control: V of the prefix that each row is."""

    @torch.no_grad()
    def score(sequences: Tensor, mask: Tensor) -> Tensor:
        hidden = scorer.model(
            input_ids=sequences, attention_mask=mask, position_ids=positions_of(mask)
        ).last_hidden_state
        rows = torch.arange(len(sequences))
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        # The head on one token of one column is all that is needed of its logits.
        return (hidden[rows, last - 1] * scorer.lm_head.weight[sequences[rows, last]]).sum(-1)

    return score


class World:
    """The embedded models, the held-out prompts, and answers of the reference to train on."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.policies = Ensemble.embedded(list(PAIR), dtype=torch.float32)
        self.reference, self.tokenizer = self.policies.models[0], self.policies.tokenizer
        self.alone = Ensemble([self.reference], self.tokenizer)
        self.prompts = world.prompts(sizes.prompts, DECODE_SEED)
        self.answers: Answers = draw_answers(
            self.reference, self.tokenizer, sizes.train_prompts, SEED
        )
        guide = guidance.Guidance.embedded(list(PAIR))
        self.shipped = {name: s.model for name, s in zip(PAIR, guide.scorers, strict=True)}
        self.began = time.perf_counter()

    def say(self, what: str) -> None:
        """Prints what has been done and when."""
        print(f"{time.perf_counter() - self.began:5.0f} s  {what}", flush=True)

    def fitted(self, objective: str, method: str, steps: int) -> Any:
        """A dense scorer trained here on the reference's answers."""
        scorer, a = new_scorer(self.reference), self.answers
        rewards = rewards_of(world.REWARDS[objective], a.prompts, a.responses)
        if method == "fudge":
            rewards = (rewards > FUDGE_ABOVE).float()
        rollouts = Rollouts(*a.batch, torch.zeros(a.batch.ids.shape))
        fit_scorer(
            scorer, rollouts, rewards, method=method, reference=self.reference, steps=steps,
            batch_size=self.sizes.batch, seed=SEED,
        )  # fmt: skip
        self.say(f"{method} trained for {objective}")
        return scorer

    def decoded(
        self,
        objective: str,
        method: str,
        setting: Any,
        models: Ensemble,
        weights: Any,
        **options: Any,
    ) -> Point:
        """One answer to each prompt, with the KL that it shows."""
        found = decode(models, weights, self.prompts, samples=1, seed=DECODE_SEED, **options)
        if not found["valid"].all():
            raise ValueError(f"{method} at {setting} has invalid steps for {objective}")
        return Point(objective, method, setting, found["rewards"][0], found["kl"][0])

    def controlled(
        self, objective: str, method: str, scorer: Any, strength: float, **options: Any
    ) -> Point:
        """Tokenwise control."""
        system = guidance.controlled_decoding([scorer], [strength])
        return self.decoded(objective, method, strength, self.alone, [], **system, **options)


def blockwise(w: World, objective: str, k: int) -> Point:
    """Blockwise best-of-K by the shipped scorer's value of the prefix; its KL is the bound."""
    score, each = value_of_prefix(w.shipped[objective]), max(1, BATCH // k)
    noise = split_mix(DECODE_SEED, len(w.prompts), torch.device("cpu")).tolist()
    rewards, kl = [], []
    for start in range(0, len(w.prompts), each):
        part = w.prompts[start : start + each]
        out = guidance.blockwise_best_of_k(
            w.alone,
            part,
            score_fn=score,
            k=k,
            block_length=w.sizes.block_length,
            max_new_tokens=train.MAX_NEW_TOKENS,
            seed=noise[start : start + each],
        )
        rewards.append(scores(part, out.texts or ()))
        kl.append(out.kl_bound.double().numpy())
    return Point(objective, "blockwise", k, np.concatenate(rewards), np.concatenate(kl), True)


def best_of_n(w: World) -> list[Point]:
    """Best-of-N by the true reward and by the scorers, the mean over subsets of one pool."""
    size, n = max(w.sizes.best_of), len(w.prompts)
    texts = [prompt for prompt in w.prompts for _ in range(size)]
    batch = train.sample(w.reference, w.tokenizer, texts, DECODE_SEED)
    rewards = scores(texts, train.response_texts(w.tokenizer, batch))
    points = []
    for objective in PANELS:
        score = value_of_prefix(w.shipped[objective])
        parts = zip(batch.ids.split(BATCH), batch.attention_mask.split(BATCH), strict=True)
        values = torch.cat([score(*part) for part in parts]).numpy()
        pool = np.column_stack([rewards, values]).astype(float).reshape(n, size, -1)
        for name, column in (("reward", world.OBJECTIVES.index(objective)), ("scorer", 3)):
            for count in w.sizes.best_of:
                chosen = best_of(pool, np.eye(4)[column], count)[:, :3]
                kl = np.full(n, best_of_kl(count))
                points.append(Point(objective, f"best of N, {name}", count, chosen, kl, True))
    return points


def one_objective(w: World) -> Iterator[Point]:
    """Everything in the panels of reward against KL."""
    yield from best_of_n(w)
    for objective in PANELS:
        w.say(f"methods for {objective}")
        scorer, s = w.shipped[objective], w.sizes
        yield w.decoded(
            objective, "reference", 0.0, Ensemble([None, w.reference], w.tokenizer), [1.0]
        )
        for strength in s.strengths:
            yield w.controlled(objective, "CD-FUDGE", scorer, strength)
        for d in DIVERGENCES:
            yield w.controlled(objective, f"under {d}", scorer, ONE_STRENGTH, divergence=d)
        for method, name in (("cd_q", "CD-Q"), ("cd_fudge", "CD-FUDGE, as CD-Q")):
            other = w.fitted(objective, method, s.steps)
            for strength in s.strengths:
                yield w.controlled(objective, name, other, strength)
        classifier = w.fitted(objective, "fudge", s.fudge_steps)
        for strength in s.fudge:
            system = guidance.fudge(classifier, candidates=s.candidates, strength=strength)
            yield w.decoded(objective, "FUDGE", strength, w.alone, [], **system)
        policy = w.policies.models[1 + PAIR.index(objective)]
        for weight in s.mod:
            models = Ensemble([w.reference, policy], w.tokenizer)
            yield w.decoded(objective, "MOD", weight, models, [weight])
        for k in s.blocks:
            yield blockwise(w, objective, k)
            w.say(f"blockwise, K = {k}")


def value_models(w: World) -> dict[str, tuple[Any, list[Iteration]]]:
    """MAVIS: a value model for each of the two objectives, and what its iterations showed."""
    found = {}
    prompts = world.prompts(w.sizes.mavis_prompts, SEED, held_out=False)
    for objective in PAIR:
        scorer = new_scorer(w.reference)
        history = guidance.train_mavis(
            scorer, w.reference, w.tokenizer, prompts, world.REWARDS[objective], beta=BETA,
            iterations=w.sizes.iterations, max_new_tokens=train.MAX_NEW_TOKENS, seed=SEED,
            steps=w.sizes.mavis_steps, batch_size=w.sizes.batch,
        )  # fmt: skip
        found[objective] = scorer, history
        w.say(f"MAVIS trained for {objective}")
    return found


def two_objectives(w: World, models: Sequence[Any]) -> Iterator[Point]:
    """Helpful and humorous at every weight: MAVIS's value models, CD's scorers, MOD, retrained."""
    for pair in w.sizes.weights:
        system = guidance.mavis(models, pair, beta=BETA, candidates=None)
        yield w.decoded("both", "MAVIS", pair, w.alone, [], **system)
        system = guidance.controlled_decoding(
            [w.shipped[name] for name in PAIR], [BETA * x for x in pair]
        )
        yield w.decoded("both", "CD", pair, w.alone, [], **system)
        yield w.decoded("both", "MOD", pair, w.policies, list(pair))
        if 0.0 in pair:
            continue
        weights = [0.0] * len(world.OBJECTIVES)
        for column, x in zip(PAIR_COLUMNS, pair, strict=True):
            weights[column] = x
        policy, _ = train_policy(
            w.reference, w.answers, weights, "reverse_kl", w.sizes.policy_steps, SEED
        )
        retrained = Ensemble([w.reference, policy], w.tokenizer)
        yield w.decoded("both", "retrained", pair, retrained, [1.0])
        w.say(f"retrained for {pair}")
