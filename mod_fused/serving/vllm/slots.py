"""What a worker keeps of its requests from step to step: a row of each table per slot."""

from __future__ import annotations

import logging
import random
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams

from .requests import Arguments, Settings, arguments

logger = logging.getLogger(__name__)


class Group(NamedTuple):
    """Requests that one call of the op can serve."""

    divergence: str
    normalizer: str
    history: bool

    @property
    def own_mass(self) -> bool:
        """Whether Z normalises to the mixture's own mass of the response so far."""
        return self.history and self.normalizer == "exact"


class Parked(NamedTuple):
    """A request's history while it has no slot."""

    sums: Tensor
    last: Tensor
    last_position: Tensor


def seed_of(vllm_config: Any) -> str:
    """What the seeds of requests without one come from: the same on all ranks of an engine."""
    parallel = vllm_config.parallel_config
    return f"{vllm_config.model_config.seed} {parallel.data_parallel_rank}"


class Slots:
    """The requests' arguments and histories by slot.

    The tables with numbers that the op reads lie on the device and are written from the host once a
    step. A history is the log-probabilities of the response so far, under each model and under pi*.
    A draw joins it when its request draws at the next position: one that never became a token
    (a preempted request draws it again) joins none.
    """

    def __init__(self, slots: int, settings: Settings, device: torch.device, seed: str) -> None:
        self.settings = settings
        models = settings.policies + 1
        self._fresh = random.Random(seed)  # the same on all ranks
        self._host = {
            "weights": torch.full(
                (slots, settings.policies), 1.0 / settings.policies, dtype=torch.float64
            ),
            "temperature": torch.ones(slots, dtype=torch.float64),
            "top_k": torch.zeros(slots, dtype=torch.int64),
            "top_p": torch.ones(slots, dtype=torch.float64),
            "min_p": torch.zeros(slots, dtype=torch.float64),
            "seed": torch.zeros(slots, dtype=torch.int64),
        }
        self.tables = {name: x.to(device, copy=True) for name, x in self._host.items()}
        self._stale = False
        self.sums = torch.zeros(slots, models + 1, dtype=torch.float64, device=device)
        self.last = torch.zeros_like(self.sums)
        self.last_position = torch.full((slots,), -1, dtype=torch.int64, device=device)
        self._plain = Arguments((1.0 / settings.policies,) * settings.policies)
        self.arguments = [self._plain] * slots
        self.params = [SamplingParams()] * slots
        self.of_request: dict[str, int] = {}
        self._parked: dict[str, Parked] = {}

    def group(self, slot: int) -> Group:
        """The call of the op that serves a slot."""
        given = self.arguments[slot]
        return Group(given.divergence, given.normalizer, given.history)

    def processed(self, slot: int) -> bool:
        """Whether vLLM may change a request's logits before the draw."""
        p = self.params[slot]
        penalties = p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0
        lists = p.structured_outputs or p.allowed_token_ids or p.bad_words or p.logit_bias
        return bool(penalties or lists or p.min_tokens or p.thinking_token_budget is not None)

    def scaled(self, slot: int) -> bool:
        """Whether vLLM scales a request's log pi*."""
        return self.params[slot].repetition_penalty != 1.0

    def cut(self, slot: int) -> float:
        """The plausibility of a request. As in `generate` the automatic one is off beside a mask or
        a logit_bias: it might leave nothing, or nothing that the bias lifts."""
        given, params = self.arguments[slot], self.params[slot]
        lists = params.structured_outputs or params.allowed_token_ids or params.logit_bias
        forced = params.thinking_token_budget is not None
        return 0.0 if given.automatic_cut and (lists or forced) else given.cut

    def cut_among(self, slot: int) -> bool:
        """Whether a request's cut is measured from the likeliest token that is left to draw."""
        params = self.params[slot]
        return self.arguments[slot].automatic_cut and bool(params.bad_words or params.min_tokens)

    def all_are(self, name: str, value: float, slots: list[int]) -> bool:
        """Whether a table holds one value for all these requests, as the host knows."""
        return bool((self._host[name][slots] == value).all())

    def refuse(self, slot: int, reason: object) -> None:
        """Make a request's rows invalid, which ends it: what the frontend should have refused."""
        logger.error("a request cannot be served: %s", reason)
        self._host["temperature"][slot] = -1.0
        self._stale = True

    def ended(self, requests: Collection[str]) -> None:
        """Told before each step which requests have ended: they leave nothing behind."""
        for request in requests:
            self.of_request.pop(request, None)
            self._parked.pop(request, None)

    def add(self, request: str, slot: int, params: SamplingParams) -> None:
        """A request gets a slot, for the first time or once more."""
        refused = None
        try:
            given = arguments(params.extra_args or {}, self.settings)
        except ValueError as error:
            # vLLM's own warm-up has no arguments.
            refused = None if "_warmup_" in request else error
            given = self._plain
        seed = self._fresh.getrandbits(63) if params.seed is None else params.seed
        row = {
            "weights": given.weights,
            "temperature": params.temperature,
            "top_k": min(max(params.top_k, 0), self.settings.vocab_size),
            "top_p": params.top_p,
            "min_p": params.min_p,
            "seed": seed,
        }
        for name, value in row.items():
            self._host[name][slot] = torch.tensor(value, dtype=self._host[name].dtype)
        self._stale = True
        if refused is not None:
            self.refuse(slot, refused)
        self.arguments[slot], self.params[slot] = given, params
        self.of_request[request] = slot
        parked = self._parked.pop(request, None)
        self.sums[slot] = 0.0 if parked is None else parked.sums
        self.last[slot] = 0.0 if parked is None else parked.last
        self.last_position[slot] = -1 if parked is None else parked.last_position

    def remove(self, request: str) -> None:
        """A request loses its slot: it was preempted, and comes back or ends."""
        slot = self.of_request.pop(request, None)
        if slot is not None and self.arguments[slot].history:
            self._parked[request] = Parked(
                self.sums[slot].clone(), self.last[slot].clone(), self.last_position[slot].clone()
            )

    def write(self) -> None:
        """Bring the tables on the device up to date."""
        if self._stale:
            for name, table in self.tables.items():
                # A copy of its own: the host may write again before the device has read it.
                host = self._host[name]
                table.copy_(host.pin_memory() if table.is_cuda else host, non_blocking=True)
            self._stale = False

    def prefix(self, slots: Tensor, positions: Tensor) -> Tensor:
        """The histories before the tokens at `positions`, float64 [n, M+2]: models, pi*."""
        follows = (positions == self.last_position[slots] + 1)[:, None]
        self.sums[slots] += torch.where(follows, self.last[slots], 0.0)
        self.last[slots] = torch.where(follows, 0.0, self.last[slots])
        return self.sums[slots]

    def record(self, slots: Tensor, positions: Tensor, logprobs: Tensor, real: Tensor) -> None:
        """Keep what was drawn, [n, M+2], in rows that are `real`: not in the middle of a prompt."""
        self.last[slots] = torch.where(real[:, None], logprobs.double(), self.last[slots])
        self.last_position[slots] = torch.where(real, positions, self.last_position[slots])
