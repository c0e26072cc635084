"""What the study trains: LoRA adapters by f-DPO, a pruned model, scorers."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mod_fused import Ensemble, generate
from mod_fused.decoding.model_state import positions_of
from mod_fused.decoding.options import support_cut
from mod_fused.decoding.sequences import Rollouts, Sequences, take
from mod_fused.torch_kernels.philox import split_mix
from mod_fused.training import embedded_policies as train
from mod_fused.training.fitting import fit, shuffled
from mod_fused.training.rollouts import alone
from mod_fused.training.scorers import fit_scorer

from ..alignment.decoding import answers
from ..alignment.loop import load
from ..alignment.statistics import REWARD_SCALE, divergence_of_answers
from . import models
from .frozen import Below, above, first_tuned, layers_of, run_below
from .jobs import Policy, Sizes, name_of
from .prompts import TOPICS, conversations, questions
from .rewards import OBJECTIVES, scores

BATCH = 100  # rows decoded together
LEARNED = 25  # rows whose logits are in memory together
#: Seeds far from those of the held-out questions, so that nothing is learned or chosen on their
#: noise.
ANSWER_SEED, VALIDATION_SEED = 1 << 32, 1 << 48
RANK = 16
SCORER_RATE, IMITATION_RATE = 3e-4, 3e-4


@functools.lru_cache(maxsize=1)
def base(sizes: Sizes) -> tuple[Any, Any]:
    """The reference and its tokenizer."""
    return models.load_model(models.folder(sizes.model))


def adapter(work: Path, policy: Policy) -> Path:
    """The folder of a trained adapter."""
    return work / "adapters" / name_of(policy)


# --- answers to learn from ------------------------------------------------------------------------


def draw_answers(work: Path, sizes: Sizes, seed: int) -> train.Answers:
    """`train.GROUP` answers of the reference to each training question; prompts are left-padded."""
    model, tokenizer = base(sizes)
    ensemble, asked = alone(model, tokenizer), questions("train", sizes.train_prompts)
    (ids, *_), (mask, *_) = ensemble.encode(conversations(asked))
    mask = torch.ones_like(ids) if mask is None else mask
    seeds = split_mix(ANSWER_SEED * (seed + 1), len(ids), ids.device)
    parts: list[Sequences] = []
    texts: list[str] = []
    logprobs: list[Tensor] = []
    for rows in torch.arange(len(ids)).split(BATCH // train.GROUP):
        out = generate(
            ensemble, input_ids=ids[rows], attention_mask=mask[rows], weights=[1.0],
            max_new_tokens=sizes.max_new_tokens, num_return_sequences=train.GROUP, seed=seeds[rows],
        )  # fmt: skip
        missing = sizes.max_new_tokens - out.tokens.shape[1]
        drawn = F.pad(out.tokens, (0, missing), value=ensemble.pad_token_id)
        response = (torch.arange(sizes.max_new_tokens) < out.lengths[:, None]).long()
        prompt, seen = (x[rows].repeat_interleave(train.GROUP, 0) for x in (ids, mask))
        none = torch.zeros_like(prompt)
        pairs = ((prompt, drawn), (seen, response), (none, response))
        parts.append(Sequences(*(torch.cat(pair, 1) for pair in pairs)))
        texts += out.texts or ()
        logprobs.append(out.logprobs.sum(1))
    batch = Sequences(*map(torch.cat, zip(*parts, strict=True)))
    repeated = [question for question in asked for _ in range(train.GROUP)]
    return train.Answers(repeated, texts, batch, torch.cat(logprobs))


@functools.lru_cache(maxsize=1)
def load_answers(work: Path, seed: int) -> train.Answers:
    """Answers to train on; the last ones stay in memory."""
    return load(work, "answers", seed)


def logits_of(model: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The logits before each token of the responses [N, T, V], these tokens [N, T], and which of
    them are tokens, [N, T]. Of `Below` the model is the layers above."""
    length = batch.ids.shape[1]
    start = int(batch.response_mask.any(0).nonzero()[0, 0])
    read = {"inputs_embeds": batch.hidden} if isinstance(batch, Below) else {"input_ids": batch.ids}
    logits = model(
        **read, attention_mask=batch.attention_mask, use_cache=False,
        position_ids=positions_of(batch.attention_mask),
        # As places, which make a contiguous copy: of a slice the head is a slower batched product.
        logits_to_keep=torch.arange(start - 1, length - 1),
    ).logits.float()  # fmt: skip
    return logits, batch.ids[:, start:], batch.response_mask[:, start:].bool()


def response_logprobs(model: Any, batch: Any) -> Tensor:
    """log pi(response | prompt) in nats, [N] float32."""
    logits, tokens, mask = logits_of(model, batch)
    found = -F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    return (found * mask).sum(1)


