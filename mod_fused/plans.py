"""The public function `plan`: a call of `sample` that is checked once and made often."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from numbers import Number
from typing import Any, NoReturn, ParamSpec

import torch
from torch import Tensor

from .call.bias import dense_bias
from .call.checks import check_draw, check_mixture, position_number, seed_number
from .call.outputs import Sample, as_sample
from .dispatch.backends import choose
from .dispatch.bound import bind
from .dispatch.workspace import check_memory, new_workspace
from .ops import sample

_Arguments = ParamSpec("_Arguments")
_SIGNATURE = inspect.signature(sample)
_MIXTURE, _DRAW = (
    [name for name in inspect.signature(check).parameters if name in _SIGNATURE.parameters]
    for check in (check_mixture, check_draw)
)


class Plan:
    """A call of `sample` with its tensors, as `plan` makes it.

    Calling it draws with what the tensors hold now: `plan()` is `sample` of the same arguments, to
    the bit. It checks that the tensors are where they were, and no more.

    Attributes:
        out: the `Sample` that each call fills and returns. Copy what has to outlive the next call.
        workspace: the kernels' memory; None where the backend needs none and none was given.
        backend: the name of the backend that runs the calls.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        """`given`: all arguments of `sample` by name."""
        if given["group"] is not None:
            raise ValueError("group must be None for a plan, whose calls run on one device")
        mixing = check_mixture(**{name: given[name] for name in _MIXTURE})
        draw = {name: given[name] for name in _DRAW}
        draws_seeds = draw["seed"] is None
        drawing = check_draw(mixing, **draw | ({"seed": 0} if draws_seeds else {}))
        batch = mixing.batch_tensor()
        self._refresh: list[Callable[[], object]] = []
        if draws_seeds:
            seeds = batch.new_zeros(batch.shape[:1], dtype=torch.int64)
            drawing = drawing._replace(seed=seeds)
            # What torch.randint does, without its allocation.
            self._refresh.append(lambda: seeds.random_(-(2**63), 2**63 - 1))
        if given["bias_ids"] is not None and (bias := drawing.bias) is not None:
            listed, ids = (
                given[name].detach().expand(len(batch), -1) for name in ("bias", "bias_ids")
            )
            self._refresh.append(lambda: bias.copy_(dense_bias(listed, ids, mixing.vocab_size)))
        self.backend: str = choose(given["backend"], batch.device, mixing.divergence)
        out, workspace = given["out"], given["workspace"]
        outputs, self.workspace = check_memory(mixing, drawing, out, workspace)
        filled = as_sample(outputs, drawing)
        self.out: Sample = filled if out is None else out
        if self.workspace is None and self.backend == "triton":
            self.workspace = new_workspace(mixing, drawing.needs_keys())
        self._run = bind(self.backend, mixing, drawing, filled, self.workspace)
        # 0 where the call has a tensor: the number is not looked at.
        self._numbers = tuple(
            0 if isinstance(x, Tensor) else x for x in (drawing.seed, drawing.position)
        )
        self._fixed = {
            name: "draws seeds" if given[name] is None else f"has a {type(given[name]).__name__}"
            for name in ("seed", "position")
            if isinstance(getattr(drawing, name), Tensor) or not isinstance(given[name], Number)
        }
        held = _named_tensors({**given, "out": self.out, "workspace": self.workspace})
        self._names, self._tensors = list(held), list(held.values())
        self._placed = _places(self._tensors)

    def __call__(self, *, seed: int | None = None, position: int | None = None) -> Sample:
        """Draw with what the tensors hold now.

        Args:
            seed, position: for this call alone, in place of the number that `plan` was given; None
                keeps that. Refused where the plan has a tensor or a list, or draws its seeds.

        Returns:
            `Plan.out`, filled.

        Raises:
            ValueError: a tensor that has moved or another size; a number out of range or of no use.
            TypeError: a number that is no integer; a call in code that torch.compile traces.
        """
        if torch.compiler.is_compiling():
            raise TypeError("a plan cannot be called in compiled code: call mod_fused.sample there")
        if _places(self._tensors) != self._placed:
            self._refuse_moved()
        own_seed, own_position = self._numbers
        if seed is not None:
            own_seed = seed_number(seed)
            self._refuse_fixed("seed")
        if position is not None:
            own_position = position_number(position)
            self._refuse_fixed("position")
        for refresh in self._refresh:
            refresh()
        self._run(own_seed, own_position)
        return self.out

    def _refuse_moved(self) -> NoReturn:
        count, now = len(self._tensors), _places(self._tensors)
        which = next(i for i, x in enumerate(now) if x != self._placed[i]) % count
        where = "the same" if now[which] == self._placed[which] else "another"
        raise ValueError(
            f"{self._names[which]} must keep its memory and its {self._placed[count + which]} "
            f"elements while the plan is used, got {now[count + which]} elements at {where} "
            "address: copy new contents into the tensor, or make a new plan"
        )

    def _refuse_fixed(self, name: str) -> None:
        if name in self._fixed:
            raise ValueError(
                f"{name} must be None for a plan that {self._fixed[name]}: make the plan with a "
                "number, or with a tensor and change its contents"
            )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a Plan cannot be copied or pickled: it is bound to its tensors' memory")


