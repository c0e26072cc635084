"""`custom_generate`: the decoding loop that transformers' own `generate` calls for a mixture.

    model.generate(
        **inputs, custom_generate=mod_fused.custom_generate, policies=[...], weights=[...]
    )

transformers prepares inputs, generation config, logits processors and stopping criteria, and hands
them over.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..decoding.ensemble import Ensemble
from ..decoding.generate import generate
from ..decoding.generation_config import check_config, check_forced
from ..decoding.masks import MaskFunction, ProcessorMasks
from ..decoding.options import eos_ids
from ..decoding.streaming import TransformersStream, streaming
from ..decoding.totals import Resampler
from ..decoding.values import ValueFunction, ValueGuide, ValueWeighting
from ..divergence import Divergence

_CLASSES = "transformers.generation.logits_process"
#: Logits processors that only exclude tokens: run on zeros, they give a mask.
_MASKING = {
    "EncoderNoRepeatNGramLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "PrefixConstrainedLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    "SuppressTokensLogitsProcessor",
}
#: The filters in the op's order, and their arguments.
_FILTERS = {
    "TemperatureLogitsWarper": "temperature",
    "TopKLogitsWarper": "top_k",
    "TopPLogitsWarper": "top_p",
    "MinPLogitsWarper": "min_p",
}
#: Arguments of transformers' `generate` that a callable does not get.
_NOT_HANDED_OVER = ("streamer", "assistant_model", "synced_gpus")
_CACHES = {"past_key_values", "cache", "cache_params", "state", "mems"}
#: Prepared for the loop of transformers' own; this one makes its own.
_PREPARED = {"use_cache", "logits_to_keep", "num_logits_to_keep", "cache_position"}


def custom_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    policies: Sequence[Any] | Ensemble,
    weights: Sequence[float] | Sequence[Sequence[float]] | Tensor,
    tokenizers: Any = None,
    divergence: str | Divergence = "reverse_kl",
    normalizer: str = "exact",
    sequence_history: bool = False,
    prefix_logprobs: Tensor | Sequence[Sequence[float]] | None = None,
    mixture_prefix_logprobs: Tensor | Sequence[float] | None = None,
    logit_scales: Sequence[float] | None = None,
    vocab_size: int | None = None,
    plausibility: float | str | Sequence[float] | Tensor | None = "auto",
    plausibility_tensor: int = 0,
    value_fn: ValueFunction | ValueGuide | None = None,
    value_weights: Sequence[float]
    | Sequence[Sequence[float]]
    | Tensor
    | ValueWeighting
    | None = None,
    mask_fn: MaskFunction | None = None,
    logit_bias: Mapping[int, float] | Sequence[Mapping[int, float]] | None = None,
    resample_fn: Resampler | Any = None,
    num_candidates: int | None = None,
    resample_below: float | None = None,
    seed: int | Sequence[int] | Tensor | None = None,
    position: int | Sequence[int] | Tensor = 0,
    stop_strings: str | Sequence[str] | None = None,
    one_head: bool | str = False,
    backend: str | None = None,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Decode for transformers' `generate`, which calls it: `model` is the reference.

    The generation config, the logits processors, the stopping criteria and a streamer are those of
    the call. Rows are drawn as `mod_fused.generate` draws them, with the same tokens for the same
    seeds; seed=None takes them from torch's generator. Only the end-of-sequence ids of the call or
    of `model` end a row, not the policies' own.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: as
            transformers prepares them.
        policies: the M policies, as in `Ensemble`; or an ensemble whose reference is `model`, as
            `Ensemble.from_adapters` makes one.
        weights: [M], or [B, M] with a row for each prompt.
        tokenizers: as in `Ensemble`; only to compare their vocabularies and for stop_strings.
        stop_strings: as in `mod_fused.generate`; needs tokenizers (transformers does not hand its
            own argument, tokenizer, over).
        streamer: found in the call of transformers' `generate`, which does not hand it over.
        others: as in `mod_fused.generate`, per-row ones with an entry for each prompt, functions
            with all rows.

    Returns:
        int64 [B, n + T], prompts and responses, or with return_dict_in_generate a
        `GenerateDecoderOnlyOutput`: sequences; logits, log pi* of each step; scores, the log of
        the probabilities with which its token was drawn, after processors and filters.

    Raises:
        TypeError, ValueError: before any model runs: for what `mod_fused.generate` refuses, and by
            name for beams, assistants, caches, embeddings and other inputs of the model, and for
            logits processors that neither only exclude tokens nor are one of its four filters.
        RuntimeError: a row had nothing to draw from (NaN logits, everything excluded).
    """
    called_with = _arguments_of_generate(input_ids)
    found = called_with.get("streamer")
    with streaming(found if streamer is None else streamer) as stream:
        if isinstance(stream, TransformersStream):
            stream.prompt_is_shown = streamer is None
        ensemble = _ensemble(model, policies, tokenizers)
        _check_call(generation_config, called_with)
        # No parameter: transformers would take a name of this signature out of its own call.
        attention_mask = model_kwargs.pop("attention_mask", None)
        _check_inputs(input_ids, attention_mask, model_kwargs)
        masking, filters = _read(logits_processor, bool(generation_config.do_sample))
        copies = generation_config.num_return_sequences or 1
        prompts, mask = _prompts(input_ids, attention_mask, copies)
        out = generate(
            ensemble,
            input_ids=prompts,
            attention_mask=mask,
            weights=weights,
            divergence=divergence,
            normalizer=normalizer,
            sequence_history=sequence_history,
            prefix_logprobs=prefix_logprobs,
            mixture_prefix_logprobs=mixture_prefix_logprobs,
            logit_scales=logit_scales,
            vocab_size=vocab_size,
            plausibility=plausibility,
            plausibility_tensor=plausibility_tensor,
            value_fn=value_fn,
            value_weights=value_weights,
            mask_fn=ProcessorMasks(masking, mask_fn) if masking else mask_fn,
            logit_bias=logit_bias,
            resample_fn=resample_fn,
            max_new_tokens=generation_config.max_length - input_ids.shape[1],
            num_return_sequences=copies,
            num_candidates=num_candidates,
            resample_below=resample_below,
            do_sample=bool(generation_config.do_sample),
            seed=seed,
            position=position,
            eos_token_id=[],  # one of the stopping criteria knows them
            pad_token_id=_padding(generation_config),
            stop_strings=stop_strings,
            stopping_criteria=stopping_criteria,
            streamer=stream if stream.active else None,
            use_cache=model_kwargs.get("use_cache") is not False,
            one_head=one_head,
            backend=backend,
            **filters,
            **_outputs(generation_config),
        )
    if not bool(out.valid.all()):
        rows = (~out.valid).nonzero()[:, 0].tolist()
        raise RuntimeError(
            f"rows {rows} had nothing to draw from: NaN logits, or every token was excluded"
        )
    sequences = out.sequences.to(input_ids.device)
    if not generation_config.return_dict_in_generate:
        return sequences
    from transformers import generation

    result: Any = generation.GenerateDecoderOnlyOutput
    return result(sequences=sequences, scores=out.scores, logits=out.logits)


