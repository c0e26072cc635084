"""`generate`'s arguments: checked and put on the device before any model or op runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call.checks import check_draw, check_mixture
from ..call.fields import FLOATS, check_tensor, number
from ..dispatch.backends import choose
from ..divergence import ReverseKL, get_divergence, is_built_in
from ..torch_kernels.mixture import normal
from ..torch_kernels.philox import continuation_seeds, split_mix
from .ensemble import Ensemble
from .rows import placed, repeated


class Limits(NamedTuple):
    """How long responses are, how many, and what ends them."""

    max_new_tokens: int
    copies: int  # responses to each prompt that are drawn
    returned: int  # responses to each prompt that are returned
    eos_token_ids: list[int]
    pad_token_id: int
    stop_strings: list[str]
    min_new_tokens: int


def plain(value: Any) -> Any:
    """NumPy's numbers and arrays, also inside lists, as Python's; everything else as it is."""
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    if isinstance(value, Tensor) or not hasattr(value, "tolist"):
        return value
    return value.tolist()


def check_limits(
    ensemble: Ensemble,
    max_new_tokens: Any,
    num_return_sequences: Any,
    num_candidates: Any,
    eos_token_id: Any,
    pad_token_id: Any,
    stop_strings: Any,
    min_new_tokens: Any = 0,
) -> Limits:
    """These arguments of `mod_fused.generate`, checked."""
    ends = ensemble.eos_token_ids if eos_token_id is None else eos_ids(eos_token_id)
    pad = ensemble.padding_id(ends) if pad_token_id is None else pad_token_id
    returned = count("num_return_sequences", num_return_sequences, 1)
    drawn = returned if num_candidates is None else count("num_candidates", num_candidates, 1)
    longest, shortest = count("max_new_tokens", max_new_tokens, 1), 0
    if min_new_tokens is not None:
        shortest = count("min_new_tokens", min_new_tokens, 0)
    if shortest > longest:
        raise ValueError(
            f"min_new_tokens must be at most max_new_tokens = {longest}, got {shortest}"
        )
    return Limits(
        longest,
        drawn,
        returned,
        ends,
        count("pad_token_id", pad, 0, ensemble.vocab_size),
        _stop_strings(stop_strings, ensemble.tokenizer),
        shortest,
    )


def check_vocab_size(vocab_size: Any, ensemble: Ensemble) -> int | None:
    """`vocab_size` as an int, at most what the language models can read. The width of a plain
    callable's logits is known only once it runs."""
    if vocab_size is None:
        # The op cuts padded embeddings; here the tokens are cut that some tokenizer lacks.
        return None if ensemble.common_ids is None else ensemble.vocab_size
    size, limit = count("vocab_size", vocab_size, 1), ensemble.vocab_size
    if limit is not None and size > limit:
        raise ValueError(f"vocab_size must be at most the models' {limit} tokens, got {size}")
    return size


#: Off reverse KL `generate` excludes tokens that the reference finds this much less likely than its
#: most likely one.
DEFAULT_PLAUSIBILITY = 1e-3


def support_cut(plausibility: Any, divergence: Any) -> Any:
    """The plausibility of `mod_fused.sample` for that of `generate`."""
    if not isinstance(plausibility, str):
        return plausibility
    if plausibility != "auto":
        raise ValueError(
            f"plausibility must be in [0, 1], one number or B, None or 'auto', got {plausibility!r}"
        )
    return None if type(get_divergence(divergence)) is ReverseKL else DEFAULT_PLAUSIBILITY


def off_at_corners(options: dict[str, Any], valued: bool) -> float | Tensor | None:
    """The default cut, by row where weights are: 0 where pi* is one of the models, which then loses
    no token. `options` are those of `ready_options`; `valued`: there are values."""
    given = [options["weights"], options["value_weights"]]
    if given[1] is None:
        given[1] = [1.0] if valued else []
    host: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    w, v = (normal(x if isinstance(x, Tensor) else torch.tensor(x or [], **host)) for x in given)
    used, ones = (w != 0).sum(-1), (w == 1).sum(-1)
    corner = (used == ones) & (ones <= 1) & (v == 0).all(-1)
    cut = options["plausibility"] * (~corner).double()
    return cut if any(isinstance(x, Tensor) for x in given) else float(cut)


