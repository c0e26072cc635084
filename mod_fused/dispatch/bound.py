"""A call bound to its tensors, to be run again and again."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..call.arguments import DrawArguments, MixtureArguments
from ..call.outputs import Outputs
from . import registration
from .packing import POSITION, SEED, pack

#: Runs the call with these numbers for its seed and its position; where it has a tensor for one of
#: them, the number is not looked at.
Run = Callable[[int, int], None]


def bind(
    backend: str,
    mixing: MixtureArguments,
    drawing: DrawArguments,
    outputs: Outputs,
    workspace: Tensor | None,
) -> Run:
    """The call of `sample` on a backend that fills `outputs`, model_logprobs None unless asked
    for. It reads all its tensors anew each time."""
    if backend == "triton" and outputs[0].shape[0] > 0:
        from ..triton_kernels.launch import bound_sample

        return bound_sample(mixing, drawing, outputs, workspace)
    op = registration.sample_out[backend]
    logits, tensors, integers, numbers = pack(mixing, drawing)
    before, after = integers[:SEED], integers[POSITION + 1 :]

    def run(seed: int, position: int) -> None:
        integers = [*before, seed, position, *after]
        op(logits, tensors, integers, numbers, *outputs, workspace)

    return run
