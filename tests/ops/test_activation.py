"""SiLU with closed derivatives equals PyTorch's, up to the third order."""

import pytest
import torch
from torch.nn import functional

from megagnn.ops.activation import silu as own_silu
from megagnn.ops.activation import silu_second_derivative
from tests.tolerances import assert_close


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_derivatives_equal_pytorch(dtype: torch.dtype) -> None:
    x = torch.linspace(-20, 20, 101, dtype=dtype, requires_grad=True)
    orders = []
    for silu in (own_silu, functional.silu):
        value = silu(x)
        derivatives = [value]
        for _ in range(3):
            (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
            derivatives.append(value)
        orders.append(derivatives)
    for ours, theirs in zip(*orders, strict=True):
        assert_close(ours, theirs)


def test_gradcheck() -> None:
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(own_silu, x)
    assert torch.autograd.gradgradcheck(own_silu, x)


def test_in_place_form_equals_the_recorded_one() -> None:
    x = torch.linspace(-5, 5, 50, dtype=torch.float64)
    recorded = silu_second_derivative(x)
    with torch.no_grad():
        assert_close(silu_second_derivative(x), recorded)
