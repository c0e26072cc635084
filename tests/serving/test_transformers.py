"""`custom_generate` inside transformers' own `generate`: at a corner the policy's own, elsewhere
`mod_fused.generate`; what transformers keeps to itself is found, the rest refused by name."""

from __future__ import annotations

import functools
import inspect
import threading
from typing import Any

import pytest
import tiny_models as tiny
import torch
from small_models import small_model
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
)
from transformers.generation import GenerateDecoderOnlyOutput, logits_process, stopping_criteria

import mod_fused
from mod_fused import Ensemble, custom_generate, generate

PAD, FOX, DOG = (tiny.VOCAB[word] for word in ("a", "fox", "dog"))


class Setting:
    """A reference, a policy, their ensemble, and the prompts as transformers is given them."""

    def __init__(self) -> None:
        self.tokenizer = tiny.tokenizer(pad_token="a", padding_side="left")
        self.reference = tiny.vivid(tiny.gpt2(1), 1)
        self.policy = tiny.vivid(tiny.llama(0), 0)
        for model in (self.reference, self.policy):
            model.generation_config.pad_token_id = None
        self.ensemble = Ensemble([self.reference, self.policy], self.tokenizer)
        self.batch = dict(self.tokenizer(tiny.PROMPTS, return_tensors="pt", padding=True))

    def mixed(self, **options: Any) -> Any:
        """The reference's own `generate`, with the mixture in its loop."""
        fixed: dict[str, Any] = {"policies": [self.policy], "weights": [1.0], "pad_token_id": PAD}
        if not {"input_ids", "inputs_embeds"} & options.keys():
            fixed |= self.batch
        return self.reference.generate(custom_generate=custom_generate, **{**fixed, **options})

    def own(self, **options: Any) -> Any:
        return self.policy.generate(**{**self.batch, "pad_token_id": PAD, **options})


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting()


def even_tokens(row: int, input_ids: torch.Tensor) -> list[int]:
    return list(range(int(input_ids[-1]) % 2, tiny.V, 2)) if row < 2 else [FOX, DOG, 5, 9]


GREEDY: dict[str, dict[str, Any]] = {
    "default": {},
    "max_length": {"max_length": 17},
    "eos_token_id": {"eos_token_id": [0, 21]},
    "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": [0, 21]},
    "min_length": {"min_length": 17, "eos_token_id": [0, 21]},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[FOX], [5, 20], [21]]},
    "suppress_tokens": {"suppress_tokens": [3, FOX, 12, 15]},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(12))},
    "forced_eos_token_id": {"forced_eos_token_id": DOG, "max_new_tokens": 6},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": even_tokens},
    "stopping_criteria": {"stopping_criteria": [lambda ids, scores: ids[:, -1] == 20]},
    "eos criterion": {
        "stopping_criteria": [stopping_criteria.EosTokenCriteria(20)], "eos_token_id": 5,
    },
    "max_time": {"max_time": 0.0},
    "use_cache": {"use_cache": False},
    "renormalize_logits": {"renormalize_logits": True},
    "no padding id": {"pad_token_id": None, "eos_token_id": [21, 0]},
    "generation_config": {
        "generation_config": GenerationConfig(max_new_tokens=5, suppress_tokens=[5], top_k=3)
    },
}  # fmt: skip


@pytest.mark.parametrize("options", GREEDY.values(), ids=GREEDY.keys())
def test_greedy_at_a_corner_is_the_policys_own_generate(
    setting: Setting, options: dict[str, Any]
) -> None:
    options = {"do_sample": False, **options}
    expected = setting.own(**options)
    found = setting.mixed(**options)
    assert torch.equal(found, expected) and found.dtype == expected.dtype


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_models_get_one_token_a_step_or_the_whole(setting: Setting, use_cache: bool) -> None:
    widths: list[int] = []

    def seen(model: Any, arguments: Any, given: dict[str, Any]) -> None:
        widths.append(given["input_ids"].shape[1])

    hook = setting.reference.register_forward_pre_hook(seen, with_kwargs=True)
    try:
        setting.mixed(use_cache=use_cache, max_new_tokens=3, do_sample=False, weights=[0.5])
    finally:
        hook.remove()
    assert widths == ([12, 1, 1] if use_cache else [12, 13, 14])


def test_scores_and_logits_give_the_policys_transition_scores(setting: Setting) -> None:
    options: dict[str, Any] = {
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
        "do_sample": False, "max_new_tokens": 9, "suppress_tokens": [5], "eos_token_id": [21, 0],
    }  # fmt: skip
    expected, out = setting.own(**options), setting.mixed(**options)
    assert type(out) is GenerateDecoderOnlyOutput and type(expected) is type(out)
    assert torch.equal(out.sequences, expected.sequences)
    for name in ("scores", "logits"):
        pairs = zip(getattr(out, name), getattr(expected, name), strict=True)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs.log_softmax(1), atol=1e-5, rtol=1e-5)
    theirs = setting.policy.compute_transition_scores(
        expected.sequences, expected.scores, normalize_logits=True
    )
    ours = setting.reference.compute_transition_scores(out.sequences, out.scores)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    without = setting.mixed(**options | {"output_scores": False, "output_logits": None})
    assert without.scores is None and without.logits is None
    assert torch.equal(setting.mixed(**options | {"return_dict_in_generate": False}), out.sequences)


