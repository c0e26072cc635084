"""Layers that run several policies, and a linear layer for a few rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mod_fused.decoding import stacked_layers


def test_rows_that_do_not_come_first_are_found_when_they_run() -> None:
    factors = stacked_layers.Factors(torch.ones(2, 3, 1), torch.ones(2, 1, 3), None, None)
    rows = stacked_layers.Rows([0, 1, 2])
    layer = stacked_layers.StackedLinear(torch.nn.Linear(3, 3), factors, rows, "turned")
    rows.set([0, 1, 2], 6)
    layer(torch.ones(6, 5, 3))
    layer(torch.ones(30, 3))
    with pytest.raises(ValueError, match=r"turned gets \[5, 6, 3\], .* batch of 6 rows"):
        layer(torch.ones(5, 6, 3))
    whole = stacked_layers.PerPolicy(torch.nn.Linear(3, 3), [None, None], rows, "saved")
    for each in (layer, whole):
        with pytest.raises(ValueError, match=f"reads the weight of {each.name}"):
            _ = each.weight


class Calls(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [1, 2, 3, 64, 65])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_of_few_rows_is_the_layer(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(37, 19, bias=bias)
    few = stacked_layers.FewRows(layer)
    assert stacked_layers.FewRows.suits(layer) and few.weight is layer.weight
    with Calls() as calls:
        few(torch.randn(rows, 1, 37))
    assert ("mkldnn::_linear_pointwise" in calls.names) == (1 < rows <= 64)
    x = torch.randn(rows, 1, 37)
    exact = layer.double()(x.double()).detach()
    assert torch.equal(few(x.double()), exact)  # its weights are the layer's
    layer.float()
    with torch.no_grad():
        torch.testing.assert_close(few(x).double(), exact, atol=2e-6, rtol=0)
    assert not stacked_layers.FewRows.suits(copy.deepcopy(layer).bfloat16())
    layer.register_forward_hook(lambda *_: None)
    assert not stacked_layers.FewRows.suits(layer)
