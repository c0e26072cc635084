"""A dozen families of transformers against their own `generate`; all: tests/architectures.py."""

from __future__ import annotations

from typing import Any

import architectures
import pytest
import torch
from small_models import small_model
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForTokenClassification,
)

from mod_fused import Ensemble, generate

# What is refused in each family; everything else equals transformers.
FAMILIES: dict[str, dict[str, str]] = {
    "bamba": {},
    "bart": {"padded": "takes no position_ids", "beyond": "has 12 positions"},
    "bloom": {},
    "falcon (ALiBi)": {},
    "gemma2": {},
    "gpt2": {"beyond": "has 12 positions"},
    "llama (dynamic RoPE)": {"padded": "rotary frequencies change at 12 tokens"},
    "mamba": {},
    "minimax": {"copied": "reorders the attention layers only"},
    "openai-gpt": {"beyond": "has 12 positions"},
    "opt": {"beyond": "has 12 positions"},
    "phi3 (LongRoPE)": {"padded": "rotary frequencies change at 12 tokens"},
    "qwen2 (YaRN)": {},
    "qwen2_vl (text alone)": {},
    "recurrent_gemma": {"padded": "convolutions read the padding"},
    "rwkv": {
        "padded": "takes no position_ids",
        "permuted": "mixes the rows of a batch",
        "copied": "mixes the rows of a batch",
    },
    "xlnet": {"padded": "takes no position_ids"},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_equals_its_own_generate_or_is_refused(kind: str) -> None:
    found = architectures.examine(kind)
    assert set(found) == set(architectures.COLUMNS), found
    for column, outcome in found.items():
        if (reason := FAMILIES[kind].get(column)) is None:
            assert outcome == "equal", (column, outcome)
        else:
            assert outcome.startswith("refused: ") and reason in outcome, (column, outcome)


def test_a_wrong_token_is_seen_by_every_comparison(monkeypatch: Any) -> None:
    small = architectures.Small("llama")
    right = small.ours

    for part, message in (("tokens", "differs"), ("logprobs", "nats off")):

        def wrong(*args: Any, part: str = part, **options: Any) -> Any:
            out = right(*args, **options)
            getattr(out, part)[-1, -1] += 1
            return out

        monkeypatch.setattr(small, "ours", wrong)
        for check in architectures.CHECKS.values():
            with pytest.raises(architectures.Wrong, match=message):
                check(small)


def _ensemble(model: Any) -> Ensemble:
    return Ensemble([None, model])


@pytest.mark.parametrize(
    ("auto", "kind", "options", "message"),
    [
        (AutoModel, "llama", {}, "LlamaModel, which has no head"),
        (AutoModelForMaskedLM, "bert", {}, "BertForMaskedLM, which has no head"),
        (AutoModelForTokenClassification, "llama", {}, "LlamaForTokenClassification, which has no"),
        (None, "bert", {"is_decoder": False}, "is_decoder=False"),
        (None, "electra", {"is_decoder": False}, "is_decoder=False"),
        (None, "xlm", {}, "causal=False"),
        (None, "gemma3_text", {"use_bidirectional_attention": True}, "attention=True"),
        (None, "roberta", {}, "positions begin behind its padding id"),
        (None, "camembert", {}, "positions begin behind its padding id"),
    ],
)
def test_what_is_no_causal_language_model_is_refused(
    auto: Any, kind: str, options: dict[str, Any], message: str
) -> None:
    model = small_model(kind, 0, auto=auto, **options)
    with pytest.raises(TypeError, match=f"policy 1 is a .*{message}"):
        _ensemble(model)


def test_a_longer_text_before_leaves_nothing_in_dynamic_rotary_frequencies() -> None:
    small = architectures.Small("llama (dynamic RoPE)")
    # A prompt past their 12 positions: shorter ones bring the first frequencies back.
    prompt = torch.cat([small.ids[:1]] * 2, dim=1)
    first = small.ours(prompt).logprobs
    small.policy.generate(input_ids=torch.cat([small.ids[:1]] * 4, dim=1), max_new_tokens=2)
    assert torch.equal(small.ours(prompt).logprobs, first)


def test_two_batches_in_progress_share_a_model_that_keeps_its_state_on_modules() -> None:
    small = architectures.Small("recurrent_gemma")
    ensemble = _ensemble(small.policy)
    prompts = [small.prompt(0), small.prompt(1)]
    states = [ensemble.start([ids], [None], max_new_tokens=4) for ids in prompts]
    tokens: list[Any] = [None, None]
    drawn: list[list[int]] = [[], []]
    for _ in range(4):
        for place, state in enumerate(states):
            tokens[place] = state.step(tokens[place])[1][0].argmax(-1)
            drawn[place].append(int(tokens[place]))
    assert drawn == [small.alone[row].tokens[0, :4].tolist() for row in (0, 1)]


def test_a_decoder_whose_config_counts_fewer_encoder_layers_decodes_with_a_cache() -> None:
    model = small_model("bart", 0, encoder_layers=1)
    ids = torch.tensor([[3, 4, 5]])
    options: dict[str, Any] = {"weights": [1.0], "do_sample": False, "max_new_tokens": 4}
    cached, recomputed = (
        generate(_ensemble(model), input_ids=ids, eos_token_id=[], use_cache=c, **options).tokens
        for c in (True, False)
    )
    assert torch.equal(cached, recomputed)


def test_left_padding_of_an_unknown_architecture_needs_positions_and_a_mask() -> None:
    from transformers import GPT2LMHeadModel

    class Foreign(GPT2LMHeadModel):
        """As remote code may look: forward takes no positions."""

        def forward(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Any:
            return super().forward(input_ids, attention_mask=attention_mask, **options)

    model = Foreign(small_model("gpt2", 0).config).eval()
    ids, mask = torch.tensor([[3, 4], [0, 5]]), torch.tensor([[1, 1], [0, 1]])
    with pytest.raises(ValueError, match=r"policy 1 \(Foreign\) cannot read padded prompts"):
        _ensemble(model).start([ids], [mask])


def test_an_unknown_architecture_with_a_state_gets_no_padding_and_no_copies(
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr("mod_fused.decoding.architectures._is_known", lambda model: False)
    model = small_model("bamba", 0)  # as if it were remote code
    ids, mask = torch.tensor([[3, 4], [0, 5]]), torch.tensor([[1, 1], [0, 1]])
    with pytest.raises(ValueError, match="cannot read padded prompts: padding may enter its state"):
        _ensemble(model).start([ids], [mask])
    with pytest.raises(ValueError, match="rows of policy 1 .* cannot be copied"):
        _ensemble(model).start([ids], [None]).fork(2)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("moshi", "other tokens with a cache than without"),
        ("prophetnet", "other probabilities with a cache than without"),
        ("reformer", "hashes at random"),
    ],
)
def test_models_that_contradict_themselves_are_refused(kind: str, message: str) -> None:
    with pytest.raises(TypeError, match=f"is not supported: .*{message}"):
        _ensemble(small_model(kind, 0))


@pytest.mark.parametrize(
    "kind",
    [
        *("bert-generation", "big_bird", "camembert", "data2vec-text", "ernie", "megatron-bert"),
        *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta"),
        *("xlm-roberta-xl", "xmod"),
    ],
)
def test_a_configuration_that_is_no_decoder_is_refused(kind: str) -> None:
    with pytest.raises(TypeError, match="is_decoder=False"):
        _ensemble(small_model(kind, 0, is_decoder=False))


@pytest.mark.parametrize("kind", ["bloom", "falcon_mamba", "mamba", "mamba2", "mpt"])
def test_padding_without_positions_is_taken_where_the_mask_is_enough(kind: str) -> None:
    ids, mask = torch.tensor([[3, 4], [0, 5]]), torch.tensor([[1, 1], [0, 1]])
    model = small_model(kind, 0)
    padded = _ensemble(model).start([ids], [mask], max_new_tokens=2).step()[1][0]
    alone = _ensemble(model).start([ids[1:, 1:]], [None], max_new_tokens=2).step()[1][0]
    assert (padded[1:] - alone).abs().max() < 1e-5


def test_what_single_families_cannot_do_is_refused() -> None:
    ids, mask = torch.tensor([[3, 4], [0, 5]]), torch.tensor([[1, 1], [0, 1]])
    with pytest.raises(ValueError, match="its cached steps attend to the padding"):
        _ensemble(small_model("git", 0)).start([ids], [mask])
    with pytest.raises(ValueError, match="Pass use_cache=True"):
        _ensemble(small_model("cpmant", 0)).start([ids], [None], use_cache=False)
    for kind, reason in (("xlstm", "cannot be reordered"), ("rwkv", "mixes the rows")):
        state = _ensemble(small_model(kind, 0)).start([ids[:1]], [None])
        with pytest.raises(ValueError, match=f"cannot be copied: .*{reason}"):
            state.fork(2)
    _ensemble(small_model("rwkv", 0)).start([ids], [None], use_cache=False)  # a batch is fine then


def test_what_a_model_or_its_config_declares_is_refused(monkeypatch: Any) -> None:
    model = small_model("gpt2", 0)
    for owner, name, value, message in (
        (model, "output_modalities", ("audio",), "generates no text"),
        (model.config, "is_causal", False, "is_causal=False"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value, raising=False)
            with pytest.raises(TypeError, match=message):
                _ensemble(model)
    monkeypatch.setattr(model.config, "is_decoder", False, raising=False)
    _ensemble(model)  # GPT-2 reads from the left to the right whatever this says
    monkeypatch.setattr("mod_fused.decoding.architectures._is_known", lambda model: False)
    with pytest.raises(TypeError, match="is_decoder=False"):
        _ensemble(model)


def test_padding_needs_a_mask_and_ends_where_rotary_frequencies_change() -> None:
    from transformers import LlamaForCausalLM

    class Foreign(LlamaForCausalLM):
        def forward(self, input_ids: Any, position_ids: Any = None) -> Any:
            return super().forward(input_ids, position_ids=position_ids)

    ids, mask = torch.tensor([[3, 4], [0, 5]]), torch.tensor([[1, 1], [0, 1]])
    with pytest.raises(ValueError, match="takes no attention_mask"):
        _ensemble(Foreign(small_model("llama", 0).config).eval()).start([ids], [mask])
    for kind in ("llama (dynamic RoPE)", "phi3 (LongRoPE)"):
        ensemble = _ensemble(small_model(kind, 0))
        ensemble.start([ids], [mask], max_new_tokens=11)  # it reads 12 tokens
        with pytest.raises(ValueError, match="frequencies change at 12 tokens"):
            ensemble.start([ids], [mask], max_new_tokens=12)