def test_the_filters_are_the_policys_own(setting: Setting) -> None:
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True}
    options |= {"do_sample": True, "max_new_tokens": 1, "suppress_tokens": [4, 5]}
    some = {"temperature": 0.6, "top_k": 9, "top_p": 0.8, "min_p": 0.03}
    for filters in ({}, some, {"top_k": 3}, {"top_k": 0, "min_p": 0.2}):
        expected = setting.own(**options, **filters).scores[0].log_softmax(1)
        found = setting.mixed(**options, **filters).scores[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


DRAWS: dict[str, dict[str, Any]] = {
    "divergence": {"weights": [0.6], "divergence": "jsd", "sequence_history": True},
    "weights by prompt": {"weights": [[0.1], [0.9], [1.4]], "divergence": "alpha:0.5"},
    "one seed": {"weights": [0.6], "seed": 4, "position": 3},
    "num_return_sequences": {"weights": [[0.1], [0.9], [1.4]], "num_return_sequences": 2},
    "num_candidates": {"weights": [0.5], "num_candidates": 4, "resample_below": 0.9},
    "others": {
        **{"weights": [0.5], "plausibility": 0.05, "plausibility_tensor": 1, "vocab_size": 20},
        **{"logit_scales": [1.0, 1.5], "normalizer": "zero", "divergence": "jeffrey"},
    },
    "value_fn": {
        **{"weights": [0.5], "value_weights": [2.0]},
        "value_fn": lambda step, ids: (ids[:, -1:] - torch.arange(tiny.V)).float().cos()[None],
    },
    "mask_fn": {"weights": [0.5], "mask_fn": lambda step, ids: torch.ones(3, tiny.V).tril(7) > 0},
    "stop_strings": {"weights": [0.5], "stop_strings": ["fox", "ed b"], "max_new_tokens": 40},
    "prefix_logprobs": {
        **{"weights": [0.5], "divergence": "jsd", "sequence_history": True},
        "prefix_logprobs": torch.tensor([[-1.0, -3.0], [-2.0, -1.0], [-4.0, -4.5]]),
        "mixture_prefix_logprobs": torch.tensor([-2.0, -1.5, -4.2]),
    },
}


@pytest.mark.parametrize("options", DRAWS.values(), ids=DRAWS.keys())
def test_rows_are_drawn_as_mod_fused_draws_them(setting: Setting, options: dict[str, Any]) -> None:
    how: dict[str, Any] = {"temperature": 0.9, "top_k": 12, "top_p": 0.97, "max_new_tokens": 8}
    how |= {"do_sample": True, "seed": [5, -6, 2**62], "pad_token_id": PAD, **options}
    expected = generate(setting.ensemble, tiny.PROMPTS, eos_token_id=tiny.EOS, **how)
    if "stop_strings" in options:
        how["tokenizers"] = setting.tokenizer
    found = setting.mixed(**how, eos_token_id=tiny.EOS)
    assert torch.equal(found, expected.sequences)
    assert not torch.equal(found, setting.mixed(**how | {"seed": [1, 2, 3]}))


def test_a_prefix_constraint_is_a_mask(setting: Setting) -> None:
    how: dict[str, Any] = {"weights": [0.5], "divergence": "jsd", "seed": 5, "max_new_tokens": 9}
    how |= {"top_k": 0, "pad_token_id": PAD, "eos_token_id": tiny.EOS}

    def mask(step: int, sequences: torch.Tensor) -> torch.Tensor:
        allowed = torch.zeros(3, tiny.V, dtype=torch.bool)
        for row, ids in enumerate(sequences):
            allowed[row, even_tokens(row, ids)] = True
        return allowed

    expected = generate(setting.ensemble, tiny.PROMPTS, mask_fn=mask, **how).sequences
    found = setting.mixed(**how, prefix_allowed_tokens_fn=even_tokens, do_sample=True)
    assert torch.equal(found, expected)
    both = setting.mixed(**how, mask_fn=mask, suppress_tokens=[FOX, DOG], do_sample=True)
    assert not torch.isin(both[:, 12:], torch.tensor([FOX, DOG])).any()


def test_without_a_seed_torchs_generator_decides(setting: Setting) -> None:
    how: dict[str, Any] = {"do_sample": True, "max_new_tokens": 8, "top_k": 0, "weights": [0.5]}
    torch.manual_seed(1)
    first, second = setting.mixed(**how), setting.mixed(**how)
    torch.manual_seed(1)
    assert torch.equal(setting.mixed(**how), first) and not torch.equal(first, second)


def through_a_wrapper(policies: Any) -> Any:
    def mixture(model: Any, input_ids: torch.Tensor, **rest: Any) -> Any:
        return custom_generate(model, input_ids, policies=policies, weights=[1.0], **rest)

    return mixture


@pytest.mark.parametrize("way", ["argument", "wrapper", "partial"])
def test_a_streamer_gets_prompt_and_tokens_once_and_ends(setting: Setting, way: str) -> None:
    batch = setting.tokenizer(tiny.PROMPTS[0], return_tensors="pt")
    streamer = TextIteratorStreamer(setting.tokenizer, skip_prompt=True, timeout=10)
    options: dict[str, Any] = {**batch, "do_sample": False, "max_new_tokens": 7}
    options |= {"pad_token_id": PAD}
    expected = setting.policy.generate(**options)[0, batch["input_ids"].shape[1] :]
    policies = [setting.policy]
    options |= {
        "argument": {"custom_generate": custom_generate, "policies": policies, "weights": [1.0]},
        "wrapper": {"custom_generate": through_a_wrapper(policies)},
        "partial": {
            "custom_generate": functools.partial(
                custom_generate, policies=policies, weights=[1.0], streamer=streamer
            )
        },
    }[way]
    if way != "partial":
        options["streamer"] = streamer
    thread = threading.Thread(target=setting.reference.generate, kwargs=options)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == setting.tokenizer.decode(expected).split()


def test_a_stream_of_several_rows_is_left_to_the_streamer(setting: Setting) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def put(self, tokens: torch.Tensor) -> None:
            self.seen.append(tokens.tolist())

        def end(self) -> None:
            self.seen.append("end")

    options: dict[str, Any] = {"do_sample": False, "eos_token_id": [0, 21]}
    ours, theirs = Streamer(), Streamer()
    setting.mixed(**options, streamer=ours)
    setting.own(**options, streamer=theirs)
    assert ours.seen == theirs.seen and len(ours.seen) > 4


class Doubled(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return 2 * scores


class Derived(logits_process.SuppressTokensLogitsProcessor):
    pass


def filled_cache() -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 4, 8), 0)
    return cache


