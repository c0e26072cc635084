"""transformers' GenerationConfig: as the policy's own `generate` reads it, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tiny
import torch
from transformers import GenerationConfig

from mod_fused import Ensemble, generate

PAD, FOX, DOG = (tiny.VOCAB[word] for word in ("a", "fox", "dog"))


@pytest.fixture(scope="module")
def corner() -> tuple[Ensemble, Any, Any]:
    """A reference and a policy, the policy, and the prompts as it reads them."""
    tokenizer = tiny.tokenizer(pad_token="a", padding_side="left")
    policy = tiny.vivid(tiny.llama(0), 0)
    batch = tokenizer(tiny.PROMPTS, return_tensors="pt", padding=True)
    return Ensemble([tiny.gpt2(1), policy], tokenizer), policy, batch


def config_of(**fields: Any) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": 12, "pad_token_id": PAD, **fields})


CONFIGS: dict[str, dict[str, Any]] = {
    "nothing": {"max_new_tokens": None},
    "max_length": {"max_new_tokens": None, "max_length": 14},
    "max_new_tokens before max_length": {"max_length": 10},
    "min_new_tokens": {"min_new_tokens": 7, "eos_token_id": [0, 21]},
    "min_length": {"min_length": 19, "eos_token_id": [0, 21]},
    "min_new_tokens before min_length": {
        **{"min_new_tokens": 1, "min_length": 20, "eos_token_id": [0, 21]},
    },
    "eos_token_id": {"eos_token_id": [20, 21]},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[FOX], [5, 20], [21]], "eos_token_id": 21},
    "suppress_tokens": {"suppress_tokens": [5, FOX, 12, 15]},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(12))},
    "forced_eos_token_id": {"forced_eos_token_id": tiny.EOS, "min_new_tokens": 12},
    "num_beams": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    "num_return_sequences": {"num_beams": 3, "num_return_sequences": 2, "min_new_tokens": 4},
    "unused": {"renormalize_logits": True, "use_cache": False, "typical_p": 1.0, "top_p": 0.5},
}


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS.keys())
def test_at_a_corner_the_tokens_are_those_of_the_policy(
    corner: tuple[Ensemble, Any, Any], fields: dict[str, Any]
) -> None:
    models, policy, batch = corner
    config = config_of(**fields)
    expected = policy.generate(**batch, generation_config=config)
    out = generate(models, tiny.PROMPTS, weights=[1.0], generation_config=config)
    assert torch.equal(out.sequences, expected)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name in CONFIGS[name]])
def test_each_field_makes_a_difference(corner: tuple[Ensemble, Any, Any], name: str) -> None:
    fields = CONFIGS[name]
    rest = {field: value for field, value in fields.items() if field != name}
    options: dict[str, Any] = {"prompts": tiny.PROMPTS, "weights": [1.0]}
    out = generate(corner[0], **options, generation_config=config_of(**fields))
    without = generate(corner[0], **options, generation_config=config_of(**rest))
    assert not torch.equal(out.sequences, without.sequences)


def test_a_forced_first_token_stands_behind_prompts_of_one_token(
    corner: tuple[Ensemble, Any, Any],
) -> None:
    models, policy, _ = corner
    config = config_of(forced_bos_token_id=DOG, begin_suppress_tokens=list(range(2, 12)))
    ids = torch.tensor([[3], [9]])
    expected = policy.generate(input_ids=ids, generation_config=config)
    out = generate(models, input_ids=ids, weights=[1.0], generation_config=config)
    assert torch.equal(out.sequences, expected) and out.tokens[:, 0].eq(DOG).all()


def test_sampling_has_the_filters_of_the_config_and_transformers_default_top_k() -> None:
    models = [tiny.llama(0, 90), tiny.gpt2(1, 90)]
    ids = torch.tensor([[3, 7, 60], [9, 5, 8]])
    some = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02}
    for fields in ({}, some, {"top_k": 0}, {"top_k": 0, "min_p": 0.3}):
        config = config_of(do_sample=True, output_scores=True, max_new_tokens=1, **fields)
        config.return_dict_in_generate = True
        expected = models[1].generate(input_ids=ids, generation_config=config)
        out = generate(Ensemble(models), input_ids=ids, weights=[1.0], generation_config=config)
        theirs = expected.scores[0].log_softmax(1)
        torch.testing.assert_close(out.scores[0], theirs, atol=1e-5, rtol=0)


def test_what_the_call_says_itself_wins(corner: tuple[Ensemble, Any, Any]) -> None:
    config = config_of(do_sample=True, temperature=0.3, top_k=2, min_p=0.2, eos_token_id=FOX)
    config.max_length, config.min_length = 9, 30
    ids = torch.tensor([[3, 7], [9, 5]])
    own: dict[str, Any] = {
        "do_sample": None,  # says nothing
        "temperature": 1.0,  # the default: it counts all the same
        "top_k": 0,
        "max_new_tokens": 3,
        "min_new_tokens": 1,
        "eos_token_id": [],
        "mask_fn": lambda step, sequences: torch.arange(tiny.V).ne(5).expand(2, tiny.V),
    }
    options: dict[str, Any] = {"input_ids": ids, "weights": [0.5], "seed": 3, "output_scores": True}
    config.suppress_tokens = [4]
    out = generate(corner[0], **options, **own, generation_config=config)
    without_both = torch.ones(2, tiny.V, dtype=torch.bool)
    without_both[:, [4, 5]] = False
    own["mask_fn"] = lambda step, sequences: without_both
    expected = generate(corner[0], **options, **own, min_p=0.2)
    assert torch.equal(out.tokens, expected.tokens) and out.tokens.shape == (2, 3)
    for mine, theirs in zip(out.scores, expected.scores, strict=True):
        assert torch.equal(mine, theirs)


def test_stop_strings_and_a_limit_of_time_are_taken_over(
    corner: tuple[Ensemble, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = corner[0]
    free = generate(models, tiny.PROMPTS, weights=[1.0], do_sample=False, eos_token_id=[])
    word = free.texts[0].split()[3]
    config = config_of(stop_strings=[word])
    out = generate(models, tiny.PROMPTS, weights=[1.0], generation_config=config)
    assert out.finish_reasons[0] == "stop" and out.texts[0].split()[-1] == word
    seconds = iter([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))
    config = config_of(max_time=2.5, min_new_tokens=9)
    out = generate(models, tiny.PROMPTS, weights=[1.0], generation_config=config)
    assert out.tokens.shape[1] == 3 and set(out.finish_reasons) == {"max_time"}


REFUSED: dict[str, Any] = {
    "assistant_early_exit": 2,
    "cache_implementation": "static",
    "constraints": [1],
    "diversity_penalty": 0.5,
    "dola_layers": "low",
    "encoder_repetition_penalty": 1.2,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "exponential_decay_length_penalty": (2, 1.1),
    "force_words_ids": [[3]],
    "guidance_scale": 1.5,
    "is_assistant": True,
    "low_memory": True,
    "num_beam_groups": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "penalty_alpha": 0.6,
    "prefill_chunk_size": 4,
    "prompt_lookup_num_tokens": 3,
    "remove_invalid_values": True,
    "sequence_bias": [[[3], 1.0]],
    "token_healing": True,
    "top_h": 0.4,
    "typical_p": 0.8,
    "watermarking_config": {"bias": 1.0},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_nothing_here_does_is_refused_by_name(
    corner: tuple[Ensemble, Any, Any], name: str
) -> None:
    config = config_of()
    setattr(config, name, REFUSED[name])
    with pytest.raises(ValueError, match=f"does not do: {name}="):
        generate(corner[0], tiny.PROMPTS, weights=[1.0], generation_config=config)


def test_every_field_of_a_config_is_handled_or_refused() -> None:
    from mod_fused.decoding import generation_config as module

    known = module._HANDLED | REFUSED.keys() | {"compile_config", "cache_config"}
    known |= {"speculation_type", "use_mtp", "assistant_ensemble_weight"}
    known |= {"continuous_batching_config"}
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields <= known


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"temperature": 0.5}, TypeError, "a transformers GenerationConfig, got dict"),
        (config_of(max_new_tokens=None, max_length=12), ValueError, "prompts' 12 tokens, got 12"),
        (config_of(forced_eos_token_id=[1, 2]), ValueError, "forced_eos_token_id must be one id"),
        (config_of(min_new_tokens=13), ValueError, "min_new_tokens must be at most"),
        (config_of(num_beams=2, do_sample=True), ValueError, "do_sample cannot be combined"),
    ],
    ids=str,
)
def test_a_refused_config_ends_the_streamer(
    corner: tuple[Ensemble, Any, Any], given: Any, error: type[Exception], message: str
) -> None:
    class Streamer:
        ended = 0

        def put(self, tokens: torch.Tensor) -> None:
            raise AssertionError("nothing is drawn")

        def end(self) -> None:
            self.ended += 1

    streamer = Streamer()
    with pytest.raises(error, match=message):
        generate(corner[0], tiny.PROMPTS, weights=[1.0], generation_config=given, streamer=streamer)
    assert streamer.ended == 1
