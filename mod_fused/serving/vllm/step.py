"""One step of a batch: from the models' logits to tokens and log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors

from ...ops import log_probs, sample
from .requests import Settings
from .slots import Group, Slots


class Batch(NamedTuple):
    """The rows of a step: B requests."""

    slots: list[int]  # of each row
    on_device: Tensor  # the same, int64 [B]
    positions: Tensor  # how many tokens each response has, int64 [B]
    real: Tensor  # bool [B]: the prompt is read to its end, and the draw becomes a token


class Call(NamedTuple):
    """The rows of a batch that one call of the op serves."""

    rows: Tensor | slice
    slots: Tensor
    group: Group
    mixing: dict[str, Any]  # the distribution's arguments of `mod_fused.sample`
    drawing: dict[str, Any]  # the draw's


class Drawn(NamedTuple):
    """What a step returns; None where no row asked for it."""

    tokens: Tensor  # int64 [B]
    models: Tensor | None  # float32 [B, M+1], the tokens' log-probabilities under each model
    log_pi: Tensor | None  # float32 [B, W]


class Step:
    """The logits of the running step, and what is made of them.

    The engine gets a carrier of zeros for its logits. What it does to the carrier (grammar masks,
    -inf for banned tokens, logit_bias, penalties) is a bias, which the op adds to log pi*. A
    repetition penalty scales: it gets log pi* itself.
    """

    def __init__(self, settings: Settings) -> None:
        self.vocab_size, self.width = settings.vocab_size, settings.width
        self._end = next(iter(settings.eos_token_ids), 0)
        self.logits: list[Tensor] = []

    def publish(self, logits: list[Tensor]) -> Tensor:
        """Keep the models' logits [B, V_k] of this step; return a carrier of zeros, float32 [B,
        W] for W = `Settings.width`."""
        self.logits = logits
        return logits[0].new_zeros((len(logits[0]), self.width), dtype=torch.float32)

    def run(
        self,
        slots: Slots,
        batch: Batch,
        carrier: Tensor,
        process: Callable[[Tensor], Tensor],
        wants_log_pi: bool,
    ) -> Drawn:
        """Draw a token in every row.

        Args:
            slots: of the requests.
            batch: the rows.
            carrier: that of `publish`, on which grammar masks have left -inf.
            process: the engine's own processing of logits, in place or not.
            wants_log_pi: return log pi*.
        """
        bias = None
        if any(map(slots.processed, batch.slots)):
            bias = process(carrier.clone())
        calls = self._calls(slots, batch, bias)
        scaled = [slots.scaled(slot) for slot in batch.slots]
        log_pi = self._log_pi(calls) if wants_log_pi or any(scaled) else None
        if bias is not None and log_pi is not None and any(scaled):
            by = process(log_pi + carrier) - log_pi
            by = torch.where(log_pi == -torch.inf, 0.0, by)
            bias = torch.where(_on(by.device, scaled)[:, None], by, bias)
        models = any(slots.arguments[slot].model_logprobs for slot in batch.slots)
        drawn = self._draw(slots, batch, calls, bias, models)
        self.logits = []  # else they would take memory during the next forward passes
        return drawn._replace(log_pi=log_pi)

    def _calls(self, slots: Slots, batch: Batch, bias: Tensor | None) -> list[Call]:
        """The calls of the op that the rows need, their histories brought up to date; `bias` [B, W]
        has -inf for tokens that are excluded."""
        groups: dict[Group, list[int]] = {}
        for row, slot in enumerate(batch.slots):
            groups.setdefault(slots.group(slot), []).append(row)
        return [self._call(slots, batch, bias, group, rows) for group, rows in groups.items()]

    def _call(
        self, slots: Slots, batch: Batch, bias: Tensor | None, group: Group, rows: list[int]
    ) -> Call:
        at: Tensor | slice = slice(None)
        if len(rows) < len(batch.slots):
            at = _on(batch.on_device.device, rows)
        of = batch.on_device[at]
        table = {name: x[of] for name, x in slots.tables.items()}
        own = [batch.slots[row] for row in rows]
        # A filter that is off in all rows costs nothing if the op knows it on the host.
        for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0), ("temperature", 1.0)):
            if slots.all_are(name, off, own):
                table.pop(name)
        cuts, among = [slots.cut(x) for x in own], [slots.cut_among(x) for x in own]
        cut = _on(of.device, cuts, torch.float64) if any(cuts) else None
        if cut is not None and bias is not None and any(among):
            reference = self.logits[0][at][:, : self.vocab_size].float()
            excluded = bias[at, : self.vocab_size] == -torch.inf
            left = reference.masked_fill(excluded, -torch.inf).amax(1) - reference.amax(1)
            cut = torch.where(_on(of.device, among), left.double().exp() * cut, cut)
        mixing = {
            "ref_logits": self.logits[0][at],
            "policy_logits": [x[at] for x in self.logits[1:]],
            "weights": table.pop("weights"),
            "divergence": group.divergence,
            "normalizer": group.normalizer,
            "vocab_size": self.vocab_size,
            "plausibility": cut,
        }
        if group.history:
            prefix = slots.prefix(of, batch.positions[at])
            mixing["prefix_logprobs"] = prefix[:, :-1]
            mixing["mixture_prefix_logprobs"] = prefix[:, -1] if group.own_mass else None
        table["position"] = batch.positions[at].clamp(min=0)
        return Call(at, of, group, mixing, table)

    def _log_pi(self, calls: list[Call]) -> Tensor:
        """log pi* of all rows, float32 [B, W]; -inf beyond V and throughout an invalid row."""
        shape = (len(self.logits[0]), self.width)
        out = self.logits[0].new_full(shape, float("-inf"), dtype=torch.float32)
        for call in calls:
            out[call.rows, : self.vocab_size] = log_probs(**call.mixing)
        # JSON has no NaN.
        return out.masked_fill_(out.isnan(), float("-inf"))

    def _draw(
        self, slots: Slots, batch: Batch, calls: list[Call], bias: Tensor | None, models: bool
    ) -> Drawn:
        """Draw a token in every row, with `bias` [B, W] added to log pi*. A row for which nothing
        is left draws the end of the sequence."""
        tokens = torch.empty_like(batch.positions)
        columns = (len(batch.slots), len(self.logits))
        found = self.logits[0].new_zeros(columns, dtype=torch.float32) if models else None
        for call in calls:
            history = call.group.history
            drawing = dict(call.drawing)
            if bias is not None:
                drawing["bias"] = bias[call.rows, : self.vocab_size]
            out = sample(**call.mixing, **drawing, return_model_logprobs=models or history)
            tokens[call.rows] = torch.where(out.valid, out.tokens, self._end)
            if out.model_logprobs is None:
                continue
            if found is not None:
                found[call.rows] = out.model_logprobs
            if history:
                each = torch.cat([out.model_logprobs, out.logprobs[:, None]], 1)
                slots.record(call.slots, batch.positions[call.rows], each, batch.real[call.rows])
        return Drawn(tokens, found, None)


def with_models(
    logprobs: LogprobsTensors, models: Tensor, wanted: list[bool], vocab_size: int
) -> LogprobsTensors:
    """Put the models' log-probabilities of the token behind its own in the rows that are `wanted`:
    as ids from `vocab_size` on, the reference's first."""
    ids, values = logprobs.logprob_token_ids, logprobs.logprobs
    count = models.shape[1]
    names = torch.arange(vocab_size, vocab_size + count, dtype=ids.dtype, device=ids.device)
    kept = ids.shape[1] - count
    shifted = torch.cat([ids[:, :1], names.expand(len(ids), count), ids[:, 1:kept]], 1)
    moved = torch.cat([values[:, :1], models.nan_to_num(nan=-torch.inf), values[:, 1:kept]], 1)
    rows = _on(ids.device, wanted)[:, None]
    return logprobs._replace(
        logprob_token_ids=torch.where(rows, shifted, ids),
        logprobs=torch.where(rows, moved, values),
    )


def _on(device: torch.device, numbers: list[Any], dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host as a tensor on the device, without a synchronisation."""
    host = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
