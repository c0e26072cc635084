"""The record of a batch's responses, filled step by step, and `GenerateOutput`, its result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..call.outputs import Sample
from .options import History, Limits
from .scores import Scores
from .stopping import Stopping
from .streaming import Stream
from .text import Decoder, StopStrings
from .totals import Resampler, Totals
from .values import values_of

# Why a row ended, by code. A row that is still running after max_new_tokens ended by length.
FINISH_REASONS = ("length", "eos", "stop", "invalid", "stopping_criteria", "max_time")
_RUNNING, _EOS, _STOP, _INVALID, _CRITERIA, _TIME = range(6)

#: The attributes of `Responses` that are tensors with one entry per row.
_BY_ROW = (
    "tokens", "history", "own_history", "_log_totals", "_last_values", "_sequences", "_lengths",
    "_logprobs", "_model_logprobs", "_reason", "_padding",
)  # fmt: skip


@dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns. T is the length of the longest response. With num_return_sequences B
    counts responses; those of one prompt are adjacent.

    Attributes:
        sequences: int64 [B, n + T], the prompts of the first model, left-padded, then the
            responses.
        tokens: int64 [B, T], the responses alone, with pad_token_id behind their ends.
        lengths: int64 [B], tokens in each response, its end-of-sequence token included.
        finish_reasons: B strings: "eos", "stop" (a stop string), "length", "stopping_criteria",
            "max_time", or "invalid" (see valid).
        texts: B decoded responses without special tokens, a stop string included; None without a
            tokenizer. A response is decoded as the continuation of a text: the space in front of
            its first word is kept, so that prompt + text is one text.
        logprobs: float32 [B, T], log pi*(token), before bias, temperature and filters. 0 behind the
            end of a response, so that a sum over T is the log-probability of the response.
        model_logprobs: float32 [B, T, M+1], log-probability of the token under each model (its
            logits times its scale), reference first; M columns without a reference. 0 behind the
            end. None unless asked for.
        valid: bool [B]. False: at some step the op had nothing to draw from (NaN logits, everything
            masked); the response ends before that step, whose log-probabilities are NaN. After a
            beam search: fewer responses were found than asked for; the row holds none.
        seeds: int64 [B], the seed of each row: with it and the position another call can continue
            the responses. None after a beam search.
        attention_mask: int64 [B, n + T], of sequences: 0 for padding on both sides.
        sequences_scores: float32 [B], after a beam search the sum of log pi* and the biases of the
            response over length ** length_penalty, -inf where not valid; else None.
        weights: float64 [prompts, N], of all N candidates of each prompt, in the order of their
            seeds; they sum to 1. NaN where no candidate is valid. This and the next three are None
            without num_candidates.
        effective_sample_size: float64 [prompts], 1 / sum of the squared weights, from 1 to N: how
            many draws from the target the candidates are worth. After resamplings it is that of
            the weights since the last one, and some candidates have tokens in common.
        log_normalizer: float64 [prompts]. Under reverse KL the log of the mean weight before
            normalisation, an unbiased estimate of sum_y pi_ref(y)^(1 - sum w) prod_i pi_i(y)^w_i
            exp(sum_j v_j V_j(y)) over the responses that can be drawn. For the other divergences
            the Z of pi*(y) = pi_ref(y) (f')^-1(u(y) - Z), solved on the candidates; infinite where
            f' is beyond float64.
        resamplings: int64 [prompts], how often resample_below has resampled the candidates.
        scores: T tensors float32 [B, V], log of the probabilities with which each token was drawn,
            after mask, bias, temperature and filters. None unless asked for. Rows that have ended
            have some, too.
        logits: T tensors float32 [B, V], log pi*, likewise.
    """

    sequences: Tensor
    tokens: Tensor
    lengths: Tensor
    finish_reasons: list[str]
    texts: list[str] | None
    logprobs: Tensor
    model_logprobs: Tensor | None
    valid: Tensor
    seeds: Tensor | None
    attention_mask: Tensor
    sequences_scores: Tensor | None = None
    weights: Tensor | None = None
    effective_sample_size: Tensor | None = None
    log_normalizer: Tensor | None = None
    resamplings: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None