def _ensemble(model: Any, policies: Any, tokenizers: Any) -> Ensemble:
    if not isinstance(policies, Ensemble):
        return Ensemble([model, *policies], tokenizers)
    if policies.models[0] is not model:
        raise ValueError("the reference of the ensemble must be the model whose generate is called")
    if tokenizers is not None:
        raise ValueError("tokenizers go with a list of policies; an ensemble has its own")
    return policies


def _arguments_of_generate(input_ids: Tensor) -> dict[str, Any]:
    """The arguments of the call of transformers' `generate` that prepared `input_ids`; {} if there
    is none. It hands over neither its streamer nor its assistant and says nothing about it: a
    reader of the streamer would wait for ever."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_locals.get("input_ids") is input_ids:
            if frame.f_globals.get("__name__") == "transformers.generation.utils":
                return {name: frame.f_locals.get(name) for name in _NOT_HANDED_OVER}
        frame = frame.f_back  # type: ignore[assignment]
    return {}


def _check_call(config: Any, called_with: dict[str, Any]) -> None:
    """Refuse other ways of decoding."""
    for name, value in called_with.items():
        if value and name != "streamer":
            raise ValueError(f"custom_generate cannot be combined with {name}")
    check_config(config)
    if config.num_beams not in (None, 1):
        raise ValueError(
            f"custom_generate has no beams, got num_beams = {config.num_beams}: "
            "mod_fused.generate has them"
        )


def _padding(config: Any) -> int | None:
    """transformers' padding id: without one of its own the first end-of-sequence id."""
    ends = [] if config.eos_token_id is None else eos_ids(config.eos_token_id)
    return ends[0] if config.pad_token_id is None and ends else config.pad_token_id


