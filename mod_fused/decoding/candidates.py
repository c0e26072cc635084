"""The N candidates of each prompt from which `generate` draws its responses: importance resampling
of whole responses and, with a threshold, sequential Monte Carlo.

With a threshold the candidates of a prompt are resampled while they are drawn, each time that their
effective sample size falls below its share of N. Their weights are then those of prefixes: the
intermediate target is the optimum over prefixes,

    reverse KL:    pi_ref(p)^(1 - sum w) prod_i pi_i(p)^w_i exp(sum_j v_j V_j(p))
    the others:    pi_ref(p) (f')^-1(sum_i w_i f'(pi_i(p) / pi_ref(p)) + sum_j v_j V_j(p) - Z_t)

for the prefixes p of t tokens and the responses that ended before, which stay in the population as
they are. The values V are the twist (Zhao et al., arXiv 2404.17546); Z_t is solved on the N.

A candidate of weight W (they sum to 1) leaves N W copies in the mean. So a copy counts as drawn
with N W times the probability of its prefix: with the target's, up to the normaliser so far. Then
the mean of g(y) / q(y) over the candidates is an unbiased estimate of sum_y g(y), for any function
g of whole responses and whatever the intermediate target. The last weights are pi*(y) / q(y) with
this q. They aim at the same pi* as without a threshold, and under reverse KL their mean is an
unbiased estimate of its normaliser.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..call.fields import number
from ..divergence import get_divergence, is_built_in
from .options import Limits, plain
from .resampling import Weighed, choose, spread, weigh
from .responses import FINISH_REASONS
from .totals import Totals
from .values import ValueWeighting

_EQUAL = 1.0 - 1e-6  # of N: weights that differ by rounding alone
_INVALID = FINISH_REASONS.index("invalid")


def check_candidates(
    options: dict[str, Any],
    resample_below: Any,
    value_fn: Any,
    value_weights: Any,
    **refused: Any,
) -> float:
    """The threshold, a share of N, 0 for None. Refuse what cannot go with num_candidates.

    Args:
        options: of `mod_fused.sample`, as they were given.
        resample_below: as in `mod_fused.generate`; so are value_fn and value_weights.
        **refused: arguments of `generate` that must be None.

    Raises:
        TypeError, ValueError: names the argument.
    """
    for name, value in refused.items():
        if value is not None:
            raise ValueError(f"num_candidates cannot be combined with {name}")
    if not getattr(value_fn, "of_prefixes", True):
        raise ValueError("num_candidates needs values of prefixes, got values of single tokens")
    if isinstance(value_weights, ValueWeighting):
        raise ValueError(
            "num_candidates needs value_weights that are numbers: weights chosen at each step "
            f"({type(value_weights).__name__}) say nothing about whole responses"
        )
    if not is_built_in(divergence := get_divergence(options["divergence"])):
        raise ValueError(
            f"num_candidates is possible for the built-in divergences only, got {divergence.name}"
        )
    temperature = plain(options["temperature"])
    each = temperature.flatten().tolist() if isinstance(temperature, Tensor) else temperature
    if 0 in (each if isinstance(each, list) else [each]):
        raise ValueError(
            "num_candidates needs candidates that differ: do_sample=True and a temperature above 0"
        )
    share = 0.0 if resample_below is None else number("resample_below", resample_below)
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"resample_below must be a share of N in [0, 1] or None, got {share}")
    return share


class Candidates:
    """The candidates of one batch, B N rows of which those of a prompt are adjacent. A `Resampler`.

    Args:
        options: `generate`'s, ready for all steps.
        limits: of the responses.
        has_reference: whether the models' first column is the reference's.
        threshold: the share of N below which the effective sample size must not fall; 0: never
            resample.
    """

    def __init__(
        self, options: dict[str, Any], limits: Limits, has_reference: bool, threshold: float
    ) -> None:
        seeds, first = options["seed"], options["position"]
        self._count, self._limits = limits.copies, limits
        self._least_size = threshold * limits.copies * _EQUAL
        self._seeds = seeds[:: self._count]
        self._first = first[:: self._count] if isinstance(first, Tensor) else first
        self._options = {x: options[x] for x in ("divergence", "weights", "value_weights")}
        self._has_reference = has_reference
        # log(N W) of the resamplings that each row has come through: belongs to log q
        self._carried = torch.zeros(len(seeds), dtype=torch.float64, device=seeds.device)
        self._times = torch.zeros_like(self._seeds)

    def resample(
        self, step: int, sequences: Tensor, lengths: Tensor, reasons: Tensor, totals: Totals
    ) -> Tensor | None:
        """See `Resampler`. Prompts of which all candidates have ended are left as they are."""
        if step + 1 == self._limits.max_new_tokens:
            return None
        count, invalid = self._count, reasons == _INVALID
        found = self._weighed(sequences, lengths, totals, ~invalid)
        going = (reasons == 0).view(-1, count).any(1)
        low = going & (found.effective_sample_size < self._least_size)
        if not bool(low.any()):
            return None
        self._times += low
        each = low.repeat_interleave(count)
        rows = torch.where(
            each,
            spread(found.weights, self._seeds, self._first + step),
            torch.arange(len(each), device=each.device),
        )
        carried = self._carried + (math.log(count) + found.weights.log()).flatten()
        self._carried = torch.where(each, carried, self._carried)[rows]
        return rows

    def finish(
        self, sequences: Tensor, lengths: Tensor, totals: Totals, valid: Tensor
    ) -> tuple[dict[str, Any], Tensor]:
        """The fields of `GenerateOutput` about all candidates, and the rows to return."""
        found = self._weighed(sequences, lengths, totals, valid)
        rows = choose(found.weights, self._seeds, self._first, self._limits.returned)
        return {**found._asdict(), "resamplings": self._times}, rows

    def _weighed(
        self, sequences: Tensor, lengths: Tensor, totals: Totals, valid: Tensor
    ) -> Weighed:
        # The models' last bits differ between rows, and near the pole of (f')^-1 they would show:
        # equal responses have the totals of the first of them.
        by_prompt = torch.cat([sequences, lengths[:, None]], 1).view(
            -1, self._count, 1, sequences.shape[1] + 1
        )
        equal = (by_prompt == by_prompt.transpose(1, 2)).all(-1)
        start = torch.arange(0, len(sequences), self._count, device=sequences.device)
        first = (start[:, None] + equal.byte().argmax(2)).flatten()
        values = None if totals.values is None else totals.values[first]
        proposal = totals.proposal[first] + self._carried
        totals = Totals(totals.models[first], proposal, values)
        return weigh(self._options, totals, valid, self._count, self._has_reference)