@torch.no_grad()
def run_frozen(model: Any, sizes: Sizes, data: train.Answers) -> tuple[Below, Tensor]:
    """What the layers that are not tuned make of the answers, and the model's log-probabilities of
    them, [N] in nats."""
    first = first_tuned(model, sizes.tuned)
    below = run_below(model, first, data.batch, LEARNED)
    rows = torch.arange(len(below.ids)).split(LEARNED)
    upper = above(model, first)
    found = torch.cat([response_logprobs(upper, take(below, index)) for index in rows])
    whole = response_logprobs(model, take(data.batch, rows[0]))
    if not torch.allclose(found[: len(whole)], whole, atol=1e-2):
        raise ValueError(
            f"{type(model).__name__} is another model where its layers run apart: the study cannot "
            "tune its last ones alone"
        )
    return below, found


def freeze(work: Path, sizes: Sizes, seed: int) -> tuple[Below, Tensor]:
    """`run_frozen` of the reference."""
    return run_frozen(base(sizes)[0], sizes, load_answers(work, seed))


@functools.lru_cache(maxsize=1)
def load_frozen(work: Path, seed: int) -> tuple[Below, Tensor]:
    """`run_frozen` of the reference; the last one stays in memory."""
    return load(work, "frozen", seed)


# --- policies -------------------------------------------------------------------------------------


