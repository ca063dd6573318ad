"""SiLU and its slope as the edge kernels evaluate them, at every SIMD level, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megagnn.ops import extension

pytestmark = pytest.mark.skipif(extension.module is None, reason="the extension is not built")

# Units in the last place of the value. float32: one for each of exponential, sum, quotient and product, the
# slope's sum another; its two terms cancel near x = -1.28, so that it is measured against their size. float64
# has no wider type to be compared with here: PyTorch's own is two units off.
ULPS = {torch.float32: (4.0, 6.0), torch.float64: (6.0, 8.0)}


def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and slope."""
    value, slope = torch.empty_like(x), torch.empty_like(x)
    torch.ops.megagnn.silu_pass_(x, torch.ones_like(x), value, slope, 1)
    return value, slope


@pytest.mark.parametrize("dtype", ULPS)
def test_value_and_slope(simd: str, dtype: torch.dtype) -> None:
    """Where e^-x does not overflow; 4,001 columns leave a vector that is not full."""
    x = torch.linspace(-80, 80, 3 * 40_001, dtype=torch.float64).to(dtype).view(3, -1)
    wide = x.double()
    s, rest = torch.sigmoid(wide), torch.sigmoid(-wide)
    value, slope = evaluate(x)
    value_ulps, slope_ulps = ULPS[dtype]
    unit = torch.finfo(dtype).eps
    want, tiny = wide * s, torch.finfo(dtype).tiny
    assert float(((value - want).abs() / (want.abs() + tiny)).max()) <= value_ulps * unit
    size = s + (wide * s * rest).abs()
    assert float(((slope - s * (1 + wide * rest)).abs() / (size + tiny)).max()) <= slope_ulps * unit


def test_a_worse_exponential_would_be_seen() -> None:
    """The tolerance is far below what a polynomial of degree 4 would leave, 4e-6."""
    assert max(ULPS[torch.float32]) * torch.finfo(torch.float32).eps < 1e-6


@pytest.mark.parametrize("dtype", ULPS)
def test_far_out_and_not_a_number(simd: str, dtype: torch.dtype) -> None:
    """Large |x| gives x and 1, or 0 and 0; NaN stays."""
    x = torch.tensor([[1e4, -1e4, 3e30, -3e30, float("inf"), float("nan"), 0.0]], dtype=dtype)
    value, slope = evaluate(x)
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 0}
    assert torch.allclose(value[0, [0, 2, 4]], x[0, [0, 2, 4]], **close)
    assert abs(float(value[0, 1])) < 1e-30
    assert torch.allclose(slope[0, [0, 2]], torch.ones(2, dtype=dtype), **close)
    assert value[0, 5].isnan()
    assert slope[0, 5].isnan()
    assert (value[0, 6], float(slope[0, 6])) == (0, pytest.approx(0.5, rel=1e-6))


def test_values_alone_and_repeats() -> None:
    x, bar = torch.randn(2, 37), torch.randn(2, 37)
    value, slope, none = torch.empty_like(x), torch.empty_like(x), x.new_empty(0)
    torch.ops.megagnn.silu_pass_(x, none, value, none, 3)
    assert torch.equal(value, evaluate(x)[0])
    torch.ops.megagnn.silu_pass_(x, bar, value, slope, 2)
    assert torch.equal(slope, bar * evaluate(x)[1])


def test_mistakes() -> None:
    x = torch.randn(2, 5)
    with pytest.raises(RuntimeError, match="of one type and size, got 10 and 8 elements"):
        torch.ops.megagnn.silu_pass_(x, x.new_empty(0), torch.empty(2, 4), x.new_empty(0), 1)
    with pytest.raises(RuntimeError, match="x must be a matrix of float32 or float64"):
        torch.ops.megagnn.silu_pass_(x.bfloat16(), x.new_empty(0), torch.empty(2, 5), x.new_empty(0), 1)
