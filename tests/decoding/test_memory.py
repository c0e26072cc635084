"""What decoding takes at least: compared with caches that transformers fills, refused in time."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
)

from mod_fused import Ensemble, generate, guidance
from mod_fused.decoding import memory

SIZES: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 16,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "grouped": LlamaConfig(**SIZES, num_key_value_heads=2),
    "head size": LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=16),
    "gpt2": GPT2Config(vocab_size=30, n_embd=32, n_layer=3, n_head=2),
    "falcon": FalconConfig(**SIZES, multi_query=True, alibi=False),
    "falcon 40b": FalconConfig(
        **SIZES, multi_query=True, new_decoder_architecture=True, num_kv_heads=2, alibi=False
    ),
    "sliding": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=6),
    "some slide": Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=6),
    "deeper encoder": BartConfig(
        vocab_size=30,
        d_model=32,
        encoder_layers=5,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=16,
        is_decoder=True,
        is_encoder_decoder=False,
    ),
    "compressed": DeepseekV3Config(
        **SIZES,
        num_key_value_heads=4,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        first_k_dense_replace=2,
    ),
    "shared layers": Gemma3nTextConfig(
        **(SIZES | {"num_hidden_layers": 4, "intermediate_size": [16] * 4}),
        num_key_value_heads=2,
        head_dim=8,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=30,
        hidden_size_per_layer_input=4,
        activation_sparsity_pattern=[0.0] * 4,
        laurel_rank=2,
        layer_types=["full_attention"] * 4,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tokens", [3, 11])
def test_the_numbers_of_a_cache_are_those_that_it_holds(name: str, tokens: int) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        cache = model(torch.ones(1, tokens, dtype=torch.int64), use_cache=True).past_key_values
    cache = getattr(cache, "self_attention_cache", cache)  # an encoder-decoder's model
    held = sum(
        layer.keys.numel() + layer.values.numel()
        for layer in cache.layers
        if layer.keys is not None
    )
    assert memory.cached_numbers(model, tokens) == held


def test_a_model_without_keys_and_values_counts_for_nothing() -> None:
    config = MambaConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(config)
    assert memory.cached_numbers(model, 100) == 0


def test_the_formula_counts_caches_logits_and_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [tiny.llama(0), tiny.gpt2(1)]
    ids = [torch.ones(3, 5, dtype=torch.int64), torch.ones(3, 7, dtype=torch.int64)]
    rows = 3 * 4
    caches = sum(2 * 2 * 2 * 16 * (n + 10) for n in (5, 7))  # keys and values of 2 layers, 2 heads
    expected = rows * (4 * caches + 4 * 2 * tiny.V + 15 * (8 + 4 + 4 * 2))
    for available, fits in ((expected, True), (expected - 1, False)):
        monkeypatch.setattr(memory, "available_bytes", lambda device, x=available: x)
        if fits:
            memory.check_decoding(models, ids, 4, 10)
        else:
            with pytest.raises(ValueError, match=r"decoding 12 rows of up to 10 new tokens"):
                memory.check_decoding(models, ids, 4, 10)
            memory.check_decoding(models, ids, 4, 10, use_cache=False)


def test_each_device_has_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [torch.ones(3, 5, dtype=torch.int64)] * 2
    spread = tiny.llama(0)
    spread.hf_device_map = {"model": 0, "lm_head": 1}
    asked: dict[str, int] = {}
    monkeypatch.setattr(memory, "check_memory", lambda n, what, d: asked.update({d.type: n}))
    memory.check_decoding([tiny.llama(0), tiny.llama(1).to("meta")], ids, 4, 10)
    model = 12 * 4 * (2 * 2 * 2 * 16 * 15 + tiny.V)
    responses = 12 * 15 * (8 + 4 + 4 * 2)
    assert asked == {"cpu": model + responses, "meta": model}
    memory.check_decoding([tiny.llama(0), spread], ids, 4, 10)
    assert asked["cpu"] == model + responses


def test_kept_distributions_count_and_generate_says_how_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ensemble, asked = Ensemble([tiny.llama(0), tiny.llama(1)]), []
    monkeypatch.setattr(memory, "check_memory", lambda n, what, device: asked.append(n))
    options: dict[str, Any] = {"input_ids": torch.ones(3, 5, dtype=torch.int64), "weights": [0.5]}
    for kept in ({}, {"output_scores": True}, {"output_scores": True, "output_logits": True}):
        generate(ensemble, **options, max_new_tokens=10, **kept)
    each = 3 * 10 * tiny.V * 4
    assert [n - asked[0] for n in asked] == [0, each, 2 * each]


def test_rows_that_cannot_fit_are_refused_before_a_model_runs() -> None:
    models = [tiny.llama(0), tiny.llama(1)]
    for model in models:
        model.register_forward_pre_hook(lambda *given: pytest.fail("a model ran"))
    ensemble = Ensemble(models, tiny.tokenizer())
    many = 10**11
    with pytest.raises(ValueError, match=f"decoding {many} rows .* at least .*iB of memory"):
        generate(ensemble, "fox", weights=[1.0], num_return_sequences=many)
    score = lambda sequences, mask: sequences[:, -1].float()  # noqa: E731
    for choose in (
        lambda: guidance.best_of_n(ensemble, "fox", score_fn=score, n=many),
        lambda: guidance.blockwise_best_of_k(
            ensemble, "fox", score_fn=score, k=many, block_length=2, weights=[1.0]
        ),
    ):
        with pytest.raises(ValueError, match=f"decoding {many} rows"):
            choose()


def test_what_nobody_can_measure_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.available_bytes(torch.device("meta")) is None
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    memory.check_memory(2**80, "all of it")


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0.0 bytes"), (1023, "1,023.0 bytes"), (1536, "1.5 KiB"), (2**40, "1.0 TiB")],
)
def test_bytes_in_words(count: int, words: str) -> None:
    assert memory.in_words(count) == words
    assert memory.in_words(10**400).endswith(" PiB")


def test_scores_do_not_depend_on_how_many_rows_are_scored_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = torch.randint(2, tiny.V, (7, 5), generator=torch.Generator().manual_seed(0))
    for scorer in (tiny.llama(1), tiny.llama_value(1)):
        score = guidance.prefix_score([scorer], [2.0])
        whole = score(ids, torch.ones_like(ids))
        with monkeypatch.context() as patch:
            patch.setattr("mod_fused.guidance.blockwise._VALUES", 3 * 5 * tiny.V)
            parts = score(ids, torch.ones_like(ids))
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