def _outputs(config: Any) -> dict[str, Any]:
    """Which distributions to return: transformers has them in its dictionary alone."""
    names = ("output_scores", "output_logits")
    return {name: bool(config.return_dict_in_generate and getattr(config, name)) for name in names}


def _check_inputs(input_ids: Tensor, mask: Tensor | None, model_kwargs: dict[str, Any]) -> None:
    """Refuse what the models would have to be given beside token ids and mask."""
    for name, value in model_kwargs.items():
        if _is_absent(value) or name in _PREPARED:
            continue
        if name in _CACHES:
            layers = getattr(value, "layers", None)
            if layers is None or any(map(_is_filled, layers)):
                raise ValueError(f"custom_generate begins with empty caches, got {name}")
        elif name == "position_ids":
            shown = torch.ones_like(input_ids) if mask is None else mask
            counted = shown.cumsum(-1) - 1
            if not bool(((value == counted) | (shown == 0)).all()):
                raise ValueError("custom_generate counts positions itself, got other position_ids")
        else:
            raise ValueError(f"custom_generate gives models token ids alone, got {name}")


def _is_filled(layer: Any) -> bool:
    """Whether a layer's cache has been written to. (Flags say it differently in every version.)"""
    states = [getattr(layer, name, None) for name in ("keys", "conv_states", "recurrent_states")]
    each = [y for x in states for y in (x.values() if isinstance(x, dict) else [x])]
    return any(isinstance(x, Tensor) and x.numel() for x in each)


def _is_absent(value: Any) -> bool:
    """None, or a record that holds nothing else, as of images that are not there."""
    return value is None or (isinstance(value, dict) and all(map(_is_absent, value.values())))


def _prompts(ids: Tensor, mask: Tensor | None, copies: int) -> tuple[Tensor, Tensor | None]:
    """The prompts of which transformers has made `copies` adjacent rows each, and their mask."""
    prompts = ids[::copies]
    repeated = prompts.repeat_interleave(copies, dim=0)
    if copies > 1 and not torch.equal(ids, repeated):
        raise ValueError(
            f"input_ids must hold each prompt {copies} times (num_return_sequences), one after the "
            f"other, got {list(ids.shape)}"
        )
    return prompts, None if mask is None else mask[::copies]


def _read(processors: Sequence[Any], do_sample: bool) -> tuple[list[Any], dict[str, Any]]:
    """The processors that only exclude tokens, and temperature and filters as arguments."""
    masking: list[Any] = []
    filters: dict[str, Any] = {}
    order = list(_FILTERS)
    for processor in processors:
        kind = type(processor)
        name = kind.__name__ if kind.__module__ == _CLASSES else None
        if name == "LogitNormalization":
            continue  # log pi* sums to one
        if name in _MASKING and not filters:
            check_forced(processor)
            masking.append(processor)
        elif name in _FILTERS and do_sample:
            if any(order.index(before) >= order.index(name) for before in _seen(filters)):
                raise ValueError(
                    f"{name} is there twice or out of order ({', '.join(order)}): set "
                    f"{_FILTERS[name]} in the generation config alone"
                )
            filters[_FILTERS[name]] = _value(processor, _FILTERS[name])
        else:
            raise ValueError(
                f"custom_generate cannot honour the logits processor {kind.__name__}: it takes "
                "those that only exclude tokens, then temperature, top-k, top-p and min-p"
            )
    return masking, filters


def _seen(filters: dict[str, Any]) -> list[str]:
    return [name for name, argument in _FILTERS.items() if argument in filters]


def _value(processor: Any, argument: str) -> Any:
    """The parameter of a filter, which must not keep tokens that the op would drop."""
    least = getattr(processor, "min_tokens_to_keep", 1)
    floor = getattr(processor, "filter_value", -math.inf)
    if least != 1 or floor != -math.inf:
        raise ValueError(
            f"{type(processor).__name__} must have min_tokens_to_keep=1 and filter_value=-inf, "
            f"got {least} and {floor}"
        )
    return getattr(processor, argument)