def train_policy(work: Path, sizes: Sizes, policy: Policy) -> dict[str, Any]:
    """An adapter tuned by f-DPO for sum_i w_i r_i, in a folder of its own; returns its checkpoints.

    The one with the most J = 10 w r - D_f on the validation questions is kept.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from peft.utils import set_peft_model_state_dict

    data = load_answers(work, policy.seed)
    reference, tokenizer = load_pruned(work) if policy.pruned else base(sizes)
    found = run_frozen(reference, sizes, data) if policy.pruned else load_frozen(work, policy.seed)
    below, ref_logprobs = found
    torch.manual_seed(policy.seed)
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=tuned_layers(reference, sizes.tuned),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(copy.deepcopy(reference), config)
    upper = above(model.get_base_model(), first_tuned(reference, sizes.tuned))
    rewards = torch.from_numpy(scores(data.prompts, data.responses)) @ torch.tensor(policy.weights)
    groups = torch.arange(len(rewards)).view(-1, train.GROUP)
    order = shuffled(len(groups), sizes.steps * sizes.batch, policy.seed)
    slope = train.slope_of(policy.divergence)

    def loss_at(step: int) -> Tensor:
        rows = groups[order[step * sizes.batch : (step + 1) * sizes.batch]].flatten()
        ratios = response_logprobs(upper, take(below, rows)) - ref_logprobs[rows]
        return train.preference_loss(
            ratios.view(-1, train.GROUP), rewards[rows].view(-1, train.GROUP), slope=slope
        )

    checkpoints: list[dict[str, Any]] = []
    kept: dict[str, Tensor] = {}

    def check(steps: int) -> bool:
        if steps % sizes.check_every == 0 or steps == sizes.steps:
            model.eval()
            found = _validate(sizes, Ensemble.from_adapters(model, tokenizers=tokenizer), policy)
            model.train()
            if all(found["objective"] > other["objective"] for other in checkpoints):
                state = get_peft_model_state_dict(model)
                kept.update({key: tensor.clone() for key, tensor in state.items()})
                for other in checkpoints:
                    other["kept"] = False
                found["kept"] = True
            checkpoints.append({"steps": steps} | found)
        return False

    fit(model, sizes.steps, sizes.rate, loss_at, None, check)
    set_peft_model_state_dict(model, kept)
    model.save_pretrained(adapter(work, policy))
    return {"checkpoints": checkpoints}


def tuned_layers(model: Any, count: int) -> list[str]:
    """The names of the linear layers in the last `count` layers of a model."""
    stack = layers_of(model)
    return [
        f"model.layers.{i}.{name}"
        for i in range(first_tuned(model, count), len(stack))
        for name, module in stack[i].named_modules()
        if isinstance(module, torch.nn.Linear)
    ]


def _validate(sizes: Sizes, ensemble: Ensemble, policy: Policy) -> dict[str, Any]:
    """Means over one answer of the policy to each validation question."""
    asked = conversations(questions("validation", sizes.validation))
    found = answers(
        ensemble, [1.0], asked, scores, batch=BATCH, seed=VALIDATION_SEED,
        max_new_tokens=sizes.max_new_tokens, plausibility=support_cut("auto", policy.divergence),
    )  # fmt: skip
    weighted = found["rewards"] @ np.array(policy.weights)
    objective = REWARD_SCALE * weighted - divergence_of_answers(policy.divergence, found["kl"])
    each = {"weighted": weighted, "kl": found["kl"], "objective": objective}
    means = {name: float(x.mean()) for name, x in each.items()}
    rewards = dict(zip(OBJECTIVES, found["rewards"].mean((0, 1)).tolist(), strict=True))
    return rewards | means | {"kept": False}


# --- another size ---------------------------------------------------------------------------------


def prune(model: Any, share: float) -> Any:
    """A copy of a model with a share of its layers: the first ones and the last two; fewer than
    three are the first ones."""
    pruned = copy.deepcopy(model)
    stack = layers_of(pruned)
    whole, count = len(stack), max(1, round(share * len(stack)))
    keep = [*range(count - 2), whole - 2, whole - 1] if count > 2 else list(range(count))
    pruned.model.layers = torch.nn.ModuleList(stack[i] for i in keep)
    for place, layer in enumerate(pruned.model.layers):
        layer.self_attn.layer_idx = place  # its place in the cache
    pruned.config.num_hidden_layers = len(pruned.model.layers)
    if getattr(pruned.config, "layer_types", None):
        pruned.config.layer_types = [pruned.config.layer_types[i] for i in keep]
    return pruned


def imitate(work: Path, sizes: Sizes, _: Any) -> dict[str, Any]:
    """The pruned model, in the folder `pruned`: it learns the reference's next-token distributions
    on the reference's answers. Returns KL(reference || model) a token, before and after."""
    teacher, tokenizer = base(sizes)
    model, data = prune(teacher, sizes.layers), load_answers(work, 0)
    size = sizes.batch * train.GROUP
    order = shuffled(len(data.prompts), sizes.imitation_steps * size, 0)

    def loss_at(step: int) -> Tensor:
        batch = take(data.batch, order[step * size : (step + 1) * size])
        with torch.no_grad():
            wanted, _, mask = logits_of(teacher, batch)
        learned = logits_of(model, batch)[0][mask].log_softmax(-1)
        wanted = wanted[mask].log_softmax(-1)
        return (wanted.exp() * (wanted - learned)).sum(-1).mean()

    losses = fit(model, sizes.imitation_steps, IMITATION_RATE, loss_at, None)
    for part in (model, tokenizer):
        part.save_pretrained(work / "pruned")
    last = losses[-max(1, len(losses) // 6) :]
    count = sum(p.numel() for p in model.parameters())
    return {"first": losses[0], "last": sum(last) / len(last), "parameters": count}


def load_pruned(work: Path) -> tuple[Any, Any]:
    """The pruned model and its tokenizer."""
    return models.load_model(str(work / "pruned"))


# --- scorers --------------------------------------------------------------------------------------


def new_scorer(model: Any, layers: int) -> Any:
    """The first layers of a model with a head of one value, which reads a prefix."""
    from transformers import AutoModelForTokenClassification

    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.num_labels = layers, 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    torch.manual_seed(0)
    scorer = AutoModelForTokenClassification.from_config(config)
    body = getattr(scorer, scorer.base_model_prefix)
    body.load_state_dict(getattr(model, model.base_model_prefix).state_dict(), strict=False)
    scorer.get_input_embeddings().weight.requires_grad_(False)  # they know the words already
    return scorer


def train_scorer(work: Path, sizes: Sizes, objective: str) -> dict[str, Any]:
    """A scorer of the mean reward of what follows a prefix (CD-FUDGE, arXiv 2310.17022), from the
    answers that the policies of the first training learn from; the last topics are held out, for
    early stopping."""
    data = load_answers(work, 0)
    rollouts = Rollouts(*data.batch, torch.zeros(data.batch.ids.shape))
    rewards = scores(data.prompts, data.responses)[:, OBJECTIVES.index(objective)]
    count = min(sizes.train_prompts, len(TOPICS["train"]))
    topics = np.arange(len(rewards)) // train.GROUP % count
    kept = topics >= int(0.85 * count)
    used, held = (torch.from_numpy(np.flatnonzero(x)) for x in (~kept, kept))
    targets = torch.from_numpy(rewards)
    scorer = new_scorer(base(sizes)[0], sizes.scorer_layers)
    fitted = fit_scorer(
        scorer, take(rollouts, used), targets[used], peak_lr=SCORER_RATE, steps=sizes.scorer_steps,
        held_out=None if sizes.generated else (take(rollouts, held), targets[held]),
    )  # fmt: skip
    found = [None if np.isnan(x) else x for x in dict(fitted.correlations).get(fitted.best, [])]
    return {"model": scorer.state_dict(), "steps": fitted.best, "correlations": found}


def load_scorer(work: Path, sizes: Sizes, objective: str) -> Any:
    """A trained scorer."""
    scorer = new_scorer(base(sizes)[0], sizes.scorer_layers)
    scorer.load_state_dict(load(work, "scorers", objective)["model"])
    return scorer.eval()
