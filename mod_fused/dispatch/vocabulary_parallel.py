"""Calls on a vocabulary whose shards are in the processes of a group: what their ranks must agree
on, and the torch backend with sums over all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..call.arguments import DrawArguments, MixtureArguments
from ..call.bias import check_listed_bias, dense_bias
from ..call.checks import check_draw, check_mixture
from ..call.fields import number
from ..call.outputs import Sample, as_sample, check_log_probs_out, new_log_probs
from ..divergence import Divergence
from ..torch_kernels import launch
from ..torch_kernels.vocabulary import VocabularyShard
from .workspace import check_memory, check_workspace

_OF_DRAW = tuple(inspect.signature(check_draw).parameters)[1:]
#: Tensors that a rank may give in another dtype, or packed.
_OF_ANY_FORM = {"ref_logits", "mask"}


class _Call(NamedTuple):
    """A rank's arguments, checked by itself."""

    mixing: MixtureArguments  # its vocab_size is the width of this rank's logits
    vocab_size: int | None  # V, as it was given
    drawing: DrawArguments | None = None
    draws_seeds: bool = False  # seed=None
    listed_bias: tuple[Tensor, Tensor] | None = None  # with bias_ids
    out: Any = None  # tensors to fill
    lists: Mapping[str, str] = {}  # arguments that were lists of numbers, as text

    def outline(self) -> dict[str, str]:
        """By name what has to be the same on all ranks, as far as the host can see it."""
        found = {"the function": "log_probs" if self.drawing is None else "sample"}
        found["B"] = str(len(self.mixing.batch_tensor()))
        fields: dict[str, Any] = self.mixing._asdict() | {"vocab_size": self.vocab_size}
        if self.drawing is not None:
            fields |= self.drawing._asdict()
            fields["seed"] = "seed=None" if self.draws_seeds else self.drawing.seed
            fields["bias_ids"] = self.listed_bias
        of_shard = {"bias"} if self.mixing.value_ids is not None else {"bias", "values"}
        outlines = {name: _outline(x, name in of_shard) for name, x in fields.items()}
        outlines["policy_logits"] = str(len(self.mixing.policy_logits))
        for name in _OF_ANY_FORM & outlines.keys():
            outlines[name] = "None" if fields[name] is None else "a tensor"
        return found | outlines | dict(self.lists)


def _outline(x: Any, of_shard: bool = False) -> str:
    """A number by its value, a tensor by its dtype and shape, without its columns if it is as wide
    as the rank's shard."""
    if isinstance(x, Tensor):
        return f"a tensor {list(x.shape[:-1] if of_shard else x.shape)} of {x.dtype}"
    if isinstance(x, (list, tuple)):
        return f"[{', '.join(map(_outline, x))}]"
    return x.name if isinstance(x, Divergence) else str(x)


