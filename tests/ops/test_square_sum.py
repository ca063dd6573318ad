"""The sum of squares of a flat buffer: close at any size, the same bits at any thread count and level."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megagnn.ops import extension, reference, square_sum
from tests.conftest import LEVELS
from tests.tolerances import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [0, 1, 31, 33, 1024, 1057, 70_001])
def test_square_sum(size: int, dtype: torch.dtype, simd: str) -> None:
    values = torch.randn(size + 1).to(dtype)[1:]
    want = values.double().square().sum()
    relative = 1e-14 if dtype == torch.float64 else 1e-6
    for got in (square_sum(values), reference.square_sum(values)):
        assert got.dtype == torch.float64
        assert_close(got, want, relative)
    if size:
        values[size // 2] = math.nan
        assert square_sum(values).isnan()


def test_square_sum_does_not_lose_digits_in_large_buffers() -> None:
    """Sixteen million equal values: added one after another in float32, they stand still."""
    values = torch.full((16_000_000,), 0.3)
    want = 16_000_000 * float(values[0]) ** 2
    assert abs(square_sum(values).item() - want) < 1e-6 * want
    assert abs(float(np.cumsum(values.square().numpy(), dtype=np.float32)[-1]) - want) > 1e-4 * want


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_square_sum_same_bits_at_any_number_of_threads_and_level(dtype: torch.dtype) -> None:
    if extension.module is None:
        pytest.skip("the extension is not built")
    values, before, level = (
        torch.randn(300_001).to(dtype),
        torch.get_num_threads(),
        extension.module.simd_level(),
    )
    results = set()
    for name in LEVELS:
        extension.module.set_simd_level(name)
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.add(square_sum(values).item())
    torch.set_num_threads(before)
    extension.module.set_simd_level(level)
    assert len(results) == 1


def test_square_sum_errors() -> None:
    with pytest.raises(ValueError, match=r"square_sum \(.*\): values must be float32, .* got torch.int64"):
        square_sum(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"values must be contiguous, got strides \(2,\)"):
        square_sum(torch.ones(6)[::2])
