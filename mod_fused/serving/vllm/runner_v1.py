"""Model Runner V1 of vLLM, which CPU builds use: its sampler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from .config import settings_of
from .slots import Slots, seed_of
from .step import Batch, with_models


class ModFusedSampler(Sampler):
    """vLLM's sampler with the draw replaced: masks, biases and penalties are its own."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner.model_config.logprobs_mode)
        self._runner = runner
        self._step = runner.get_model().step
        settings = settings_of(runner.model_config)
        count = runner.scheduler_config.max_num_seqs
        self.slots = Slots(count, settings, runner.device, seed_of(runner.vllm_config))

    def forward(
        self,
        logits: Tensor,
        sampling_metadata: SamplingMetadata,
        predict_bonus_token: bool = False,
        logprobs_mode_override: Any = None,
    ) -> SamplerOutput:
        """Draw a token in every row of the batch; `logits` is the carrier of `Step.publish`."""
        input_batch = self._runner.input_batch
        if not input_batch.num_reqs:  # a warm-up without requests
            return super().forward(logits, sampling_metadata, predict_bonus_token)
        # A seed is the op's business. vLLM would wind its generators back after a part of a prompt,
        # which a generator on the CPU cannot do.
        input_batch.generators.clear()
        batch = self._batch(logits.device)
        count = sampling_metadata.max_num_logprobs
        drawn = self._step.run(
            self.slots,
            batch,
            logits,
            lambda x: self.apply_logits_processors(x, sampling_metadata, False),
            count is not None,
        )
        logprobs = None
        if drawn.log_pi is not None and count == -1:
            logprobs = LogprobsTensors(torch.empty(0), drawn.log_pi, torch.empty(0))
        elif drawn.log_pi is not None and count is not None:
            logprobs = self.gather_logprobs(drawn.log_pi, count, token_ids=drawn.tokens)
            if drawn.models is not None:
                wanted = [self.slots.arguments[slot].model_logprobs for slot in batch.slots]
                logprobs = with_models(logprobs, drawn.models, wanted, self._step.width)
        return SamplerOutput(drawn.tokens.to(torch.int32)[:, None], logprobs)

    def _batch(self, device: torch.device) -> Batch:
        """The running batch; requests that are new or back get a slot, those that left lose it."""
        names = self._runner.input_batch.req_ids
        taken = self.slots.of_request
        for gone in taken.keys() - set(names):
            self.slots.remove(gone)
        free = iter(sorted(set(range(len(self.slots.params))) - set(taken.values())))
        for name in names:
            if name not in taken:
                self.slots.add(name, next(free), self._runner.requests[name].sampling_params)
        self.slots.write()
        slots = [taken[name] for name in names]
        positions = [len(self._runner.requests[name].output_token_ids) for name in names]
        return Batch(
            slots,
            torch.tensor(slots, device=device),
            torch.tensor(positions, device=device),
            # In the middle of a prompt the position is that of the draw to come, which replaces it.
            torch.ones(len(slots), dtype=torch.bool, device=device),
        )
