"""Trains and measures the dense scorers of the embedded world, one per reward.

    python -m mod_fused.training.embedded_scorers [--out DIR] [--steps N]
        [--method cd_fudge|cd_q] [--td-lambda L] [--seed N]

1. The reference answers every training prompt `GROUP` times.
2. For every objective a copy of the reference learns the rewards of these answers from their
   prefixes (Controlled Decoding, arXiv 2310.17022), until it no longer predicts those of
   `CHECKED` prompts, which are kept from it, any better.
3. Held-out prompts show how well values predict the rewards of completed answers, and how
   tokenwise control changes the rewards and KL(pi* || reference). The scorer steers the reference
   and, without further training, a policy.

The same seed on the same machine and torch version gives the same scorers.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import world
from ..decoding.ensemble import Ensemble
from ..decoding.sequences import Rollouts
from ..guidance.guide import Guidance
from ..guidance.scorers import prefix_values
from .embedded_policies import MAX_NEW_TOKENS, rounded_mean, save
from .rollouts import Reward, alone, rewards_of, roll_out
from .scorers import METHODS, TD_LAMBDA, fit_scorer

STRENGTHS = (0.0, 5.0, 10.0, 20.0)
CONTINUATIONS = 16
GROUP = 6  # answers to each training prompt
CHECKED = 100  # training prompts whose answers decide when to stop
PEAK_LR, BATCH_SIZE = 3e-3, 32


def new_scorer(reference: Any) -> Any:
    """A copy of the reference whose logits, now values, begin close to zero."""
    scorer = copy.deepcopy(reference)
    with torch.no_grad():
        scorer.model.norm.weight *= 0.05
    return scorer


def values_and_outcomes(
    scorer: Any, reference: Any, tokenizer: Any, prompts: Sequence[str], reward: Reward, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """V of the first half of an answer to each prompt, and the mean reward of `CONTINUATIONS`
    completions of that half. Both are float32 [n], n the number of answers of more than one token.
    """
    models = alone(reference, tokenizer)
    options: dict[str, Any] = {"weights": [1.0], "max_new_tokens": MAX_NEW_TOKENS}
    answers, _ = roll_out(models, prompts, seed=seed, **options)
    with torch.no_grad():
        values = prefix_values(scorer, answers)
    lengths = answers.response_mask.sum(1)
    first = answers.ids.shape[1] - MAX_NEW_TOKENS  # column of the first token of an answer
    halves = [(row, first + int(n) // 2) for row, n in enumerate(lengths) if n > 1]
    starts = [tokenizer.decode(answers.ids[row, first:end]) for row, end in halves]
    asked = [prompts[row] for row, _ in halves for _ in range(CONTINUATIONS)]
    begun = [start for start in starts for _ in range(CONTINUATIONS)]
    texts = [prompt + start for prompt, start in zip(asked, begun, strict=True)]
    _, rest = roll_out(models, texts, seed=seed + 1, **options)
    whole = [start + end for start, end in zip(begun, rest, strict=True)]
    outcomes = rewards_of(reward, asked, whole).view(-1, CONTINUATIONS).mean(1)
    return torch.stack([values[row, end - 2] for row, end in halves]), outcomes


def measure(
    scorer: Any, reference: Any, tokenizer: Any, prompts: Sequence[str], strength: float, seed: int
) -> dict[str, dict[str, float]]:
    """Mean rewards, and KL(pi* || reference) in nats per response, under tokenwise control."""
    answers, texts = roll_out(
        Ensemble([reference], [tokenizer]),
        prompts,
        weights=[],
        value_fn=Guidance([scorer]),
        value_weights=[strength],
        max_new_tokens=MAX_NEW_TOKENS,
        seed=seed,
    )
    row = {name: rounded_mean(rewards_of(r, prompts, texts)) for name, r in world.REWARDS.items()}
    return row | {"kl": rounded_mean(answers.log_ratios.sum(1))}


def run(
    out: Path,
    *,
    method: str = "cd_fudge",
    td_lambda: float = TD_LAMBDA,
    steps: int = 400,
    seed: int = 0,
    n_prompts: int = 1800,
    n_eval: int = 300,
) -> None:
    """Train and measure all; writes a checkpoint per objective and evaluation.json under `out`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    began = time.time()
    tokenizer = AutoTokenizer.from_pretrained(world.checkpoint("reference"))
    models = {
        name: AutoModelForCausalLM.from_pretrained(world.checkpoint(name)).eval()
        for name in ("reference", *world.OBJECTIVES)
    }
    reference = models["reference"]
    texts = [text for text in world.prompts(n_prompts, seed, held_out=False) for _ in range(GROUP)]
    options: dict[str, Any] = {"weights": [1.0], "max_new_tokens": MAX_NEW_TOKENS, "seed": seed}
    rollouts, responses = roll_out(alone(reference, tokenizer), texts, **options)
    print(f"{len(texts)} roll-outs, {time.time() - began:.0f} s", flush=True)
    checked = GROUP * min(CHECKED, n_prompts // 2)
    for_checks, for_training = (Rollouts(*(x[rows] for x in rollouts)) for rows in
                                (slice(checked), slice(checked, None)))  # fmt: skip

    held_out = world.prompts(n_eval, seed + 1)
    results: dict[str, Any] = {}
    for index, (objective, reward) in enumerate(world.REWARDS.items()):
        scorer = new_scorer(reference)
        rewards = rewards_of(reward, texts, responses)
        fit = fit_scorer(
            scorer,
            for_training,
            rewards[checked:],
            method=method,
            reference=reference,
            td_lambda=td_lambda,
            held_out=(for_checks, rewards[:checked]),
            steps=steps,
            batch_size=BATCH_SIZE,
            peak_lr=PEAK_LR,
            seed=seed,
            label=objective,
        )
        save(scorer, out / objective)
        values, outcomes = values_and_outcomes(
            scorer, reference, tokenizer, held_out[: max(2, n_eval // 3)], reward, seed
        )
        correlation = torch.corrcoef(torch.stack([values, outcomes]))[0, 1].item()
        control = {
            f"{strength:g}": measure(scorer, reference, tokenizer, held_out, strength, seed)
            for strength in STRENGTHS
        }
        other = world.OBJECTIVES[(index + 1) % len(world.OBJECTIVES)]
        transfer = {
            f"{strength:g}": measure(scorer, models[other], tokenizer, held_out, strength, seed)
            for strength in (0.0, 10.0)
        }
        quarters = dict(fit.correlations)[fit.best]
        results[objective] = {
            "steps": fit.best,
            "correlation_by_quarter": [round(x, 4) for x in quarters],
            "correlation": round(correlation, 4),
            "control": control,
            "transfer": {"model": other, "control": transfer},
        }
        print(f"{objective}: values and outcomes correlate by {correlation:.2f}; step {fit.best}, "
              f"by quarter {', '.join(f'{x:.2f}' for x in quarters)}", flush=True)  # fmt: skip
        for name, table in (("reference", control), (f"policy {other}", transfer)):
            for strength, row in table.items():
                cells = (f"{k} {x['mean']:.3f} ± {x['se']:.3f}" for k, x in row.items())
                print(f"  {name}, strength {strength}: " + ", ".join(cells), flush=True)

    settings: dict[str, Any] = {
        "method": method,
        "seed": seed,
        "most_steps": steps,
        "batch_size": BATCH_SIZE,
        "peak_lr": PEAK_LR,
        "rollouts": len(texts) - checked,
        "checked_rollouts": checked,
        "held_out_prompts": n_eval,
    }
    if method == "cd_q":
        settings["td_lambda"] = td_lambda
    text = json.dumps({"settings": settings, "scorers": results}, indent=2)
    (out / "evaluation.json").write_text(text + "\n")
    print(f"saved in {out}, {time.time() - began:.0f} s in all")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and measure the embedded world's scorers.")
    parser.add_argument("--out", type=Path, default=world.SCORERS, help="where the scorers go")
    parser.add_argument("--method", choices=METHODS[:2], default="cd_fudge")
    parser.add_argument("--td-lambda", type=float, default=TD_LAMBDA, help="for cd_q")
    parser.add_argument("--steps", type=int, default=400, help="most training steps of each scorer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # more are no faster for small models, and change the rounding
    run(args.out, method=args.method, td_lambda=args.td_lambda, steps=args.steps, seed=args.seed)


if __name__ == "__main__":
    main()
