"""vLLM's worker, with our sampler in Model Runner V1, and told which requests have ended."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


class ModFusedWorker(Worker):  # type: ignore[valid-type, misc]
    """vLLM's own worker of the platform."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the models, then give Model Runner V1 a sampler (V2 asks the model for one)."""
        super().load_model(*args, **kwargs)
        if not self.use_v2_model_runner:
            from .runner_v1 import ModFusedSampler

            self.model_runner.sampler = ModFusedSampler(self.model_runner)

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a step."""
        self.model_runner.sampler.slots.ended(scheduler_output.finished_req_ids)
        return super().execute_model(scheduler_output)
