"""The models of the case `decoder`: the embedded ones, and Llamas with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mod_fused

PROMPT = 16  # tokens of a prompt for random models

_FIELDS = ("num_hidden_layers", "hidden_size", "num_attention_heads")
_FIELDS += ("num_key_value_heads", "intermediate_size", "vocab_size")
#: By name: the values of these fields of the configuration.
RANDOM = {
    "tiny": (2, 32, 2, 2, 64, 1024),
    "0.1b": (12, 768, 12, 12, 2048, 32000),
    "1b": (16, 2048, 32, 8, 8192, 128256),
}
_NEARNESS = 0.9  # share of the way from a policy's random weights to the reference's
#: Tokens to draw in each row, so few that a run takes seconds, also on a CPU.
TOKENS = {"embedded": 33, "tiny": 5, "0.1b": 5, "1b": 3}


def llama(name: str, seed: int, dtype: torch.dtype, device: str) -> Any:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **dict(zip(_FIELDS, RANDOM[name], strict=True)),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        eos_token_id=None,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(device=device, dtype=dtype).eval()


def ensemble(name: str, dtype: torch.dtype, device: str, policies: int) -> mod_fused.Ensemble:
    """A reference and policies. Random policies are close to the random reference.

    Raises:
        ImportError: transformers is not installed.
    """
    if name == "embedded":
        objectives = mod_fused.world.OBJECTIVES[:policies]
        return mod_fused.Ensemble.embedded(objectives, dtype=dtype, device=device)
    llamas = [llama(name, i, dtype, device) for i in range(policies + 1)]
    with torch.no_grad():
        for policy in llamas[1:]:
            for mine, its in zip(policy.parameters(), llamas[0].parameters(), strict=True):
                mine.lerp_(its, _NEARNESS)
    return mod_fused.Ensemble(llamas)


def prompts(name: str, models: mod_fused.Ensemble, batch: int) -> Tensor:
    """Prompts int64 [B, n] on the models' device: of the embedded world, cut to the shortest, or
    random."""
    if name == "embedded":
        texts = mod_fused.world.prompts(batch, seed=0)
        rows = [models.encode(text)[0][0][0] for text in texts]
        shortest = min(len(row) for row in rows)
        return torch.stack([row[-shortest:] for row in rows])
    return random_prompts(batch, models.vocab_size or 1).to(models.device)


def random_prompts(batch: int, vocab: int) -> Tensor:
    """Prompts int64 [B, n] for random models."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(vocab, (batch, PROMPT), generator=generator)


def parameters(models: mod_fused.Ensemble) -> int:
    """The number of parameters of one model."""
    return sum(p.numel() for p in models.models[0].parameters())