def _lists(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Arguments that are lists or arrays of numbers, as text."""
    given = {
        name: x.tolist() if isinstance(x, np.ndarray) else list(x)
        for name, x in arguments.items()
        if isinstance(x, (list, tuple, np.ndarray))
    }
    return {
        name: str(x)
        for name, x in given.items()
        if not any(isinstance(y, (Tensor, np.ndarray)) for y in x)
    }


def log_probs(*, group: Any, **arguments: Any) -> Tensor:
    """`mod_fused.log_probs` with `group`; `arguments` are all its other ones."""
    out, workspace = arguments.pop("out"), arguments.pop("workspace")

    def check() -> _Call:
        mixing, vocab_size = _check_shard(**arguments)
        if workspace is not None:
            check_workspace(mixing, False, workspace)
        result = new_log_probs(mixing) if out is None else check_log_probs_out(mixing, out)
        return _Call(mixing, vocab_size, out=result, lists=_lists(arguments))

    call, vocabulary = _agree(group, check)
    launch.log_probs_out(call.mixing, call.out, None, vocabulary)
    return call.out if out is None else out


def sample(*, group: Any, **arguments: Any) -> Sample:
    """`mod_fused.sample` with `group`; `arguments` are all its other ones."""
    out, workspace = arguments.pop("out"), arguments.pop("workspace")
    of_draw = {name: arguments.pop(name) for name in _OF_DRAW}

    def check() -> _Call:
        mixing, vocab_size = _check_shard(**arguments)
        listed = None
        if of_draw["bias_ids"] is not None:
            like = mixing.batch_tensor()
            bias, ids = of_draw.pop("bias"), of_draw.pop("bias_ids")
            listed = check_listed_bias(bias, ids, len(like), like.device)
        drawing = check_draw(mixing, **of_draw)
        result, _ = check_memory(mixing, drawing, out, workspace)
        lists = _lists({**arguments, **of_draw})
        return _Call(mixing, vocab_size, drawing, of_draw["seed"] is None, listed, result, lists)

    call, vocabulary = _agree(group, check)
    drawing = call.drawing
    assert drawing is not None
    if isinstance(drawing.seed, Tensor) and call.draws_seeds:
        drawing = drawing._replace(seed=vocabulary.gather(drawing.seed)[0])
    if call.listed_bias is not None:
        dense = dense_bias(*call.listed_bias, vocabulary.size)
        drawing = drawing._replace(bias=dense[:, vocabulary.start :])
    launch.sample_out(call.mixing, drawing, call.out, None, vocabulary)
    return as_sample(call.out, drawing) if out is None else out


def _check_shard(
    *, backend: object, vocab_size: Any, **arguments: Any
) -> tuple[MixtureArguments, int | None]:
    """The mixture's arguments of this rank, and V as it was given."""
    if backend not in (None, "torch"):
        raise ValueError(f"group runs on backend 'torch', got {backend!r}")
    if vocab_size is not None:
        vocab_size = number("vocab_size", vocab_size, int)
    mixing = check_mixture(**arguments)
    widths = [x.shape[1] for x in mixing.tensors()]
    if len(set(widths)) > 1:
        raise ValueError(
            f"with group the logits of a rank must have one width, got {widths}: the columns of "
            "all models must be the same ids"
        )
    device = mixing.batch_tensor().device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError("group cannot be captured in a CUDA graph: its ranks agree on the host")
    return mixing, vocab_size


def _agree(group: Any, check: Callable[[], _Call]) -> tuple[_Call, VocabularyShard]:
    """This rank's call, once all ranks have checked theirs and given the same, and its shard.

    Every rank takes part in one exchange whatever its arguments are, so that an error on one is an
    error on all and nobody waits.
    """
    if torch.compiler.is_compiling():
        raise ValueError("group cannot be compiled: its ranks agree on the host")
    rank, size = _place(group)
    call, error = None, None
    try:
        call = check()
    except Exception as refusal:
        error = refusal
    own = (str(error), {}, 0) if call is None else ("", call.outline(), call.mixing.vocab_size)
    told: list[Any] = [None] * size
    dist.all_gather_object(told, own, group=group)
    if call is None:
        assert error is not None
        raise error
    for other, (refused, _, _) in enumerate(told):
        if refused:
            raise ValueError(f"rank {other} of the group refused its arguments: {refused}")
    first = told[0][1]
    for other, (_, outline, _) in enumerate(told):
        for name in first:
            if outline.get(name) != first[name]:
                raise ValueError(
                    f"{name} must be the same on all ranks of the group, got {first[name]} on rank "
                    f"0, {outline.get(name)} on rank {other}"
                )
    widths = [width for _, _, width in told]
    vocab_size = sum(widths) if call.vocab_size is None else call.vocab_size
    if not 1 <= vocab_size <= sum(widths):
        raise ValueError(
            f"vocab_size must be between 1 and the {sum(widths)} columns of all ranks, "
            f"got {vocab_size}"
        )

    def gather(x: Tensor) -> Tensor:
        every = x.new_empty((size, *x.shape))
        dist.all_gather(list(every.unbind()), x.contiguous(), group=group)
        return every

    device = call.mixing.batch_tensor().device
    return call, VocabularyShard(vocab_size, widths, rank, gather, device)


def _place(group: Any) -> tuple[int, int]:
    """The rank of this process in the group, and how many ranks there are."""
    if not dist.is_available():
        raise ValueError("group needs a torch that was built with torch.distributed")
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group must be one that this process is in, got one of others")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup, got {type(group).__name__}"
        )
    if not dist.is_initialized():
        raise ValueError("group needs torch.distributed.init_process_group, which was not called")
    return group.rank(), group.size()