SAMPLED: dict[str, Any] = {"do_sample": True, "top_k": 0}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 2}, "has no beams, got num_beams = 2"),
    ({"repetition_penalty": 1.2}, "processor RepetitionPenaltyLogitsProcessor"),
    ({"typical_p": 0.5, "do_sample": True}, "does not do: typical_p=0.5"),
    ({"prompt_lookup_num_tokens": 2}, "does not do: .*prompt_lookup_num_tokens=2"),
    ({"output_hidden_states": True}, "does not do: output_hidden_states=True"),
    ({"cache_implementation": "static"}, "does not do: cache_implementation='static'"),
    ({"logits_processor": LogitsProcessorList([Doubled()])}, "logits processor Doubled"),
    ({"logits_processor": [Derived([3])]}, "logits processor Derived"),
    ({"logits_processor": [logits_process.TopKLogitsWarper(3)]}, "processor TopKLogitsWarper"),
    (
        {"logits_processor": [logits_process.TopKLogitsWarper(3)], "do_sample": True},
        "TopKLogitsWarper .* set top_k in the generation config",
    ),
    (
        {"logits_processor": [logits_process.MinPLogitsWarper(0.1)], "temperature": 0.5, **SAMPLED},
        "TemperatureLogitsWarper is there twice or out of order",
    ),
    (
        {
            "logits_processor": [logits_process.TopPLogitsWarper(0.5, min_tokens_to_keep=2)],
            **SAMPLED,
        },
        "TopPLogitsWarper must have min_tokens_to_keep=1",
    ),
    ({"forced_eos_token_id": [3, 4]}, "forced_eos_token_id must be one id, got 2"),
    ({"past_key_values": filled_cache()}, "begins with empty caches, got"),
    ({"position_ids": torch.arange(12).expand(3, 12)}, "got other position_ids"),
    ({"token_type_ids": torch.zeros(3, 12, dtype=torch.int64)}, "token ids alone, got token_type"),
    ({"synced_gpus": True}, "cannot be combined with synced_gpus"),
    ({"max_time": 5.0, "num_candidates": 2, "do_sample": True}, "combined with max_time"),
    ({"num_candidates": 2}, "num_candidates needs candidates that differ"),
    ({"stop_strings": ["fox"]}, "stop_strings need a tokenizer"),
    ({"weights": [0.5, 0.5]}, "weights"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_it_does_not_do_is_refused_by_name_before_a_model_runs(
    setting: Setting, options: dict[str, Any], message: str
) -> None:
    class Streamer:
        ended = 0

        def put(self, tokens: torch.Tensor) -> None:
            pass

        def end(self) -> None:
            self.ended += 1

    def model(*arguments: Any) -> None:
        raise AssertionError("a model ran")

    streamer = Streamer()
    hooks = [m.register_forward_pre_hook(model) for m in (setting.reference, setting.policy)]
    if not {"num_beams", "num_candidates"} & options.keys():  # a streamer is refused before
        options = {"streamer": streamer, **options}
    reference = tiny.gpt2(0) if "token_type_ids" in options else setting.reference
    try:
        with pytest.raises(ValueError, match=message):
            fixed: dict[str, Any] = {"policies": [setting.policy], "weights": [1.0]}
            fixed |= {"pad_token_id": PAD, "custom_generate": custom_generate}
            reference.generate(**{**setting.batch, **fixed, "max_new_tokens": 4, **options})
    finally:
        for hook in hooks:
            hook.remove()
    assert streamer.ended == ("streamer" in options)


def test_an_assistant_embeddings_and_encoders_are_refused(setting: Setting) -> None:
    with pytest.raises(ValueError, match="combined with assistant_model"):
        setting.mixed(
            input_ids=torch.tensor([[3, 4]]), assistant_model=tiny.llama(5), max_new_tokens=3
        )
    embeddings = setting.reference.get_input_embeddings()(torch.tensor([[3, 4]]))
    with pytest.raises(ValueError, match="token ids alone, got inputs_embeds"):
        setting.mixed(inputs_embeds=embeddings.detach(), max_new_tokens=3)
    config = T5Config(
        **{"vocab_size": tiny.V, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1},
        **{"num_heads": 2, "decoder_start_token_id": 0, "eos_token_id": None},
    )
    with pytest.raises(TypeError, match="the reference is an encoder-decoder model"):
        T5ForConditionalGeneration(config).eval().generate(
            torch.tensor([[3, 4]]), custom_generate=custom_generate, policies=[], weights=[]
        )


def test_rows_that_transformers_did_not_repeat_are_refused(setting: Setting) -> None:
    config = GenerationConfig(num_return_sequences=2, max_length=9, do_sample=True)
    with pytest.raises(ValueError, match="input_ids must hold each prompt 2 times"):
        custom_generate(
            setting.reference,
            torch.tensor([[3], [4]]),
            logits_processor=[],
            stopping_criteria=[],
            generation_config=config,
            policies=[setting.policy],
            weights=[1.0],
        )


def test_a_row_without_anything_to_draw_is_an_error(setting: Setting) -> None:
    def broken(tokens: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(tokens), tiny.V)
        logits[1, 3] = torch.nan
        return logits

    with pytest.raises(RuntimeError, match=r"rows \[1\] had nothing to draw from"):
        setting.mixed(policies=[broken], do_sample=False, max_new_tokens=3)


@pytest.mark.parametrize("kind", ["qwen3_next", "mistral", "qwen2_vl (text alone)"])
def test_what_transformers_prepares_for_other_kinds_of_models_is_no_obstacle(kind: str) -> None:
    # Recurrent states, windows, and a record of images where there are none.
    reference, policy = (small_model(kind, seed) for seed in (1, 2))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
    options |= {"policies": [policy], "weights": [1.0], "custom_generate": custom_generate}
    ids = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6]])
    expected = policy.generate(ids, do_sample=False, max_new_tokens=6)
    assert torch.equal(reference.generate(ids, **options), expected)
    used = reference.generate(ids, max_new_tokens=6, return_dict_in_generate=True)
    cache = used.past_key_values if "past_key_values" in used else used.cache
    with pytest.raises(ValueError, match="begins with empty caches"):
        reference.generate(used.sequences, **options, past_key_values=cache)


def test_an_adapted_reference_counts_with_its_adapter(setting: Setting) -> None:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = get_peft_model(
            tiny.vivid(tiny.llama(0), 0),
            LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        ).eval()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, **setting.batch}
    options["pad_token_id"] = PAD
    expected = adapted.generate(**options)
    found = adapted.generate(
        **options, custom_generate=custom_generate, policies=[setting.reference], weights=[0.0]
    )
    assert torch.equal(found, expected)
    assert not torch.equal(found, setting.policy.generate(**options))


def test_every_argument_of_generate_has_a_place() -> None:
    ours = set(inspect.signature(custom_generate).parameters)
    handed_over = {
        "ensemble", "prompts", "input_ids", "attention_mask", "add_special_tokens",
    }  # fmt: skip
    handed_over |= {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    missing = inspect.signature(generate).parameters.keys() - ours - handed_over
    assert missing == {"return_model_logprobs"}  # transformers' output has no place for it
    assert mod_fused.custom_generate is custom_generate
