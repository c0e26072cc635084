"""One batch in progress: what each model needs from one token to the next."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class EnsembleState:
    """One batch in progress: the caches of all models. Made by `Ensemble.start`."""

    def __init__(self, reference: CallableState | None, policies: list[CallableState]) -> None:
        self._reference = reference
        self._policies = policies

    @torch.no_grad()
    def step(self, tokens: Tensor | None = None) -> tuple[Tensor | None, list[Tensor]]:
        """Feed one token per row to every model and return their next-token logits.

        Args:
            tokens: int64 [B]; None at the first step, which reads the prompts.

        Returns:
            Logits [B, V_0] of the reference (None if there is none) and [B, V_i] of each policy.
        """
        reference = None if self._reference is None else self._reference.step(tokens)
        return reference, [policy.step(tokens) for policy in self._policies]

    def fork(self, copies: int) -> None:
        """Let each row go on as `copies` rows, next to each other, once its prompt has been read.

        To be called before the first step; also with one copy, if `select` is to be used.

        Raises:
            TypeError: if a model is a callable that keeps its own state, which nothing can copy.
        """
        for state in self._states():
            state.fork(copies)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, int64 [N] of the B that there are: caches are copied, not made
        anew, and a row may be taken any number of times."""
        for state in self._states():
            state.select(rows)

    def _states(self) -> list[CallableState]:
        return [*([] if self._reference is None else [self._reference]), *self._policies]


class CallableState:
    """What one callable needs from step to step; `CausalLMState` adds cache, mask and positions."""

    copies = 1  # rows that each row will become when the prompts have been read

    def __init__(
        self,
        model: Any,
        label: str,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        use_cache: bool,
    ) -> None:
        self.model = model
        self.label = label
        self.inputs = input_ids  # (B, n): what the next call is given
        self.attention_mask = attention_mask  # (B, all tokens so far) or None
        self.use_cache = use_cache

    def check(self, max_new_tokens: int) -> None:
        """Nothing is known about a callable."""

    def advance(self, tokens: Tensor | None) -> None:
        """Put the tokens int64 [B] drawn last into the next call; None before the first call."""
        if tokens is None:
            return
        new = tokens[:, None]
        self.inputs = new if self.use_cache else torch.cat([self.inputs, new], dim=1)
        if self.attention_mask is not None:
            seen = self.attention_mask
            self.attention_mask = torch.cat([seen, seen.new_ones(len(seen), 1)], dim=1)

    def step(self, tokens: Tensor | None) -> Tensor:
        self.advance(tokens)
        logits = self.forward()
        rows = self.inputs.shape[0]
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != rows:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"{self.label} must return logits [B={rows}, V], got {got}")
        if self.copies > 1:
            parents = torch.arange(rows, device=logits.device).repeat_interleave(self.copies)
            self.copies = 1
            self.select(parents)
            logits = logits[parents]
        return logits

    def fork(self, copies: int) -> None:
        if self.use_cache:
            raise TypeError(
                f"{self.label} is a callable that keeps its own state, so its rows cannot be "
                "copied: pass use_cache=False, which gives it the whole sequences"
            )
        self.copies = copies

    def select(self, rows: Tensor) -> None:
        self.inputs = self.inputs[rows]
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[rows]

    def forward(self) -> Tensor:
        return self.model(self.inputs)


class CausalLMState(CallableState):
    """A transformers model and its KV cache."""

    cache: Any = None
    reads_ahead = 0  # tokens read beyond the drawn ones

    @cached_property
    def accepted(self) -> frozenset[str]:
        return accepted_arguments(self.model)

    def check(self, max_new_tokens: int) -> None:
        if self.model.training:
            raise ValueError(
                f"{self.label} is in training mode, dropout would change it: call .eval() on it"
            )
        size = embedded_ids(self.model)
        low, high = (int(x) for x in torch.aminmax(self.inputs))
        if low < 0 or high >= size:
            bad = low if low < 0 else high
            raise ValueError(
                f"{self.label} has a vocabulary of {size} ids, its prompt holds the id {bad}"
            )
        limit = getattr(_text_config(self.model), "max_position_embeddings", None)
        needed = self.inputs.shape[1] + max_new_tokens - 1  # the last token drawn is never read
        needed += self.reads_ahead
        if limit is not None and needed > limit:
            raise ValueError(
                f"{self.label} has {limit} positions, a prompt of {self.inputs.shape[1]} tokens "
                f"and max_new_tokens={max_new_tokens} need {needed}: shorten one of them"
            )

    def forward(self) -> Tensor:
        options: dict[str, Any] = {"use_cache": self.use_cache, "return_dict": True}
        if self.use_cache and self.cache is not None:
            options["past_key_values"] = self.cache
        # Without padding there is no mask: transformers would read it on the host each step.
        if self.attention_mask is not None:
            options["attention_mask"] = self.attention_mask
            if "position_ids" in self.accepted:
                # Padding does not count, so a row has the positions that it would have alone.
                positions = positions_of(self.attention_mask)
                options["position_ids"] = positions[:, -self.inputs.shape[1] :]
        if "logits_to_keep" in self.accepted:
            options["logits_to_keep"] = 1
        output = self.model(input_ids=self.inputs, **options)
        if self.use_cache:
            self.cache = getattr(output, "past_key_values", None)
            if self.cache is None:
                raise ValueError(
                    f"{self.label} returns no past_key_values: pass use_cache=False to recompute"
                )
        return output.logits[:, -1]

    def fork(self, copies: int) -> None:
        self.copies = copies

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        if self.cache is not None:
            # Beam search's method: every kind of transformers cache has it, for any indices.
            self.cache.reorder_cache(rows)


def positions_of(attention_mask: Tensor) -> Tensor:
    """The position of every token in its row [B, n], padding (on the left) not counted."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def accepted_arguments(model: Any) -> frozenset[str]:
    """Names of the arguments that the model's forward takes: not all take positions."""
    return frozenset(inspect.signature(_unwrapped(model).forward).parameters)


def _unwrapped(model: Any) -> Any:
    """The module whose forward names its arguments: torch.compile and PEFT hide it behind *args."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_causal_lm(model: Any) -> bool:
    """Whether to call it as transformers does; every other callable is step(tokens) -> logits."""
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        return False
    return "input_ids" in accepted_arguments(model)


def _text_config(model: Any) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def embedded_ids(model: Any) -> int:
    """How many token ids a language model can read."""
    return _text_config(model).vocab_size
