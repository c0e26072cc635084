"""Trains and measures the reference model and the three policies of the embedded world.

    python -m mod_fused.training.embedded_policies [--out DIR] [--steps N] [--policy-steps N]
        [--seed N]

1. The reference learns the text of `corpus` by next-token prediction.
2. For every objective a policy starts from the reference and is trained by DPO (arXiv 2305.18290;
   with another `slope`, f-DPO, arXiv 2309.16240) on answers sampled from the reference, compared by
   the reward.
3. All four answer held-out questions; their mean rewards and KL divergences are printed and saved.

The same seed on the same machine and torch version gives the same checkpoints.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..decoding.sequences import Sequences, encode, take
from ..divergence import get_divergence
from ..world import CHECKPOINTS
from ..world.corpus import examples, prompts
from ..world.rewards import OBJECTIVES, REWARDS, reward
from ..world.tokenizer import build_tokenizer
from .fitting import fit, shuffled

MAX_NEW_TOKENS = 64  # the longest answer of the grammar has fewer
PREFERENCE_SCALE = 10.0  # answer a is preferred to b with odds exp(10 (reward a - reward b))
BETA = 1.0
GROUP = 4  # answers per prompt; all their pairs are compared
TANGENT_BELOW = -4.0  # nats: see `slope_of`


def build_model(tokenizer: Any) -> Any:
    """A Llama of 0.28 million parameters with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,  # one that every attention kernel knows, vLLM's on CPUs among them
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def response_logprobs(model: Any, batch: Sequences) -> torch.Tensor:
    """log pi(response | prompt) in nats, summed over the tokens of the response; [N] float32."""
    hidden = model.model(input_ids=batch.ids, attention_mask=batch.attention_mask).last_hidden_state
    keep = batch.response_mask[
        :, 1:
    ].bool()  # [N, L-1]; the head is half of the work, so it runs on response tokens only
    nll = F.cross_entropy(
        model.lm_head(hidden[:, :-1][keep]), batch.ids[:, 1:][keep], reduction="none"
    )
    return torch.zeros(len(batch.ids)).index_add(0, keep.nonzero()[:, 0], -nll)


