"""transformers' `GenerationConfig` as arguments of `generate`: what it means here, and what is
refused because nothing here does it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from .ensemble import Ensemble
from .masks import ProcessorMasks
from .options import count
from .streaming import streaming

#: Arguments of the same name and meaning.
_SAME = (
    "max_time", "stop_strings", "num_return_sequences", "num_beams", "eos_token_id",
    "pad_token_id", "use_cache", "output_scores", "output_logits", "bad_words_ids",
    "repetition_penalty",
)  # fmt: skip
#: Those that transformers reads only where it samples, and only where it searches.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_SEARCHING = ("length_penalty", "early_stopping")
_LENGTHS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens")
#: They become logits processors that only exclude tokens.
_MASKING = (
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "forced_bos_token_id",
    "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip
#: Without effect on a decoder of prompts whose log pi* sums to one: they name other forms of the
#: same output, tokens for empty prompts, or how an assistant works where there is one.
_WITHOUT_EFFECT = (
    "return_dict_in_generate", "renormalize_logits", "bos_token_id", "decoder_start_token_id",
    "disable_compile", "max_cache_len", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "max_matching_ngram_size", "assistant_lookbehind",
    "target_lookbehind", "transformers_version",
)  # fmt: skip
#: Everything else is refused unless it is None, False or the value that turns it off.
_OFF: dict[str, Any] = {
    "cache_implementation": "dynamic",
    "diversity_penalty": 0.0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "num_beam_groups": 1,
    "typical_p": 1.0,
}
_HANDLED = {*_SAME, *_SAMPLING, *_SEARCHING, *_LENGTHS, *_MASKING, *_WITHOUT_EFFECT, "do_sample"}
#: What transformers takes where neither a call nor a config says otherwise.
_DEFAULTS: dict[str, Any] = {"do_sample": False, "top_k": 50}
_NEW_TOKENS = 20

P = ParamSpec("P")
R = TypeVar("R")


def configured(function: Callable[P, R]) -> Callable[P, R]:
    """Give `generate` its generation_config: the config's values go where the call has none."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if kwargs.get("generation_config") is None:
            return function(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        # A thread that reads the streamer must not wait for ever when the config is refused.
        with streaming(given.get("streamer")) as stream:
            if given.get("streamer") is not None:
                given["streamer"] = stream
            config = given.pop("generation_config")
            if given.get("do_sample", False) is None:  # None leaves it to the config
                del given["do_sample"]
            return function(**{**given, **arguments_of(config, given)})  # type: ignore[call-arg]

    return call


def check_config(config: Any) -> None:
    """Refuse what a generation config asks for and `generate` does not do.

    Raises:
        TypeError, ValueError: names the fields.
    """
    from transformers import GenerationConfig

    if not isinstance(config, GenerationConfig):
        raise TypeError(
            "generation_config must be a transformers GenerationConfig, "
            f"got {type(config).__name__}"
        )
    names = vars(GenerationConfig()).keys() | _OFF.keys()
    asked = {
        name: value
        for name in sorted(names - _HANDLED)
        if not name.startswith("_")
        and (value := getattr(config, name, None)) is not None
        and value is not False
        and value != _OFF.get(name)
    }
    if asked:
        fields = ", ".join(f"{name}={value!r}" for name, value in asked.items())
        raise ValueError(f"generation_config asks for what mod_fused does not do: {fields}")


def arguments_of(config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `generate` that a config adds to those that were given, and mask_fn."""
    check_config(config)
    ensemble = given["ensemble"]
    if not isinstance(ensemble, Ensemble):
        raise TypeError(f"ensemble must be a mod_fused.Ensemble, got {type(ensemble).__name__}")

    def value(name: str) -> Any:
        found = getattr(config, name, None)
        return given.get(name, _DEFAULTS.get(name) if found is None else found)

    searching = value("num_beams") not in (None, 1)
    names = [*_SAME, *(_SAMPLING if value("do_sample") else ()), *(_SEARCHING if searching else ())]
    added = {name: found for name in names if (found := value(name)) is not None}
    added["do_sample"] = value("do_sample")

    encoding = ("prompts", "input_ids", "attention_mask", "add_special_tokens")
    prompts = {name: given[name] for name in encoding if name in given}
    ids = ensemble.encode(**prompts, models=[ensemble.first])[0][0]
    added |= _lengths(config, given, ids.shape[1])
    longest = ids.shape[1] + count("max_new_tokens", (added | given)["max_new_tokens"], 1)
    if processors := _processors(config, ids, longest):
        added["mask_fn"] = ProcessorMasks(processors, given.get("mask_fn"))
    return added


def _lengths(config: Any, given: dict[str, Any], width: int) -> dict[str, int]:
    """max_new_tokens and min_new_tokens, where they are not given, for prompts of this width."""
    added: dict[str, int] = {}
    if "max_new_tokens" not in given:
        longest = config.max_new_tokens
        if longest is None and config.max_length is not None:
            longest = count("max_length of generation_config", config.max_length, 1) - width
            if longest < 1:
                raise ValueError(
                    f"max_length of generation_config must exceed the prompts' {width} tokens, "
                    f"got {config.max_length}"
                )
        added["max_new_tokens"] = _NEW_TOKENS if longest is None else longest
    if "min_new_tokens" not in given:
        shortest, least = config.min_new_tokens, config.min_length
        if shortest is None and least is not None:
            shortest = max(0, count("min_length of generation_config", least, 0) - width)
        if shortest is not None:
            added["min_new_tokens"] = shortest
    return added


def _processors(config: Any, prompts: Tensor, max_length: int) -> list[Any]:
    """The logits processors that transformers makes of a config, those that exclude tokens, in its
    order."""
    from transformers.generation import logits_process

    made: Any = logits_process
    device, width = prompts.device, prompts.shape[1]
    # A forced first token stands before those whose beginning is watched.
    begin = width + (width == 1 and config.forced_bos_token_id is not None)
    makers: dict[str, Callable[[Any], Any]] = {
        "no_repeat_ngram_size": made.NoRepeatNGramLogitsProcessor,
        "encoder_no_repeat_ngram_size": lambda x: made.EncoderNoRepeatNGramLogitsProcessor(
            x, prompts
        ),
        "forced_bos_token_id": made.ForcedBOSTokenLogitsProcessor,
        "forced_eos_token_id": lambda x: made.ForcedEOSTokenLogitsProcessor(
            max_length, x, device=device
        ),
        "suppress_tokens": lambda x: made.SuppressTokensLogitsProcessor(x, device=device),
        "begin_suppress_tokens": lambda x: made.SuppressTokensAtBeginLogitsProcessor(
            x, begin, device=device
        ),
    }
    asked = {name: getattr(config, name, None) for name in makers}
    off = {"no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0}
    processors = [
        makers[name](x) for name, x in asked.items() if x is not None and x != off.get(name)
    ]
    for processor in processors:
        check_forced(processor)
    return processors


def check_forced(processor: Any) -> None:
    """Refuse to force one of several tokens: transformers takes each with the same probability,
    whatever the models say."""
    name = "forced_eos_token_id"
    if type(processor).__name__ == "ForcedEOSTokenLogitsProcessor":
        if (number := processor.eos_token_id.numel()) != 1:
            raise ValueError(f"{name} must be one id, got {number}")
