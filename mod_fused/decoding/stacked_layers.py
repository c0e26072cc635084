"""Layers that run several policies in one call: one base layer, and an adapter for each policy.

The rows of a call are model-major: first all rows of the first model that runs, then all of the
second, and so on. `Rows` says which models these are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALONE = "Ensemble.from_pretrained loads a base model for each adapter"


class Rows(threading.local):
    """Which models the rows of a thread's next call belong to, in order; shared by all layers of a
    model.

    Args:
        models: their indices, ascending; 0 is the reference, which has no adapter.
    """

    def __init__(self, models: Sequence[int]) -> None:
        self.count: int | None = None  # rows of the next call; None: not known
        self.models: tuple[int, ...] = ()
        self.set(models)

    def __reduce__(self) -> Any:  # threading.local itself cannot be copied
        return Rows, (self.models,)

    def set(self, models: Sequence[int], count: int | None = None) -> None:
        """The next call has `count` rows, of these models."""
        self.count = count
        if tuple(models) != self.models:
            self.models = tuple(models)
            # How many chunks stand in front of those with adapters.
            self.first = int(self.models[0] == 0)
            self.policies = [model - 1 for model in self.models[self.first :]]

    def check(self, x: Tensor, layer: str) -> None:
        """Refuse a tensor whose first dimension does not hold the rows, one model's after the
        other's."""
        rows = len(self.models) if self.count is None else self.count
        if x.shape[0] % rows:
            raise ValueError(
                f"the layer {layer} gets {list(x.shape)}, which does not begin with the batch of "
                f"{rows} rows: its adapters cannot be stacked. Pass forward='separate'"
            )


class FewRows(nn.Module):
    """A linear layer for a few rows on a CPU, where the BLAS library reads float32 weights once for
    each of two or three rows, and packs them anew for more: oneDNN reads them once."""

    MOST = 64

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    @staticmethod
    def suits(layer: nn.Module) -> bool:
        """Whether a layer is of the kind."""
        if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter:
            return False  # quantised ones among others
        changed = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
        if changed or not torch.backends.mkldnn.is_available():
            return False
        return layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        plain = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if plain and torch.backends.mkldnn.enabled and 1 < rows <= self.MOST:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


class Factors(NamedTuple):
    """The adapters of one layer, by policy: y becomes gain y + shift + x A B.

    Attributes:
        A: [M, in, r]; of an embedding [M, V, r]. Smaller ranks are padded with zeros.
        B: [M, r, out], with the scaling in it.
        gain: [M, out], DoRA's magnitude over the norm of the changed weight; None where all are 1.
        shift: [M, out]; None where all are 0.
    """

    A: Tensor
    B: Tensor
    gain: Tensor | None
    shift: Tensor | None

    def of(self, policies: Sequence[int], device: torch.device) -> Factors:
        """Those of some policies, in order, on a device; views where they are neighbours there."""
        first, last = policies[0], policies[-1] + 1
        at: Any = slice(first, last) if last - first == len(policies) else list(policies)
        gain, shift = (None if x is None else x[at].to(device) for x in (self.gain, self.shift))
        return Factors(self.A[at].to(device), self.B[at].to(device), gain, shift)


class Shared(nn.Module):
    """In place of a layer that has several policies' weights, which are none of its own."""

    name: str

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise ValueError(
                f"the model itself reads the weight of {self.name}, and leaves its adapters out: "
                f"{ALONE}"
            )
        return super().__getattr__(name)


class StackedLayer(Shared):
    """A base layer and the adapters of several policies.

    Args:
        base_layer: run once for all rows.
        factors: of all M policies.
        rows: of the model's calls.
        name: of the layer, for error messages.
    """

    def __init__(self, base_layer: nn.Module, factors: Factors, rows: Rows, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.factors, self.rows, self.name = factors, rows, name
        self._picked: tuple[tuple[int, ...], Factors] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        rows = self.rows
        if not rows.policies:
            return y
        rows.check(x, self.name)
        if not isinstance(y, Tensor):
            raise ValueError(f"{self.name} computes more than a linear layer: {ALONE}")
        y = y.contiguous()
        picked = self._picked
        if picked is None or picked[0] is not rows.models or picked[1].A.device != y.device:
            picked = self._picked = rows.models, self.factors.of(rows.policies, y.device)
        A, B, gain, shift = picked[1]
        k = len(rows.models)
        theirs = y.view(k, -1, y.shape[-1])
        inner = self.inner(x, k)
        if rows.first:
            theirs, inner = theirs[1:], inner[1:]
        if gain is not None:
            theirs *= gain[:, None]
        if shift is not None:
            theirs += shift[:, None]
        inner = self.through(inner.to(A.device), A)
        if B.dtype == y.dtype and not torch.is_autocast_enabled(y.device.type):
            theirs.baddbmm_(inner, B)
        else:
            theirs += torch.bmm(inner, B)
        return y

    def inner(self, x: Tensor, k: int) -> Tensor:
        """The input by model, [k, tokens, in], or [k, tokens] of ids."""
        raise NotImplementedError

    def through(self, x: Tensor, A: Tensor) -> Tensor:
        """x A, [m, tokens, r], of the m models with an adapter."""
        raise NotImplementedError


class StackedLinear(StackedLayer):
    """Two batched matrix products for all policies."""

    def inner(self, x: Tensor, k: int) -> Tensor:
        return x.reshape(k, -1, x.shape[-1])

    def through(self, x: Tensor, A: Tensor) -> Tensor:
        return torch.bmm(x.to(A.dtype), A)


class StackedEmbedding(StackedLayer):
    """One lookup and one batched matrix product for all policies."""

    def inner(self, x: Tensor, k: int) -> Tensor:
        return x.reshape(k, -1)

    def through(self, x: Tensor, A: Tensor) -> Tensor:
        return A[torch.arange(len(A), device=x.device)[:, None], x]


class PerPolicy(Shared):
    """A layer that each policy has as a whole: each runs on the rows of its own.

    Args:
        base_layer: the reference's, and of policies without one of their own.
        calls: by policy: what to call; None: the base layer.
        rows: of the model's calls.
        name: of the layer, for error messages.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        calls: Sequence[Callable[..., Tensor] | None],
        rows: Rows,
        name: str,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.calls, self.rows, self.name = (None, *calls), rows, name

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.rows.check(x, self.name)
        if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            raise ValueError(f"the layer {self.name} takes several tensors: it cannot be stacked")
        chunks = x.chunk(len(self.rows.models))
        calls = [self.calls[model] or self.base_layer for model in self.rows.models]
        out = [call(y, *args, **kwargs) for call, y in zip(calls, chunks, strict=True)]
        if len(out) == 1:
            return out[0]
        if isinstance(out[0], tuple):  # routers of experts
            return tuple(map(torch.cat, zip(*out, strict=True)))
        return torch.cat(out)
