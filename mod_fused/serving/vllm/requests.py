"""What a request asks for: its own arguments beside vLLM's, checked where it is admitted.

An exception in a worker would end the engine, so that everything a client can send is checked here,
in the frontend's process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from ...call.checks import check_mixture
from ...decoding.options import support_cut
from ...divergence import ReverseKL, get_divergence

PREFIX = "mod_"
#: Keys beside ours that vLLM itself reads or writes.
_VLLM_KEYS = {"session_id", "kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode"}
#: What Model Runner V2 has room for: more would end its worker.
_MOST = {"logit_bias": 1024, "allowed_token_ids": 1024, "stop_token_ids with min_tokens": 128}
#: Far larger weights make every token invalid.
_LARGEST_WEIGHT = 1e6
#: vLLM's beam search sends its steps as requests of this kind, without the caller's arguments.
_BEAM_SEARCH = {"max_tokens": 1, "detokenize": False, "watermarking": False}


@dataclass(frozen=True)
class Arguments:
    """A request's own arguments, without their prefix; `mod_fused.sample` and `mod_fused.generate`
    document all but the last."""

    weights: tuple[float, ...]
    divergence: str = "reverse_kl"
    normalizer: str = "exact"
    sequence_history: bool = False
    plausibility: float | str | None = "auto"
    model_logprobs: bool = False

    @property
    def automatic_cut(self) -> bool:
        """Whether the support cut is the default one, which steps with a mask do without."""
        return self.plausibility == "auto"

    @property
    def cut(self) -> float:
        """The plausibility of `mod_fused.sample`; 0 is off."""
        used = [w for w in self.weights if w != 0.0]
        if self.automatic_cut and used in ([], [1.0]):
            return 0.0  # pi* is one of the models
        return support_cut(self.plausibility, self.divergence) or 0.0

    @property
    def history(self) -> bool:
        """Whether the response so far enters the formula: under reverse KL it cancels."""
        return self.sequence_history and type(get_divergence(self.divergence)) is not ReverseKL


@dataclass(frozen=True)
class Settings:
    """What the engine was started with, as far as requests are concerned."""

    policies: int
    eos_token_ids: tuple[int, ...]  # of all models
    vocab_size: int  # tokens that all models and tokenizers have: those that are drawn
    width: int  # tokens that all models can read, and a prompt may hold
    names_models: bool = True  # the tokenizer takes ids beyond the vocabulary, which stand for them
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of arguments, with their prefix

    def text(self) -> str:
        """The settings as JSON, which travels to the workers in the model's config."""
        return json.dumps(asdict(self))

    @classmethod
    def of_text(cls, text: str) -> Settings:
        """The inverse of `text`."""
        given = json.loads(text)
        return cls(**{**given, "eos_token_ids": tuple(given["eos_token_ids"])})


def _flag(name: str, value: object) -> bool:
    # vllm_xargs turns true and false into 1 and 0.
    if value not in (0, 1) or not isinstance(value, (bool, int)):
        raise ValueError(f"{PREFIX}{name} must be true or false, got {value!r}")
    return bool(value)


def _weights(value: object, policies: int) -> tuple[float, ...]:
    numbers = value if isinstance(value, Sequence) and not isinstance(value, str) else None
    if numbers is None or not all(type(x) in (int, float) for x in numbers):
        raise ValueError(f"{PREFIX}weights must be a list of {policies} numbers, got {value!r}")
    if len(numbers) != policies or not all(abs(x) <= _LARGEST_WEIGHT for x in numbers):
        raise ValueError(
            f"{PREFIX}weights must be {policies} finite numbers of at most {_LARGEST_WEIGHT:.0f}, "
            f"one per policy, got {value!r}"
        )
    return tuple(float(x) for x in numbers)


