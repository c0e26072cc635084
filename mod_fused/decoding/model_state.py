"""One batch in progress: the state that each model keeps from one token to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import architectures
from .adapters import forward_module
from .architectures import CACHE_NAMES
from .one_head import OneHead
from .stacked_adapters import StackedModel


class EnsembleState:
    """One batch in progress: the caches of all models that run. Made by `Ensemble.start`.

    Args:
        states: of the models that run.
        places: for the reference and each policy the index of the state whose logits it gets; None
            where there is no reference. A model that does not run gets those of another.
        width: the most columns of logits; None: all.
        head: mixes the models' hidden states; None: each model has its own head.
    """

    def __init__(
        self,
        states: list[CallableState],
        places: list[int | None],
        width: int | None = None,
        head: OneHead | None = None,
    ) -> None:
        self._states, self._places, self._width, self._head = states, places, width, head

    @torch.no_grad()
    def step(self, tokens: Tensor | None = None) -> tuple[Tensor | None, list[Tensor]]:
        """Feed one token per row to every model and return their next-token logits.

        Args:
            tokens: int64 [B]; None at the first step, which reads the prompts.

        Returns:
            Logits [B, V_0] of the reference (None if there is none) and [B, V_i] of each policy.
            With one head: None, and the logits [B, V] of their mixture alone.
        """
        with nullcontext() if self._head is None else self._head.bypassed():
            logits = [x for s in self._states for x in s.step(tokens).chunk(s.models)]
        if self._head is not None:
            return None, [self._head.logits(logits)[:, : self._width]]
        return self._placed(logits)

    @torch.no_grad()
    def read(self, responses: Tensor) -> Iterator[tuple[Tensor | None, list[Tensor]]]:
        """The logits of `step` at each token of given responses, int64 [B, T], in place of steps.
        A language model reads the prompts and the responses in one pass."""
        for step in zip(*(state.read(responses) for state in self._states), strict=True):
            pairs = zip(step, self._states, strict=True)
            yield self._placed([x for logits, s in pairs for x in logits.chunk(s.models)])

    def fork(self, copies: int) -> None:
        """Let each row go on as `copies` adjacent rows once its prompt has been read.

        Call it before the first step, also with one copy if `select` will be used.

        Raises:
            TypeError: if a model is a callable that keeps its own state, which nothing can copy.
        """
        for state in self._states:
            state.fork(copies)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, int64 [N] with entries below B; each may occur any number of
        times. Caches are copied, not recomputed."""
        for state in self._states:
            state.select(rows)

    def _placed(self, logits: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        cut = [x[:, : self._width] for x in logits]
        reference, *policies = self._places
        return (
            None if reference is None else cut[reference],
            [cut[k] for k in policies if k is not None],
        )


class CallableState:
    """The state of one callable from step to step; `CausalLMState` adds that of transformers."""

    copies = 1  # rows that each row will become when the prompts have been read
    models = 1  # how many models' rows a batch holds, one model's after the other's

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
        self.sequences = input_ids  # (B, n + tokens drawn)
        self.attention_mask = attention_mask  # of the prompts (B, n), or None
        self.use_cache = use_cache
        self.started = False  # the prompts have been read

    def check(self, max_new_tokens: int) -> None:
        """Refuse a batch that the model cannot continue; nothing is known about a callable."""

    def append(self, tokens: Tensor | None) -> None:
        """Append the tokens drawn last, int64 [B], to the sequences; None before the first call."""
        if tokens is not None:
            new = tokens[:, None].to(self.sequences.device)
            self.sequences = torch.cat([self.sequences, new], dim=1)

    def step(self, tokens: Tensor | None) -> Tensor:
        self.append(tokens)
        logits = self.forward()
        self.started = True
        rows = self.sequences.shape[0]
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != rows:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"{self.label} must return logits [B={rows}, V], got {got}")
        if self.copies > 1:
            each = torch.arange(rows // self.models, device=logits.device)
            parents = each.repeat_interleave(self.copies)
            self.copies = 1
            self.select(parents)
            logits = logits.unflatten(0, (self.models, -1))[:, parents].flatten(0, 1)
        return logits

    def read(self, responses: Tensor) -> Iterator[Tensor]:
        """See `EnsembleState.read`."""
        for tokens in (None, *responses[:, :-1].unbind(1)):
            yield self.step(tokens)

    def fork(self, copies: int) -> None:
        if self.use_cache:
            raise TypeError(
                f"{self.label} is a callable that keeps its own state, so its rows cannot be "
                "copied: pass use_cache=False, which gives it the whole sequences"
            )
        self.copies = copies

    def select(self, rows: Tensor) -> None:
        rows = rows.to(self.sequences.device)
        self.sequences = self.sequences[rows]
        if self.attention_mask is not None:
            self.attention_mask = self.attention_mask[rows]

    def forward(self) -> Tensor:
        only_new = self.started and self.use_cache
        return self.model(self.sequences[:, -1:] if only_new else self.sequences)


class CausalLMState(CallableState):
    """A transformers model and the state that its own `generate` would keep from step to step.

    Every step calls the model's `prepare_inputs_for_generation`, as transformers does: there some
    models slice, shift, drop or rename their inputs.
    """

    reads_ahead = 0  # tokens read beyond the drawn ones
    keep = 1  # tokens at the end whose logits are needed

    def __init__(
        self,
        model: Any,
        label: str,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        use_cache: bool,
    ) -> None:
        self.home = input_ids.device  # where the logits go
        device = architectures.input_device(model)
        mask = None if attention_mask is None else attention_mask.to(device)
        super().__init__(model, label, input_ids.to(device), mask, use_cache)
        self.module_state = architectures.ModuleState(model)
        self.options: dict[str, Any] = {}

    def check(self, max_new_tokens: int) -> None:
        new_tokens = max_new_tokens - 1 + self.reads_ahead  # the last token drawn is never read
        architectures.check_run(
            self.model,
            self.label,
            self.sequences,
            self.attention_mask,
            self.use_cache,
            new_tokens,
        )

    def begin(self) -> None:
        """Set the keyword arguments with which transformers' `generate` would start."""
        model, accepted = self.model, architectures.accepted_arguments(self.model)
        self.options = {"use_cache": self.use_cache}
        # Without padding pass no mask: transformers would read it on the host at each step.
        if self.attention_mask is not None:
            self.options["attention_mask"] = self.attention_mask
        if "position_ids" in accepted:
            positions = model._prepare_position_ids_for_generation(self.sequences, self.options)
            self.options["position_ids"] = positions
        if "logits_to_keep" in accepted:
            kept: Any = self.keep
            if self.sequences.shape[1] > kept and architectures.keeps_places(model):
                # The head is one product of the contiguous copy that places make, and one for each
                # row of the slice that a number makes.
                kept = torch.arange(-kept, 0, device=self.sequences.device)
            self.options["logits_to_keep"] = kept
        if self.use_cache:
            self.options.update(architectures.new_cache(model))

    def prepare(self) -> dict[str, Any]:
        """The arguments of the next call, as the model itself prepares them."""
        first = not self.options
        if first:
            self.begin()
        elif self.use_cache and "logits_to_keep" in self.options:
            self.options["logits_to_keep"] = self.keep
        prepare = self.model.prepare_inputs_for_generation
        cached = CACHE_NAMES & self.options.keys()
        new = 1 if self.use_cache and cached and not first else None
        inputs = prepare(
            self.sequences, next_sequence_length=new, is_first_iteration=first, **self.options
        )
        if new and all(inputs.get(name) is None for name in (*cached, "mems")):
            # The model has dropped its cache to begin anew; some versions then pass one token only.
            for name in cached:
                del self.options[name]
            inputs = prepare(self.sequences, is_first_iteration=False, **self.options)
        return inputs

    def read(self, responses: Tensor) -> Iterator[Tensor]:
        unread = responses[:, :-1].to(self.sequences.device)
        length = (
            self.sequences.shape[1] + unread.shape[1] + architectures.virtual_tokens(self.model)
        )
        if not architectures.reads_in_one_pass(self.model, length):
            yield from super().read(responses)
            return
        self.sequences = torch.cat([self.sequences, unread], dim=1)
        if self.attention_mask is not None:
            ones = torch.ones_like(unread).to(self.attention_mask)
            self.attention_mask = torch.cat([self.attention_mask, ones], dim=1)
        self.keep = responses.shape[1]
        logits = self.forward_all()
        if logits.shape[1] != self.keep:
            raise ValueError(
                f"{self.label} ({type(self.model).__name__}) gives logits of {logits.shape[1]} of "
                f"the {self.keep} tokens that it was asked for"
            )
        for step in range(self.keep):
            yield logits[:, step].to(self.home)

    def forward(self) -> Tensor:
        return self.forward_all()[:, -1].to(self.home)

    def forward_all(self) -> Tensor:
        """The logits [B, keep, V] of the last tokens."""
        inputs = self.prepare()
        with self.module_state:
            output = forward_module(self.model)(**inputs, return_dict=True)
        self.options = self.model._update_model_kwargs_for_generation(
            output, self.options, is_encoder_decoder=False
        )
        return output.logits[:, -self.keep :]

    def fork(self, copies: int) -> None:
        if self.use_cache:
            architectures.check_selection(self.model, self.label)
        self.copies = copies

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        rows = rows.to(self.sequences.device)
        for name, value in self.options.items():
            if name == "attention_mask":
                self.options[name] = value[rows]
            elif name == "position_ids" and value.shape[-2] > 1:  # else one for all rows
                self.options[name] = value.index_select(-2, rows)
            elif name in CACHE_NAMES and value is not None:
                self.options[name] = architectures.selected(self.model, value, rows)
        self.module_state.select(rows)


class StackedState(CausalLMState):
    """Several models that share a base, in one batch of K B rows."""

    def __init__(
        self,
        stacked: StackedModel,
        running: Sequence[int],
        input_ids: Sequence[Tensor],
        attention_mask: Sequence[Tensor | None],
        use_cache: bool,
    ) -> None:
        self.models, self._rows, self._running = len(running), stacked.rows, running
        label = "the base model with its adapters"
        prompts = stacked_prompts(input_ids, attention_mask)
        super().__init__(stacked.together, label, *prompts, use_cache)

    def append(self, tokens: Tensor | None) -> None:
        super().append(None if tokens is None else tokens.repeat(self.models))

    def read(self, responses: Tensor) -> Iterator[Tensor]:
        return super().read(responses.repeat(self.models, 1))

    def forward_all(self) -> Tensor:
        self._rows.set(self._running, len(self.sequences))
        return super().forward_all()

    def select(self, rows: Tensor) -> None:
        size = len(self.sequences) // self.models
        first = size * torch.arange(self.models, device=rows.device)
        super().select((first[:, None] + rows).flatten())


def stacked_prompts(
    input_ids: Sequence[Tensor], attention_mask: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """The models' prompts [B, n_k] and masks as one batch [K B, n], padded on the left."""
    width = max(ids.shape[1] for ids in input_ids)
    ids = torch.cat([F.pad(x, (width - x.shape[1], 0)) for x in input_ids])
    if all(m is None for m in attention_mask) and all(x.shape[1] == width for x in input_ids):
        return ids, None
    pairs = zip(input_ids, attention_mask, strict=True)
    masks = [torch.ones_like(x) if m is None else m for x, m in pairs]
    return ids, torch.cat([F.pad(m, (width - m.shape[1], 0)) for m in masks])


def positions_of(attention_mask: Tensor) -> Tensor:
    """The position of every token in its row [B, n], padding (on the left) not counted."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)
