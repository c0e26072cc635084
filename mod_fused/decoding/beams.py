"""Beam search over log pi*, with the semantics of transformers' own beam search: its scores, length
penalty, early stopping and order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call.fields import number
from ..call.outputs import Sample
from ..ops import log_probs
from .masks import unpacked
from .options import Limits, count, plain
from .responses import GenerateOutput, Responses
from .stopping import Stopping
from .streaming import Stream

#: What a deterministic search has no use for, and the values that say nothing.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "do_sample": (None, False),
    "temperature": (1.0,),
    "top_k": (None, 0),
    "top_p": (None, 1.0),
    "min_p": (None, 0.0),
    "seed": (None,),
    "position": (0,),
    "streamer": (None,),
    "resample_fn": (None,),
    "num_candidates": (None,),
    "output_scores": (False,),
    "output_logits": (False,),
}
_PENALTY_RANGE = 60.0  # nats: a length to the power of the penalty stays in the range of float32


class BeamOptions(NamedTuple):
    """The options of a beam search, checked."""

    num_beams: int  # K, at least 2
    num_return_sequences: int  # of the K
    length_penalty: float
    early_stopping: bool | str  # False, True or "never"


def check_beams(
    num_beams: Any,
    num_return_sequences: Any,
    length_penalty: Any,
    early_stopping: Any,
    max_new_tokens: Any,
    others: dict[str, Any],
) -> BeamOptions | None:
    """The options of a beam search; None for one beam, which is no search.

    Args:
        num_beams: as in `mod_fused.generate`; so are the next four.
        num_return_sequences: at most num_beams.
        length_penalty: any finite number.
        early_stopping: False, True or "never".
        max_new_tokens: bounds what the penalty can do to a score.
        others: arguments of `generate` by name; those that a search has no use for are refused.

    Raises:
        TypeError, ValueError: for options that do not fit.
    """
    beams = count("num_beams", num_beams, 1)
    penalty, stopping = number("length_penalty", length_penalty), plain(early_stopping)
    if not isinstance(stopping, bool) and stopping != "never":
        raise ValueError(f"early_stopping must be False, True or 'never', got {early_stopping!r}")
    length = count("max_new_tokens", max_new_tokens, 1)
    if not abs(penalty) * math.log(max(2, length)) <= _PENALTY_RANGE:
        raise ValueError(
            "length_penalty must be finite and leave length ** length_penalty in the range of "
            f"float32, got {penalty} for up to {length} tokens"
        )
    if beams == 1:
        if penalty != 1.0 or stopping is not False:
            raise ValueError("length_penalty and early_stopping go with num_beams > 1, got 1 beam")
        return None
    returned = count("num_return_sequences", num_return_sequences, 1)
    if returned > beams:
        raise ValueError(
            f"num_return_sequences must be at most num_beams = {beams}, got {returned}"
        )
    for name, silent in _UNUSED.items():
        value = plain(others[name])
        if isinstance(value, (Tensor, list)) or value not in silent:
            raise ValueError(
                f"{name} cannot be combined with num_beams = {beams}: beam search draws nothing, "
                "and returns whole responses at its end"
            )
    return BeamOptions(beams, returned, penalty, stopping)


class Beams:
    """The search of one batch of B prompts in progress.

    A *hypothesis* is a response that may be returned: it has ended, or has the full length. Each
    prompt has K beams that go on, and the K best hypotheses so far. Ties go to the earlier beam,
    then to the lower token id.

    Args:
        options: of the search.
        responses: empty, of B K rows; the K of a prompt are adjacent.
        limits: of the responses.
        logit_scales: as in `mod_fused.sample`, for the models' log-probabilities.

    Attributes:
        responses: the beams' responses so far.
        done: whether no beam can improve on the hypotheses.
    """

    def __init__(
        self,
        options: BeamOptions,
        responses: Responses,
        limits: Limits,
        logit_scales: Sequence[float] | None,
    ) -> None:
        self.responses = responses
        self.done = False
        self._options, self._max_new_tokens = options, limits.max_new_tokens
        self._scales = logit_scales
        self._step = 0
        rows, device = len(responses.sequences), responses.sequences.device
        beams = options.num_beams
        # So many candidates that K of them go on even if all end-of-sequence ids are among them.
        self._wide = max(2, 1 + len(limits.eos_token_ids)) * beams
        self._first = torch.arange(0, rows, beams, dtype=torch.int64, device=device)[:, None]
        whole: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self._scores = torch.full((rows // beams, beams), -math.inf, **whole)
        self._scores[:, 0] = 0.0  # the beams of a prompt begin alike: one of them counts
        self._found_scores = torch.full_like(self._scores, -math.inf)
        self._improving = torch.ones_like(self._first, dtype=torch.bool)
        # In the place of a hypothesis that is not found stands an invalid response.
        self._found = responses.taken(torch.arange(rows, dtype=torch.int64, device=device))
        self._found.stopping = Stopping()
        columns = responses.model_columns
        nan = torch.full((rows, columns), math.nan, dtype=torch.float32, device=device)
        none = torch.zeros(rows, dtype=torch.int64, device=device)
        nothing = Sample(none, nan.new_full((rows,), math.nan), none.bool(), nan)
        self._found.add(nothing if columns else nothing._replace(model_logprobs=None), Stream())

    def step(
        self,
        reference: Tensor | None,
        policies: Sequence[Tensor],
        *,
        mask: Tensor | None,
        bias: Tensor | None,
        **mixing: Any,
    ) -> Tensor:
        """Extend the beams by a token.

        Args:
            reference: logits [B K, V_0], or None.
            policies: logits [B K, V_i] of each.
            mask: as in `mod_fused.sample`, [B K, ...]. What is left is not normalised anew.
            bias: as in `mod_fused.sample`, added to the beams' scores.
            **mixing: options of `mod_fused.log_probs`.

        Returns:
            int64 [B K]: for each beam the row that it goes on from.
        """
        plain_logs = log_probs(reference, policies, **mixing)
        logs = _masked(plain_logs, mask)
        if bias is not None:
            logs = logs + bias
        models = [*([] if reference is None else [reference]), *policies]
        scores, parents, tokens = self._best(logs)
        candidates = self.responses.taken(parents)
        of_models = None
        if candidates.wants_model_logprobs:
            scales = self._scales or [1.0] * len(models)
            width = logs.shape[1]
            each = [
                (x[:, :width].float() * scale).log_softmax(1)[parents, tokens]
                for x, scale in zip(models, scales, strict=True)
            ]
            of_models = torch.stack(each, dim=1)
        valid = (scores > -math.inf).flatten()
        own = torch.where(valid, plain_logs[parents, tokens], -math.inf)
        candidates.add(Sample(tokens, own, valid, of_models), Stream())
        self._step += 1
        ended = candidates.ended.view(scores.shape)
        if self._step == self._max_new_tokens:
            ended = torch.ones_like(ended)
        self._keep(candidates, scores, ended)
        return parents[self._go_on(candidates, scores, ended)]

    def output(self, prompt_mask: Tensor | None) -> GenerateOutput:
        """The best hypotheses of each prompt, the best first, given the mask [B, n] of the prompts
        (None: no padding)."""
        returned = self._options.num_return_sequences
        places = torch.arange(returned, dtype=torch.int64, device=self._first.device)
        self._found.select((self._first + places).flatten())
        mask = None if prompt_mask is None else prompt_mask.repeat_interleave(returned, dim=0)
        scores = self._found_scores[:, :returned].flatten().float()
        return self._found.output(mask, None, scores)

    def _best(self, logs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best C continuations of each prompt's beams, given log pi* [B K, V]: their scores
        float64 [B, C], the best first, the rows that they continue and their tokens int64 [B C]."""
        beams = self._options.num_beams
        each = min(self._wide, logs.shape[1])
        ids = _largest(logs, each)
        total = self._scores.flatten()[:, None] + logs.gather(1, ids)
        scores, places = total.view(-1, beams * each).sort(dim=1, descending=True, stable=True)
        scores, places = scores[:, : self._wide], places[:, : self._wide]
        tokens = ids.view(-1, beams * each).gather(1, places)
        parents = self._first + places.div(each, rounding_mode="floor")
        return scores, parents.flatten(), tokens.flatten()

    def _keep(self, candidates: Responses, scores: Tensor, ended: Tensor) -> None:
        """Keep the best hypotheses of the old ones and those that have just ended."""
        beams, stopping = self._options.num_beams, self._options.early_stopping
        full = (self._found_scores > -math.inf).all(dim=1, keepdim=True)
        new = ended & self._improving
        if stopping is True:
            new = new & ~full
        new[:, beams:] = False  # the others are there so that K can go on
        penalised = scores / float(self._step) ** self._options.length_penalty
        merged = torch.cat([self._found_scores, penalised.masked_fill(~new, -math.inf)], dim=1)
        best, places = merged.sort(dim=1, descending=True, stable=True)
        places, width = places[:, :beams], scores.shape[1]
        # Rows of the hypotheses, then of the candidates.
        fresh = self._first.numel() * beams + self._first // beams * width + places - beams
        rows = torch.where(places < beams, self._first + places, fresh).flatten()
        self._found_scores = best[:, :beams]
        self._found = self._found.joined(candidates)
        self._found.select(rows)

    def _go_on(self, candidates: Responses, scores: Tensor, ended: Tensor) -> Tensor:
        """Go on with the best candidates that have not ended; returns their rows int64 [B K]."""
        beams, penalty = self._options.num_beams, self._options.length_penalty
        running = scores.masked_fill(ended, -math.inf)
        running, places = running.sort(dim=1, descending=True, stable=True)
        self._scores = running[:, :beams]
        rows = (self._first // beams * scores.shape[1] + places[:, :beams]).flatten()
        self.responses = candidates.taken(rows)

        stopping = self._options.early_stopping
        length = self._max_new_tokens if stopping == "never" and penalty > 0.0 else self._step
        hoped = self._scores[:, :1] / float(length) ** penalty
        worst = self._found_scores.amin(dim=1, keepdim=True)
        self._improving = self._improving & (hoped > worst)
        open_ = self._improving.any()
        if stopping is True:
            open_ = open_ & (self._found_scores == -math.inf).any()
        self.done = not bool(open_ & ~ended.all())
        return rows


def _masked(logs: Tensor, mask: Tensor | None) -> Tensor:
    """log pi* [N, V] with -inf where the mask excludes a token and where a row is invalid."""
    logs = logs.nan_to_num(nan=-math.inf, neginf=-math.inf)
    if mask is None:
        return logs
    return logs.masked_fill(~unpacked(mask, logs), -math.inf)


def _largest(logs: Tensor, number: int) -> Tensor:
    """Ids int64 [N, number] of the largest entries of float32 [N, V], the largest first, the lowest
    id first among equals. `topk` alone breaks ties as it likes."""
    bits = (logs + 0.0).view(torch.int32)  # + 0.0: -0.0 is 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)  # as the floats are
    last = logs.shape[1] - 1
    ids = torch.arange(last, -1, -1, dtype=torch.int64, device=logs.device)
    return last - (((ordered << 32) | ids).topk(number).values & 0xFFFFFFFF)