def arguments(extra: Mapping[str, Any], settings: Settings) -> Arguments:
    """A request's own arguments out of `SamplingParams.extra_args`.

    Raises:
        ValueError: for arguments that are unknown, missing or wrong; the message is for the client.
    """
    given = {key: value for key, value in extra.items() if key.startswith(PREFIX)}
    known = [PREFIX + each.name for each in fields(Arguments)]
    unknown = sorted(given.keys() - set(known))
    if "mod_values" in unknown:
        raise ValueError("mod_values: values (trained scorers) are not supported inside vLLM")
    unknown += sorted(extra.keys() - set(given) - _VLLM_KEYS)
    if unknown:
        raise ValueError(f"unknown arguments {unknown}; known are {known}")
    values = {key.removeprefix(PREFIX): x for key, x in {**settings.defaults, **given}.items()}
    if values.get("weights") is None:
        raise ValueError(
            f"mod_weights is missing: {settings.policies} numbers, one per policy, in vllm_xargs"
        )
    values["weights"] = _weights(values["weights"], settings.policies)
    for name in ("sequence_history", "model_logprobs"):
        if name in values:
            values[name] = _flag(name, values[name])
    cut = values.get("plausibility")
    if cut is not None and not isinstance(cut, (int, float, str)):
        raise ValueError(f'mod_plausibility must be a number, "auto" or null, got {cut!r}')
    found = Arguments(**values)
    try:
        logits = torch.empty(1, 2, device="meta")
        history = torch.empty(1, settings.policies + 1, device="meta") if found.history else None
        exact = found.normalizer == "exact"
        check_mixture(
            logits,
            [logits] * settings.policies,
            list(found.weights),
            divergence=found.divergence,
            normalizer=found.normalizer,
            prefix_logprobs=history,
            mixture_prefix_logprobs=None if history is None or not exact else history[:, 0],
            plausibility=support_cut(found.plausibility, found.divergence),
        )
    except (TypeError, ValueError) as error:
        ours = str(error).split()[0] in values
        raise ValueError(f"{PREFIX}{error}" if ours else str(error)) from None
    return found


def check(params: SamplingParams, settings: Settings) -> Arguments:
    """Refuse what cannot be served, and let the end-of-sequence tokens of all models end the
    request.

    Raises:
        ValueError: with one sentence for the client.
    """
    if not params.extra_args and all(getattr(params, k) == v for k, v in _BEAM_SEARCH.items()):
        if params.logprobs is not None and params.logprob_token_ids is None:
            raise ValueError("beam search is not supported by mod_fused inside vLLM")
    found = arguments(params.extra_args or {}, settings)
    for name in ("prompt_logprobs", "prompt_logprob_token_ids", "trace_decode_token_ids"):
        if getattr(params, name, None) is not None:
            raise ValueError(f"{name} is not supported by mod_fused inside vLLM")
    if not all(abs(x) <= 3.4e38 for x in (params.logit_bias or {}).values()):
        raise ValueError(f"logit_bias must be finite, got {params.logit_bias}")
    repetition = params.repetition_detection
    for name, value in {"top_k": params.top_k, **(vars(repetition) if repetition else {})}.items():
        if value >= 2**63:  # the message to the engine has no room for it
            raise ValueError(f"{name} must fit into 64 bits, got {value}")
    # The children of a request have its seed and the next ones.
    if params.seed is not None and not -(2**63) <= params.seed <= 2**63 - params.n:
        raise ValueError(f"seed to seed + n - 1 must fit into 64 bits, got seed = {params.seed}")
    models = settings.policies + 1
    if found.model_logprobs and not settings.names_models:
        raise ValueError("mod_model_logprobs is not supported with this tokenizer")
    if found.model_logprobs and (params.logprobs is None or 0 <= params.logprobs < models):
        raise ValueError(
            f"mod_model_logprobs needs logprobs of at least {models}, the number of models, "
            f"got {params.logprobs}"
        )
    ends = params.all_stop_token_ids | set(settings.eos_token_ids)
    counts = {
        "logit_bias": len(params.logit_bias or ()),
        "allowed_token_ids": len(params.allowed_token_ids or ()),
        "stop_token_ids with min_tokens": len(ends) if params.min_tokens else 0,
    }
    for name, most in _MOST.items():
        if counts[name] > most:
            raise ValueError(f"{name} may hold at most {most} tokens, got {counts[name]}")
    if not params.ignore_eos:
        missing = set(settings.eos_token_ids) - set(params.stop_token_ids or ())
        params.stop_token_ids = [*(params.stop_token_ids or ()), *sorted(missing)]
        params._all_stop_token_ids.update(missing)
    return found


class ChecksV1(LogitsProcessorV1):
    """Checks requests; never touches logits (Model Runner V1)."""

    settings: Settings

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        if sampling_params.logprob_token_ids:
            # It would return these tokens alone for every request of the batch.
            raise ValueError("logprob_token_ids is not supported with Model Runner V1")
        check(sampling_params, cls.settings)

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


class ChecksV2(LogitsProcessorV2):
    """Checks requests; never touches logits (Model Runner V2)."""

    settings: Settings

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        check(sampling_params, cls.settings)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        return False

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        return logits


def checks(runner: str, settings: Settings) -> str:
    """The name by which vLLM finds the checks of an engine's requests, in any process; "V1" or
    "V2". The name holds the settings, since a process may serve several engines."""
    return f"{__name__}:Checks{runner}_{settings.text().encode().hex()}"


@cache
def __getattr__(name: str) -> type:
    kind, _, text = name.partition("_")
    base = {"ChecksV1": ChecksV1, "ChecksV2": ChecksV2}.get(kind)
    if base is None or not text:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return type(name, (base,), {"settings": Settings.of_text(bytes.fromhex(text).decode())})