def train_reference(
    model: Any, tokenizer: Any, steps: int, seed: int, batch_size: int = 32
) -> list[float]:
    """Next-token prediction on fresh text; returns the loss of every step in nats per token."""

    def loss_at(step: int) -> torch.Tensor:
        batch = encode(tokenizer, examples(batch_size, seed=seed * 1_000_003 + step))
        return -response_logprobs(model, batch).sum() / batch.response_mask.sum()

    return fit(model, steps, 4e-3, loss_at, "reference")


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, texts: list[str], seed: int, batch_size: int = 600
) -> Sequences:
    """One response to each of the prompts `texts`, drawn from the model at temperature 1."""
    torch.manual_seed(seed)
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    width = inputs["input_ids"].shape[1]
    ids = torch.full((len(texts), width + MAX_NEW_TOKENS), tokenizer.pad_token_id)
    for start in range(0, len(texts), batch_size):
        rows = slice(start, start + batch_size)
        out = model.generate(
            input_ids=inputs["input_ids"][rows],
            attention_mask=inputs["attention_mask"][rows],
            do_sample=True,
            top_k=0,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        ids[rows, : out.shape[1]] = out
    ended = (ids[:, width:] == tokenizer.eos_token_id).long()
    response = F.pad((ended.cumsum(1) - ended == 0).long(), (width, 0))
    attention = response.clone()
    attention[:, :width] = inputs["attention_mask"]
    return Sequences(ids, attention, response)


def response_texts(tokenizer: Any, batch: Sequences) -> list[str]:
    """The responses as text."""
    rows = zip(batch.ids, batch.response_mask.bool(), strict=True)
    return [tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in rows]


def score(objective: str, texts: list[str], responses: list[str]) -> torch.Tensor:
    """The rewards of all responses, [N] float32."""
    pairs = zip(texts, responses, strict=True)
    return torch.tensor([reward(objective, prompt, response) for prompt, response in pairs])


class Answers(NamedTuple):
    """Answers of the reference to train on, `GROUP` in a row to each prompt.

    Attributes:
        prompts, responses: N strings each.
        batch: their tokens.
        ref_logprobs: log pi_ref(response | prompt) in nats, [N] float32.
    """

    prompts: list[str]
    responses: list[str]
    batch: Sequences
    ref_logprobs: torch.Tensor


def draw_answers(reference: Any, tokenizer: Any, n_prompts: int, seed: int) -> Answers:
    """`GROUP` answers to each of `n_prompts` training prompts, drawn from the reference."""
    texts = [x for x in prompts(n_prompts, seed, held_out=False) for _ in range(GROUP)]
    batch = sample(reference, tokenizer, texts, seed)
    responses = response_texts(tokenizer, batch)
    return Answers(texts, responses, batch, all_logprobs(reference, batch))


def slope_of(divergence: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The slope for `preference_loss` that makes it f-DPO (arXiv 2309.16240) of a divergence.

    It is f'(e^d) up to a constant, of the log ratio d of a whole answer, and its tangent below
    `TANGENT_BELOW`. The optimum has f'(pi/ref) = 10 r + const with r in [0, 1]: d stays above -2.4
    (forward KL), -2.3 (Jeffrey) and -3.6 (alpha 1/2). Smaller d occur only while the policy is far
    from the optimum. There e^-d hides all other terms, and overflows at d = -90. A clamp of d would
    stop the gradient; the tangent moves no optimum, and every pair keeps a gradient.

    Args:
        divergence: a name, as `mod_fused.sample` takes it.

    Raises:
        ValueError: there is no such divergence.
    """
    chosen = get_divergence(divergence)
    if chosen.name == "reverse_kl":
        return lambda d: d
    if not chosen.clamped:  # JSD's own f' is nearly linear there
        return lambda d: -chosen.deficit(d)
    with torch.enable_grad():
        corner = torch.tensor(TANGENT_BELOW, requires_grad=True)
        (gradient,) = torch.autograd.grad(-chosen.deficit(corner), corner)
    height = -chosen.deficit(corner.detach())

    def continued(d: torch.Tensor) -> torch.Tensor:
        below = height + gradient * (d - TANGENT_BELOW)
        # Clamp first: torch.where passes the NaN gradient of an overflow that it does not select.
        return torch.where(d < TANGENT_BELOW, below, -chosen.deficit(d.clamp(min=TANGENT_BELOW)))

    return continued


def preference_loss(
    log_ratios: torch.Tensor,
    rewards: torch.Tensor,
    *,
    beta: float = BETA,
    slope: Callable[[torch.Tensor], torch.Tensor] = lambda log_ratio: log_ratio,
) -> torch.Tensor:
    """(f-)DPO on all pairs of each group of answers to one prompt.

        loss = mean over a < b of  -p log sigma(m) - (1 - p) log sigma(-m)
        m = beta (f'(pi_a/ref_a) - f'(pi_b/ref_b)),    p = sigma(PREFERENCE_SCALE (r_a - r_b))

    p is the Bradley-Terry probability that a is preferred. Drawn labels would have the same mean
    and more noise. The minimum is f'(pi/ref) = PREFERENCE_SCALE r / beta + const, the policy that
    is optimal for the reward under the divergence f.

    Args:
        log_ratios: log pi(answer) - log pi_ref(answer), [G, K] float32 in nats.
        rewards: [G, K] float32.
        beta: strength of the regularisation.
        slope: f'(e^d) as a function of the log ratio d, see `slope_of`; the default is reverse KL.

    Returns:
        Scalar float32.
    """
    first, second = torch.triu_indices(log_ratios.shape[1], log_ratios.shape[1], offset=1)
    implicit = beta * slope(log_ratios)
    margin = implicit[:, first] - implicit[:, second]
    preferred = torch.sigmoid(PREFERENCE_SCALE * (rewards[:, first] - rewards[:, second]))
    return F.binary_cross_entropy_with_logits(margin, preferred)


def train_policy(
    model: Any,
    answers: Sequences,
    ref_logprobs: torch.Tensor,
    rewards: torch.Tensor,
    steps: int,
    seed: int,
    label: str = "policy",
    batch_size: int = 16,
    slope: Callable[[torch.Tensor], torch.Tensor] = lambda log_ratio: log_ratio,
) -> list[float]:
    """Trains `model`, a copy of the reference, on `answers` by DPO, or f-DPO with another `slope`
    (see `preference_loss`); returns the loss of every step.

    Rows k GROUP to (k+1) GROUP - 1 of `answers` ([N, L]), `ref_logprobs` ([N]) and `rewards` ([N])
    are answers of the reference to the same prompt. One batch holds `batch_size` such groups.
    """
    groups = torch.arange(len(rewards)).view(-1, GROUP)
    order = shuffled(len(groups), steps * batch_size, seed)

    def loss_at(step: int) -> torch.Tensor:
        rows = groups[order[step * batch_size : (step + 1) * batch_size]].flatten()
        log_ratios = response_logprobs(model, take(answers, rows)) - ref_logprobs[rows]
        log_ratios, own = log_ratios.view(-1, GROUP), rewards[rows].view(-1, GROUP)
        return preference_loss(log_ratios, own, slope=slope)

    return fit(model, steps, 1e-3, loss_at, label)


@torch.no_grad()
def all_logprobs(model: Any, batch: Sequences, batch_size: int = 256) -> torch.Tensor:
    """`response_logprobs` of any number of rows; [N] float32."""
    rows = torch.arange(len(batch.ids)).split(batch_size)
    return torch.cat([response_logprobs(model, take(batch, index)) for index in rows])


def rounded_mean(values: torch.Tensor) -> dict[str, float]:
    """Mean of values [N] and its standard error."""
    return {
        "mean": round(values.mean().item(), 4),
        "se": round(values.std().item() / len(values) ** 0.5, 4),
    }


def evaluate(models: dict[str, Any], tokenizer: Any, n: int, seed: int) -> dict[str, Any]:
    """Mean rewards of one sampled answer to each of `n` held-out prompts, and KL(policy || ref).

    `models` maps "reference" and the objectives to models. All answer the same prompts. KL is in
    nats per response, estimated on the policy's own answers.
    """
    texts = prompts(n, seed)
    table: dict[str, Any] = {}
    for name, model in models.items():
        answers = sample(model, tokenizer, texts, seed)
        responses = response_texts(tokenizer, answers)
        row = {objective: rounded_mean(score(objective, texts, responses)) for objective in REWARDS}
        row["kl"] = rounded_mean(
            all_logprobs(model, answers) - all_logprobs(models["reference"], answers)
        )
        table[name] = row
    return table


def format_table(table: dict[str, Any]) -> str:
    """The result of `evaluate` for the terminal, with every policy's gain on its own reward."""
    columns = [*OBJECTIVES, "kl"]
    lines = [f"{'model':<12}" + "".join(f"{column:>17}" for column in columns)]
    for name, row in table.items():
        cells = (f"{row[column]['mean']:.3f} ± {row[column]['se']:.3f}" for column in columns)
        lines.append(f"{name:<12}" + "".join(f"{cell:>17}" for cell in cells))
    for name in OBJECTIVES:
        own, ref = table[name][name], table["reference"][name]
        gain, error = own["mean"] - ref["mean"], math.hypot(own["se"], ref["se"])
        lines.append(f"{name} beats the reference on its own reward by {gain:.3f} ± {error:.3f}")
    return "\n".join(lines)


def save(model: Any, folder: Path) -> None:
    """Writes the two configs, model.safetensors and the two files of the tokenizer."""
    from transformers import GenerationConfig

    ids = {
        f"{name}_token_id": getattr(model.config, f"{name}_token_id")
        for name in ("bos", "eos", "pad")
    }
    model.generation_config = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, **ids)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(
        0o644
    )  # transformers 5 writes it readable by the owner alone
    build_tokenizer().save_pretrained(folder)  # a new one: a used tokenizer has padding settings
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.pop("backend", None)  # so transformers 4 and 5 both load it
    path.write_text(json.dumps(settings, indent=2) + "\n")


def run(
    out: Path, steps: int, policy_steps: int, seed: int, n_prompts: int = 2400, n_eval: int = 600
) -> None:
    """Train and measure all; writes the four checkpoints and evaluation.json under `out`."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    began = time.time()
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    reference = build_model(tokenizer)
    size = sum(parameter.numel() for parameter in reference.parameters())
    print(f"{size} parameters, {len(tokenizer)} tokens", flush=True)
    train_reference(reference, tokenizer, steps, seed)
    save(reference, out / "reference")
    print(f"reference trained, {time.time() - began:.0f} s; sampling its answers", flush=True)

    answers = draw_answers(reference, tokenizer, n_prompts, seed)
    print(f"{len(answers.prompts)} answers sampled, {time.time() - began:.0f} s", flush=True)
    models = {"reference": reference}
    for objective in OBJECTIVES:
        policy = copy.deepcopy(reference)
        rewards = score(objective, answers.prompts, answers.responses)
        train_policy(
            policy, answers.batch, answers.ref_logprobs, rewards, policy_steps, seed, objective
        )
        save(policy, out / objective)
        models[objective] = policy

    table = evaluate(models, tokenizer, n_eval, seed + 1)
    settings = {
        "seed": seed,
        "steps": steps,
        "policy_steps": policy_steps,
        "held_out_prompts": n_eval,
    }
    (out / "evaluation.json").write_text(
        json.dumps({"settings": settings, "models": table}, indent=2) + "\n"
    )
    print(format_table(table))
    print(f"saved in {out}, {time.time() - began:.0f} s in all")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train and measure the models of the embedded world."
    )
    parser.add_argument("--out", type=Path, default=CHECKPOINTS, help="where the checkpoints go")
    parser.add_argument("--steps", type=int, default=3600, help="training steps of the reference")
    parser.add_argument(
        "--policy-steps", type=int, default=400, help="training steps of each policy"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # more are no faster for small models, and change the rounding
    run(args.out, args.steps, args.policy_steps, args.seed)


if __name__ == "__main__":
    main()
