"""Model Runner V2 of vLLM, its default on GPUs: the model's state, and the sampler it hands over.

Nothing here waits for the device.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler

from .config import settings_of
from .slots import Slots, seed_of
from .step import Batch, with_models


class ModFusedState(DefaultModelState):
    """The state of requests, which tells the sampler who has which slot."""

    def custom_sampler(self, sampler: Sampler) -> tuple[Sampler, None]:
        """vLLM's own sampler, its draw replaced."""
        own = ModFusedSampler.__new__(ModFusedSampler)
        own.__dict__.update(sampler.__dict__)
        settings = settings_of(self.model_config)
        own.prepare(
            self.model.step,
            Slots(self.max_num_reqs, settings, self.device, seed_of(self.vllm_config)),
        )
        self._slots = own.slots
        return own, None

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """A request enters slot `req_index`."""
        super().add_request(req_index, new_req_data)
        self._slots.add(new_req_data.req_id, req_index, new_req_data.sampling_params)

    def remove_request(self, req_id: str) -> None:
        """A request was preempted, or has ended: then the slots know it already."""
        super().remove_request(req_id)
        self._slots.remove(req_id)

    def apply_staged_writes(self) -> None:
        """Bring the tables on the device up to date."""
        super().apply_staged_writes()
        self._slots.write()


class ModFusedSampler(Sampler):
    """vLLM's sampler with the draw replaced: masks, biases and penalties are its own."""

    slots: Slots

    def prepare(self, step: Any, slots: Slots) -> None:
        """What the base class does not have. Its own fields are copied from a finished sampler."""
        self._step, self.slots = step, slots
        self._models: tuple[Tensor, list[bool]] | None = None
        # `sample` returns log pi* for the logits, of which no softmax is taken.
        self.logprobs_mode = "processed_logits"

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        """What the frontend could not count must not end the engine: it ends the request."""
        try:
            super().add_request(req_idx, sampling_params)
        except ValueError as error:
            super().add_request(req_idx, SamplingParams())
            self.slots.refuse(req_idx, error)

    def __call__(self, logits: Tensor, input_batch: Any) -> SamplerOutput:
        """Draw a token in every row of the batch; `logits` is the carrier of `Step.publish`."""
        self._models = None
        output = super().__call__(logits, input_batch)
        if self._models is not None and output.logprobs_tensors is not None:
            output.logprobs_tensors = with_models(
                output.logprobs_tensors, *self._models, self._step.width
            )
        return output

    def sample(
        self,
        logits: Tensor,
        expanded_idx_mapping: Tensor,
        idx_mapping: Tensor,
        idx_mapping_np: np.ndarray,
        pos: Tensor,
        input_ids: Tensor,
        expanded_local_pos: Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        return_logprobs: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B], and log pi* [B, W] where it is asked for."""
        slots = idx_mapping_np.tolist()
        on_device = expanded_idx_mapping.long()
        states = self.req_states
        length = pos.long() + 1
        batch = Batch(
            slots,
            on_device,
            length - states.prompt_len.gpu[on_device].long(),
            length >= states.prefill_len.gpu[on_device].long(),
        )
        context = LogitsContext(
            expanded_idx_mapping=expanded_idx_mapping,
            idx_mapping=idx_mapping,
            idx_mapping_np=idx_mapping_np,
            expanded_local_pos=expanded_local_pos,
            input_ids=input_ids,
            pos=pos,
            seq_lens_upper_bound_np=seq_lens_upper_bound_np,
        )
        process = partial(self._process, context=context)
        drawn = self._step.run(self.slots, batch, logits, process, return_logprobs)
        if drawn.models is not None:
            wanted = [self.slots.arguments[slot].model_logprobs for slot in slots]
            self._models = drawn.models, wanted
        return drawn.tokens, logits if drawn.log_pi is None else drawn.log_pi

    def _process(self, logits: Tensor, context: LogitsContext) -> Tensor:
        """vLLM's own biases, penalties and banned words."""
        for processor in self.logits_processors:
            logits = processor.apply(logits, context)
        self.thinking_budget_state.apply(logits, context)
        return logits