def ready_options(
    ensemble: Ensemble,
    options: dict[str, Any],
    num_values: Callable[[Any], int],
    limits: Limits,
    batch: int,
    device: torch.device,
) -> dict[str, Any]:
    """Options of `mod_fused.sample`, seed and position among them, checked and made ready for all
    steps: tensors on the device, with one entry for each of the B K responses; seeds int64 [B K].

    Args:
        ensemble: the models.
        options: as they were given.
        num_values: tells J, given the value_weights.
        limits: of the responses.
        batch: B, how many prompts there are.
        device: of the logits.

    Raises:
        TypeError, ValueError: for options that `mod_fused.sample` would refuse.
    """
    options = {name: plain(value) for name, value in options.items()}
    position = check_position(options["position"], batch, limits.max_new_tokens)
    options["position"] = position
    _check(ensemble, batch, device, num_values(options["value_weights"]), options)

    options = {name: placed(name, value, device) for name, value in options.items()}
    seeds = options["seed"]
    if seeds is None:
        # One seed for all steps: the position differs from step to step.
        seeds = torch.randint(-(2**63), 2**63 - 1, (batch,), dtype=torch.int64, device=device)
    elif not isinstance(seeds, Tensor):
        seeds = split_mix(seeds, batch, device)
    options = {name: repeated(name, value, limits.copies) for name, value in options.items()}
    options["seed"] = continuation_seeds(seeds, limits.copies)
    return options


def _check(
    ensemble: Ensemble,
    batch: int,
    device: torch.device,
    num_values: int,
    options: dict[str, Any],
) -> None:
    """Check the options as the op does, on tensors without memory ("meta"): nothing is computed and
    no kernel compiled."""
    given: dict[str, Any] = {
        k: v.to("meta") if isinstance(v, Tensor) else v for k, v in options.items()
    }
    name, position, seed = (given.pop(key) for key in ("backend", "position", "seed"))
    filters = {key: given.pop(key) for key in ("temperature", "top_k", "top_p", "min_p")}
    logits = torch.empty(batch, 2, dtype=torch.float32, device="meta")
    mixing = check_mixture(
        ref_logits=None if ensemble.models[0] is None else logits,
        policy_logits=[logits] * ensemble.num_policies,
        values=logits.expand(num_values, batch, 2) if num_values else None,
        value_ids=None,
        prefix_logprobs=None,
        vocab_size=None,
        **given,
    )
    check_draw(
        mixing,
        **filters,
        mask=None,
        seed=0 if seed is None else seed,  # None would draw seeds
        position=position,
        return_model_logprobs=False,
    )
    choose(name, device, mixing.divergence)


def check_position(position: Any, batch: int, max_new_tokens: int) -> int | Tensor:
    """The first position, an int or int64 [B]; the last token's must stay below 2^63."""
    if isinstance(position, Tensor):
        check_tensor("position", position, (torch.int64,), position.device, {"[B]": [batch]})
    one_each = isinstance(position, (Tensor, list))
    first = position.tolist() if isinstance(position, Tensor) else position
    numbers = [number("position", x, int) for x in (first if one_each else [first])]
    if one_each and len(numbers) != batch:
        raise ValueError(f"position must be one integer or B = {batch}, got {len(numbers)}")
    for x in numbers:
        if not 0 <= x <= 2**63 - max_new_tokens:
            raise ValueError(
                f"position must be in [0, 2^63 - max_new_tokens = {2**63 - max_new_tokens}], "
                f"got {x}"
            )
    if isinstance(position, Tensor):
        return position
    return torch.tensor(numbers, dtype=torch.int64, device="cpu") if one_each else numbers[0]