class Responses:
    """The responses of one batch in progress.

    Args:
        prompts: int64 [B, n], of the first model.
        limits: room for the responses, and what ends them.
        tokenizer: decodes them; None: no texts.
        columns: how many model log-probabilities to record; 0: none.
        history: log-probabilities of the responses before this call.
        models: how many models' log-probabilities of whole responses to sum; 0: no totals.
        mask: int64 [B, n], 0 for the prompts' padding on the left; None: there is none.
        stopping: what else ends responses.
        scores: kept beside the responses, for the criteria and the output.

    Attributes:
        history, own_history: float64 [B, columns] and [B], log-probability of the response so far
            under each model and log pi* of it; None: not recorded.
        tokens: int64 [B], the tokens drawn last; None at first.
        done: whether all responses have ended.
    """

    def __init__(
        self,
        prompts: Tensor,
        limits: Limits,
        *,
        tokenizer: Any,
        columns: int,
        history: History,
        models: int = 0,
        mask: Tensor | None = None,
        stopping: Stopping | None = None,
        scores: Scores | None = None,
    ) -> None:
        self.stopping = Stopping() if stopping is None else stopping
        self.scores = Scores(False, False) if scores is None else scores
        room = len(prompts), limits.max_new_tokens
        batch, device = len(prompts), prompts.device
        floats: dict[str, Any] = {"dtype": torch.float32, "device": device}
        whole: dict[str, Any] = {"dtype": torch.int64, "device": device}
        self.history, self.own_history = history
        shape = (batch, models + 1)
        doubles: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self._log_totals = torch.zeros(shape, **doubles) if models else None
        self._last_values: Tensor | None = None
        self._padding = None if mask is None else (mask == 0).sum(1)
        self.tokens: Tensor | None = None
        self.done = False
        self._step, self._width, self._pad = 0, prompts.shape[1], limits.pad_token_id
        self._tokenizer = tokenizer
        self._eos = torch.tensor(limits.eos_token_ids, **whole)
        behind = torch.full(room, limits.pad_token_id, **whole)
        self._sequences = torch.cat([prompts, behind], dim=1)
        self._logprobs = torch.zeros(room, **floats)
        self._model_logprobs = torch.zeros(*room, columns, **floats) if columns else None
        self._lengths = torch.zeros(batch, **whole)
        self._reason = torch.full((batch,), _RUNNING, **whole)
        self._stops: list[StopStrings] = []
        if limits.stop_strings:
            decoder = Decoder(tokenizer, skip_special_tokens=False)
            self._stops = [StopStrings(limits.stop_strings, decoder) for _ in range(batch)]

    @property
    def wants_model_logprobs(self) -> bool:
        """Whether `add` needs the models' log-probabilities, to record them or for the history."""
        kept = self._model_logprobs, self.history, self._log_totals
        return any(x is not None for x in kept)

    @property
    def totals(self) -> Totals | None:
        """What a `Resampler` reads; None: not recorded."""
        logs = self._log_totals
        return None if logs is None else Totals(logs[:, :-1], logs[:, -1], self._last_values)

    @property
    def valid(self) -> Tensor:
        """Whether each response had something to draw from at every step, bool [B]."""
        return self._reason != _INVALID

    @property
    def model_columns(self) -> int:
        """How many models' log-probabilities `add` needs; 0: none."""
        by_model = self._model_logprobs if self.history is None else self.history
        return 0 if by_model is None else by_model.shape[-1]

    @property
    def lengths(self) -> Tensor:
        """How many tokens each response has so far, int64 [B]."""
        return self._lengths

    @property
    def ended(self) -> Tensor:
        """Which responses have ended, bool [B]."""
        return self._reason != _RUNNING

    @property
    def sequences(self) -> Tensor:
        """The prompts and the responses so far, int64 [B, n + steps]."""
        return self._sequences[:, : self._width + self._step]

    @property
    def read(self) -> Tensor:
        """The sequences with -1 for the prompts' padding."""
        if self._padding is None:
            return self.sequences
        places = torch.arange(self.sequences.shape[1], device=self._padding.device)
        return self.sequences.masked_fill(places < self._padding[:, None], -1)

    def add(self, drawn: Sample, stream: Stream, given: dict[str, Any] | None = None) -> None:
        """Record a step, show it to the stream, and note which responses it ends. `given` may hold
        the step's values and value_ids, as `mod_fused.sample` takes them."""
        active = self._reason == _RUNNING
        kept = active & drawn.valid
        tokens = torch.where(kept, drawn.tokens, self._pad)
        self.tokens = tokens
        self._sequences[:, self._width + self._step] = tokens
        self._lengths += kept
        logprobs = torch.where(active, drawn.logprobs, 0.0)
        self._logprobs[:, self._step] = logprobs
        if self.own_history is not None:
            self.own_history = self.own_history + logprobs
        if drawn.model_logprobs is not None:
            of_models = torch.where(active[:, None], drawn.model_logprobs, 0.0)
            if self._model_logprobs is not None:
                self._model_logprobs[:, self._step] = of_models
            if self.history is not None:
                self.history = self.history + of_models
        if self._log_totals is not None:
            self._add_up(drawn, kept, values_of(drawn.tokens, given or {}))
        self._reason = torch.where(active & ~drawn.valid, _INVALID, self._reason)
        self._reason = torch.where(kept & torch.isin(tokens, self._eos), _EOS, self._reason)
        if self._stops or stream.active:
            self._watch(kept, stream)
        else:
            self.done = bool((self._reason != _RUNNING).all())
        self._step += 1
        if self.stopping.active:
            scores = self.scores.scores
            met = self.stopping.met(self.sequences, None if scores is None else tuple(scores))
            running = self._reason == _RUNNING
            self._reason = torch.where(running & met, _CRITERIA, self._reason)
            if self.stopping.out_of_time():
                self._reason = torch.where(running & ~met, _TIME, self._reason)
            self.done = bool((self._reason != _RUNNING).all())

    def _add_up(self, drawn: Sample, kept: Tensor, values: Tensor | None) -> None:
        """Add a step to the totals of the rows that are kept."""
        assert self._log_totals is not None
        assert drawn.model_logprobs is not None and drawn.proposal_logprobs is not None
        each = torch.cat([drawn.model_logprobs, drawn.proposal_logprobs[:, None]], 1)
        self._log_totals = self._log_totals + torch.where(kept[:, None], each, 0.0)
        if values is not None:
            before = torch.zeros_like(values) if self._last_values is None else self._last_values
            self._last_values = torch.where(kept[:, None], values, before)

    def _watch(self, kept: Tensor, stream: Stream) -> None:
        """Streaming, stop strings and the check for the end, with one transfer to the host."""
        assert self.tokens is not None
        tokens, drawn, reason = torch.stack([self.tokens, kept.long(), self._reason]).cpu()
        stream.put(self._step, tokens, drawn.bool())
        if self._stops:
            going = (drawn.bool() & (reason == _RUNNING)).nonzero()[:, 0].tolist()
            stopped = [row for row in going if self._stops[row].add(int(tokens[row]))]
            reason[stopped] = _STOP
            self._reason = reason.to(self._reason.device)
        self.done = bool((reason != _RUNNING).all())

    def resample(self, choose: Callable[..., Tensor | None] | Resampler) -> Tensor | None:
        """The rows that `resample_fn` chooses to go on with."""
        so_far = self._step - 1, self.sequences, self._lengths, self._reason
        if isinstance(choose, Resampler):
            assert self.totals is not None
            return choose.resample(*so_far, self.totals)
        return choose(*so_far)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, int64 [B]; each may occur any number of times."""
        for name in _BY_ROW:
            if (values := getattr(self, name)) is not None:
                setattr(self, name, values[rows])
        if self._stops:
            self._stops = [self._stops[row].copy() for row in rows.tolist()]
        self.done = bool((self._reason != _RUNNING).all())

    def taken(self, rows: Tensor) -> Responses:
        """These rows, int64 [N], as `select` would leave them, in an object of their own."""
        other = copy.copy(self)
        other.select(rows)
        return other

    def joined(self, others: Responses) -> Responses:
        """These responses, then others to the same batch, in an object of their own."""
        both = copy.copy(self)
        for name in _BY_ROW:
            if (values := getattr(self, name)) is not None:
                setattr(both, name, torch.cat([values, getattr(others, name)]))
        both._stops = [*self._stops, *others._stops]
        return both

    def output(
        self,
        prompt_mask: Tensor | None,
        seeds: Tensor | None,
        sequences_scores: Tensor | None = None,
    ) -> GenerateOutput:
        """The result, given the batch's prompt_mask [B, n] (None: no padding), seeds int64 [B], and
        the sequences_scores float32 [B] of a beam search."""
        # Rows that resample_fn dropped may have been longer. An invalid step counts.
        steps = int((self._lengths + (self._reason == _INVALID)).max())
        tokens, logs = self._sequences[:, self._width :][:, :steps], self._model_logprobs
        prompts = self._sequences[:, : self._width]
        mask = torch.ones_like(prompts) if prompt_mask is None else prompt_mask
        places = torch.arange(steps, dtype=torch.int64, device=tokens.device)
        written = (places < self._lengths[:, None]).to(torch.int64)
        return GenerateOutput(
            sequences=self._sequences[:, : self._width + steps],
            tokens=tokens,
            lengths=self._lengths,
            finish_reasons=[FINISH_REASONS[code] for code in self._reason.tolist()],
            texts=self._texts(tokens),
            logprobs=self._logprobs[:, :steps],
            model_logprobs=logs if logs is None else logs[:, :steps],
            valid=self.valid,
            seeds=seeds,
            attention_mask=torch.cat([mask, written], dim=1),
            sequences_scores=sequences_scores,
            scores=_first(self.scores.scores, steps),
            logits=_first(self.scores.logits, steps),
        )

    def _texts(self, tokens: Tensor) -> list[str] | None:
        if self._tokenizer is None:
            return None
        decoder = Decoder(self._tokenizer)
        rows = zip(tokens.tolist(), self._lengths.tolist(), strict=True)
        return [decoder(row[:length]) for row, length in rows]


def _first(tensors: list[Tensor] | None, steps: int) -> tuple[Tensor, ...] | None:
    return None if tensors is None else tuple(tensors[:steps])
