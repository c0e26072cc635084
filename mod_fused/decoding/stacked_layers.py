"""Layers that run several policies in one call: one base layer, and an adapter for each policy.

The rows of a call are model-major: first all rows of the first model that runs, then all of the
second, and so on. `Rows` says which models these are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Rows:
    """Which models the rows of the next call belong to, in order; shared by all layers of a model.

    Args:
        models: their indices, ascending; 0 is the reference, which has no adapter.
    """

    def __init__(self, models: Sequence[int]) -> None:
        self.count: int | None = None  # rows of the next call; None: not known
        self.models: tuple[int, ...] = ()
        self.set(models)

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

    def of(self, policies: Sequence[int]) -> Factors:
        """Those of some policies, in order; views where they are neighbours."""
        first, last = policies[0], policies[-1] + 1
        at: Any = slice(first, last) if last - first == len(policies) else list(policies)
        gain, shift = (None if x is None else x[at] for x in (self.gain, self.shift))
        return Factors(self.A[at], self.B[at], gain, shift)


class StackedLayer(nn.Module):
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

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                f"the model reads the weight of {self.name}, and would leave its adapters out: "
                "Ensemble.from_pretrained loads a base model for each adapter"
            )
        return super().__getattr__(name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        rows = self.rows
        if not rows.policies:
            return y
        rows.check(x, self.name)
        if self._picked is None or self._picked[0] is not rows.models:
            self._picked = rows.models, self.factors.of(rows.policies)
        A, B, gain, shift = self._picked[1]
        k = len(rows.models)
        theirs = y.view(k, -1, y.shape[-1])[rows.first :]
        if gain is not None:
            theirs *= gain[:, None]
        if shift is not None:
            theirs += shift[:, None]
        inner = self.inner(x.to(y.device), k, A)
        if inner.dtype == y.dtype:
            theirs.baddbmm_(inner, B)
        else:  # PEFT keeps the adapters of a 16-bit model in float32
            theirs += torch.bmm(inner, B)
        return y

    def inner(self, x: Tensor, k: int, A: Tensor) -> Tensor:
        """x A of the rows that have an adapter, [m, tokens, r]."""
        raise NotImplementedError


class StackedLinear(StackedLayer):
    """Two batched matrix products for all policies."""

    def inner(self, x: Tensor, k: int, A: Tensor) -> Tensor:
        theirs = x.reshape(k, -1, x.shape[-1])[self.rows.first :]
        return torch.bmm(theirs.to(A.dtype), A)


class StackedEmbedding(StackedLayer):
    """One lookup and one batched matrix product for all policies."""

    def inner(self, x: Tensor, k: int, A: Tensor) -> Tensor:
        theirs = x.reshape(k, -1)[self.rows.first :]
        table = torch.arange(len(A), device=x.device)[:, None]
        return A[table, theirs]


class PerPolicy(nn.Module):
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

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.rows.check(x, self.name)
        if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            raise ValueError(f"the layer {self.name} takes several tensors: it cannot be stacked")
        chunks = x.chunk(len(self.rows.models))
        calls = [self.calls[model] or self.base_layer for model in self.rows.models]
        out = [call(y, *args, **kwargs) for call, y in zip(calls, chunks, strict=True)]
        return out[0] if len(out) == 1 else torch.cat(out)