class History(NamedTuple):
    """Log-probability of the responses so far, float64; None where it is not needed."""

    models: Tensor | None  # [B K, columns], under each model
    own: Tensor | None  # [B K], log pi*


def first_history(
    prefix_logprobs: Any,
    mixture_prefix_logprobs: Any,
    sequence_history: bool,
    options: dict[str, Any],
    shape: tuple[int, int],
    copies: int,
    device: torch.device,
) -> History:
    """The history before the first step. `shape` is [B, columns]; `options` are `generate`'s."""
    given = {
        "prefix_logprobs": (prefix_logprobs, "[B, models]", shape),
        "mixture_prefix_logprobs": (mixture_prefix_logprobs, "[B]", shape[:1]),
    }
    kind, exact = get_divergence(options["divergence"]), options["normalizer"] == "exact"
    needed = sequence_history and type(kind) is not ReverseKL
    for name, (x, _, _) in given.items():
        if x is not None and not sequence_history:
            raise ValueError(f"{name} were given without sequence_history=True")
    if needed and exact and not is_built_in(kind):
        raise ValueError(
            "sequence_history=True with the exact normalizer is possible for the built-in "
            f"divergences only, got {kind.name}; normalizer='zero' takes any"
        )
    own = needed and exact
    if own and (prefix_logprobs is None) != (mixture_prefix_logprobs is None):
        raise ValueError(
            "prefix_logprobs and mixture_prefix_logprobs go together with the exact normalizer, "
            "got only one of them"
        )
    if mixture_prefix_logprobs is not None and needed and not exact:
        raise ValueError("mixture_prefix_logprobs needs normalizer 'exact': Z = 0 has no mass")
    first = [
        _rows_of_prefix(name, x, symbols, size, device).repeat_interleave(copies, dim=0)
        for name, (x, symbols, size) in given.items()
    ]
    return History(first[0] if needed else None, first[1] if own else None)


def _rows_of_prefix(
    name: str, x: Any, symbols: str, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Log-probabilities of the responses before this call, float64; zeros for None."""
    if x is None:
        return torch.zeros(shape, dtype=torch.float64, device=device)
    if not isinstance(x, Tensor):
        try:
            x = torch.tensor(x, dtype=torch.float64, device=device)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} must be numbers {symbols}: {error}") from None
    x = check_tensor(name, x.to(device), FLOATS, device, {symbols: shape})
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return x.to(torch.float64)


def count(name: str, value: Any, least: int, limit: int | None = None) -> int:
    """An integer of any kind (Python, NumPy, a tensor of one) as an int, in [least, limit)."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    if limit is not None and number >= limit:
        raise ValueError(f"{name} must be below the models' {limit} token ids, got {number}")
    return number


def eos_ids(eos_token_id: int | Sequence[int] | Tensor) -> list[int]:
    """An eos_token_id of `generate`, one or several, as a list."""
    # A tensor without dimensions has __iter__, but cannot be iterated over.
    if not isinstance(eos_token_id, Iterable) or getattr(eos_token_id, "ndim", 1) == 0:
        eos_token_id = [count("eos_token_id", eos_token_id, 0)]
    return [count("eos_token_id", token, 0) for token in eos_token_id]


def _stop_strings(stop_strings: str | Sequence[str] | None, tokenizer: Any) -> list[str]:
    if stop_strings is None:
        return []
    stops = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
    if not all(isinstance(stop, str) for stop in stops):
        raise TypeError(f"stop_strings must be a string or a list of strings, got {stop_strings!r}")
    if not all(stops):
        raise ValueError(
            "stop_strings must not hold an empty string: it would end every row at once"
        )
    if stops and tokenizer is None:
        raise ValueError("stop_strings need a tokenizer: pass tokenizers to Ensemble")
    return stops
