"""Tiny language models with random weights, and a word-level tokenizer, for the decoder's tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import normal
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BertConfig,
    BertForTokenClassification,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
)

from mod_fused import Ensemble, reference

WORDS = (
    "a the red blue old fox dog cat bird saw ran sat slept over under near and then it is".split()
)
VOCAB = {word: i for i, word in enumerate(["<unk>", "<eos>", *WORDS])}
V = len(VOCAB)
EOS = VOCAB["<eos>"]
PROMPTS = ["the old red fox saw a blue bird and", "it ran", "the dog slept near the cat"]


def tokenizer(vocab: dict[str, int] | None = None, **kwargs: Any) -> PreTrainedTokenizerFast:
    """One token a word; an end-of-sequence token, and no padding token unless given."""
    model = Tokenizer(WordLevel(VOCAB if vocab is None else vocab, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    options = {"unk_token": "<unk>", "eos_token": "<eos>", **kwargs}
    return PreTrainedTokenizerFast(tokenizer_object=model, **options)


def _ready(kind: Any, config: Any, seed: int, eos: int | None) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config).eval()
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = eos
        model.generation_config.pad_token_id = 0
    return model


def _llama_config(vocab_size: int, **options: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
        **options,
    )


def llama(seed: int, vocab_size: int = V, eos: int | None = EOS) -> LlamaForCausalLM:
    """Rotary positions. A large initialisation, so that predictions depend on the context."""
    return _ready(LlamaForCausalLM, _llama_config(vocab_size), seed, eos)


def llama_value(seed: int, **options: Any) -> LlamaForTokenClassification:
    """A scalar scorer: one number for every prefix."""
    config = _llama_config(V, **{"num_labels": 1, **options})
    return _ready(LlamaForTokenClassification, config, seed, None)


def _gpt2_config(vocab_size: int, **options: Any) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
        **options,
    )


def gpt2(seed: int, vocab_size: int = V, eos: int | None = EOS) -> GPT2LMHeadModel:
    """Learned absolute positions: a wrong position changes everything."""
    return _ready(GPT2LMHeadModel, _gpt2_config(vocab_size), seed, eos)


def gpt2_value(seed: int, **options: Any) -> GPT2ForTokenClassification:
    """A scalar scorer with absolute positions."""
    config = _gpt2_config(V, **{"num_labels": 1, **options})
    return _ready(GPT2ForTokenClassification, config, seed, None)


def bert_value(seed: int) -> BertForTokenClassification:
    """Bidirectional: no scorer of prefixes."""
    config = BertConfig(
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        num_labels=1,
    )
    return _ready(BertForTokenClassification, config, seed, None)


def bloom(seed: int, vocab_size: int = V, eos: int | None = EOS) -> BloomForCausalLM:
    """Positions from the attention mask (ALiBi): forward takes no position_ids."""
    config = BloomConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
    )
    return _ready(BloomForCausalLM, config, seed, eos)


def vivid(model: Any, seed: int) -> Any:
    """The model with large weights of its own seed, the same under every version of transformers:
    it says different tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def bigram(seed: int, vocab_size: int = V) -> Any:
    """A step(tokens) -> logits without state: logits depend on the last token only."""
    table = 2.0 * torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(seed))
    return lambda tokens: table[tokens[:, -1]]


def teacher_forced(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Logits float32 [T, V] before each response token: one row, no padding, no cache."""
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].float()


def three_models() -> Ensemble:
    """A Llama, a GPT-2 and a Llama whose embedding is padded to more ids; none ends by itself."""
    models = [llama(0, eos=None), gpt2(1, eos=None), llama(2, V + 9, eos=None)]
    return Ensemble(models, tokenizer(eos_token=None))


def without_transformers(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter in which transformers cannot be imported."""
    blocked = "import sys\nsys.modules['transformers'] = None\n"
    root = Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", blocked + code], capture_output=True, text=True, cwd=root
    )


def ids_of(prompt: str) -> list[int]:
    return [VOCAB[word] for word in prompt.split()]


def by_hand(
    models: list[Any], prompts: list[list[int]], response: list[int], history: bool, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """log pi* [T] and the models' log-probabilities [T, M+1] of a response, by full passes."""
    logits = [
        teacher_forced(model, prompt, response)
        for model, prompt in zip(models, prompts, strict=True)
    ]
    prefix = np.zeros(len(models))
    drawn, each = [], []
    for step, token in enumerate(response):
        now = [x[step].double().numpy() for x in logits]
        own = history and options.get("normalizer", "exact") == "exact"
        if options.get("divergence", "reverse_kl") != "reverse_kl":
            options = {"plausibility": 1e-3} | options  # the decoder's default off the corners
        mixed = reference.log_probs_row(
            now[0], now[1:], prefix_logprobs=prefix if history else None,
            mixture_prefix_logprobs=sum(drawn) if own else None, **options,
        )  # fmt: skip
        vocab = len(mixed)
        each.append([reference.log_softmax(x[:vocab])[token] for x in now])
        drawn.append(mixed[token])
        prefix = prefix + each[-1]
    return np.array(drawn), np.array(each)


TASTE = normal(0, 64)


def taste(sequences: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A score of the tokens alone, wherever padding stands."""
    return (TASTE[sequences] * mask).sum(dim=1)


def seeds_of(row_seed: int, count: int) -> list[int]:
    """The documented seeds of one prompt's continuations."""
    mix = reference.splitmix64
    return [row_seed, *(mix(mix(row_seed) + k) for k in range(1, count))]