def _places(tensors: list[Tensor]) -> list[int]:
    """The addresses of tensors, then how many elements they have."""
    return [*map(Tensor.data_ptr, tensors), *map(Tensor.numel, tensors)]


def _named_tensors(given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among arguments, alone, in a list or in a `Sample`, by name."""
    named: dict[str, Any] = {}
    for name, x in given.items():
        if isinstance(x, Sample):
            named |= {f"{name}.{field}": y for field, y in x._asdict().items()}
        elif isinstance(x, (list, tuple)):
            named |= {f"{name}[{i}]": y for i, y in enumerate(x)}
        else:
            named[name] = x
    return {name: x for name, x in named.items() if isinstance(x, Tensor)}


def _taking_arguments_of(
    function: Callable[_Arguments, Sample],
) -> Callable[[Callable[..., Plan]], Callable[_Arguments, Plan]]:
    def declared(planning: Callable[..., Plan]) -> Callable[_Arguments, Plan]:
        signature = inspect.signature(function).replace(return_annotation="Plan")
        planning.__signature__ = signature  # type: ignore[attr-defined]
        return planning

    return declared


@_taking_arguments_of(sample)
def plan(*args: Any, **kwargs: Any) -> Plan:
    """Check a call of `sample` once, to make it often: at every step of a decoding loop.

    Takes the arguments of `sample` and refuses what `sample` refuses. The `Plan` that it returns is
    called in the place of `sample`. Tensors are read at every call: change their contents in place.
    Numbers, lists and NumPy arrays are read here, once.

        step = mod_fused.plan(ref, policies, weights, top_p=0.9, seed=7)
        for position in range(100):
            ...  # write the models' logits to `ref` and `policies`
            tokens = step(position=position).tokens

    A tensor keeps its memory, its shape and its strides for as long as the plan is used. Each call
    refuses a tensor of another size or at another address, as after `resize_`, `set_` or an
    assignment to `.data`. It does not see another shape of as many elements, nor other strides:
    what it draws then is undefined. Another tensor in the list `policy_logits` is not seen: write
    new logits into the old one.

    With seed=None each call draws new seeds, as `sample` does. With `bias_ids` each call makes the
    bias dense again, and allocates. Every other plan allocates nothing on the triton and cpu
    backends, and can be captured in a CUDA graph. The first call compiles the kernels, if no call
    of `sample` has.

    A plan is made and called on one stream, as its workspace and its `out` are. Several plans may
    share a workspace. A plan cannot be copied or pickled. In a function that torch.compile traces,
    making or calling one breaks the graph, and fullgraph=True refuses it.

    Returns:
        A `Plan`. Without `out` and `workspace` it has its own, allocated here.

    Raises:
        ValueError, TypeError: as `sample`.
    """
    if torch.compiler.is_compiling():
        raise TypeError("a plan cannot be made in compiled code: call mod_fused.sample there")
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    with torch.inference_mode(False):  # else its tensors could be written to in that mode alone
        return Plan(bound.arguments)
