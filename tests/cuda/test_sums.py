"""The CUDA kernels of the weighted sum, the maximum and the scatter, emulated, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch

from megagnn.ops import Segments, reference
from tests.cuda.emulator import ORDERS, SCALARS, Emulator, Guarded
from tests.cuda.sums import row_sum_workspace
from tests.ops.helpers import long_row, random_segments
from tests.tolerances import assert_close

WIDTHS = [1, 3, 16, 67, 128, 301]
DTYPES = pytest.mark.parametrize("dtype", list(SCALARS), ids=str)
PERM = pytest.mark.parametrize("perm", [False, True], ids=["sorted", "perm"])


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def weighted_sum(
    cuda: Emulator, values: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, rows: Segments
) -> torch.Tensor:
    width = values.shape[1]
    out = Guarded((rows.num_rows, width), values.dtype)
    workspace = row_sum_workspace(values.dtype, rows.num_entries, width)
    cuda(
        "megagnn_cuda_gather_weighted_sum",
        *(SCALARS[values.dtype], values, weight, index, rows.ptr, rows.perm, out.tensor),
        *(rows.num_rows, rows.num_entries, width, workspace.tensor),
    )
    workspace.check()
    return out.check()


def gather_dot(
    cuda: Emulator, left: torch.Tensor, right: torch.Tensor, i: torch.Tensor, j: torch.Tensor
) -> torch.Tensor:
    out = Guarded((len(i),), wide(left.dtype))
    cuda("megagnn_cuda_gather_dot", SCALARS[left.dtype], left, right, i, j, out.tensor, len(i), left.shape[1])
    return out.check()


def segment_max(cuda: Emulator, values: torch.Tensor, rows: Segments) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (rows.num_rows, values.shape[1])
    out, entry = Guarded(shape, values.dtype), torch.full(shape, -7)
    cuda(
        "megagnn_cuda_segment_max",
        *(SCALARS[values.dtype], values, rows.ptr, rows.perm, out.tensor, entry, *shape),
    )
    return out.check(), entry


def scatter_add(cuda: Emulator, values: torch.Tensor, index: torch.Tensor, num_rows: int) -> torch.Tensor:
    shape = (num_rows, values.shape[1])
    out, sums = Guarded(shape, values.dtype), Guarded(shape, torch.float32)
    cuda(
        "megagnn_cuda_scatter_add",
        *(SCALARS[values.dtype], values, index, out.tensor, num_rows, len(index), shape[1]),
        sums.tensor if values.dtype == torch.bfloat16 else None,
    )
    sums.check()
    return out.check()


@pytest.mark.parametrize("width", WIDTHS)
@PERM
@DTYPES
def test_weighted_sum_and_dot(cuda: Emulator, dtype: torch.dtype, perm: bool, width: int) -> None:
    rows, source = random_segments(40, 300, perm=perm), random_segments(25, 300, perm=True, seed=1)
    values, weight = torch.randn(25, width).to(dtype), torch.randn(300, dtype=wide(dtype))
    got = weighted_sum(cuda, values, weight, source.index, rows)
    exact = reference.gather_weighted_sum(values.double(), weight.double(), source.index, rows.index, 40)
    assert_close(got, exact)
    left = torch.randn(40, width).to(dtype)
    dots = gather_dot(cuda, left, values, rows.index, source.index)
    assert_close(dots, (left.double()[rows.index] * values.double()[source.index]).sum(1))
    for order in ORDERS:
        with cuda.order(order, seed=width):
            assert torch.equal(weighted_sum(cuda, values, weight, source.index, rows), got)
            assert torch.equal(gather_dot(cuda, left, values, rows.index, source.index), dots)


@pytest.mark.parametrize("width", [1, 64])
@PERM
@DTYPES
def test_weighted_sum_of_a_giant_row(cuda: Emulator, dtype: torch.dtype, perm: bool, width: int) -> None:
    rows, index = long_row(5003, perm=perm), torch.randint(50, (5003,))
    values, weight = torch.rand(50, width).to(dtype), torch.rand(5003, dtype=wide(dtype))
    got = weighted_sum(cuda, values, weight, index, rows)
    assert_close(got, reference.gather_weighted_sum(values.double(), weight.double(), index, rows.index, 3))


@pytest.mark.parametrize("width", WIDTHS)
@PERM
@DTYPES
def test_max(cuda: Emulator, dtype: torch.dtype, perm: bool, width: int) -> None:
    rows = random_segments(40, 300, perm=perm)
    values = torch.randn(300, width).mul(2).round().to(dtype)  # many equal maxima
    values[17] = float("nan")
    out, entry = segment_max(cuda, values, rows)
    want = reference.segment_max_entry(values, rows.index, 40, rows.perm)
    assert torch.equal(entry, want)
    taken = torch.where(entry < 0, 0, values.gather(0, entry.clamp(min=0)))
    torch.testing.assert_close(out, taken, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("width", [1, 5, 64])
@DTYPES
def test_scatter_add(cuda: Emulator, dtype: torch.dtype, width: int) -> None:
    index = random_segments(40, 300, perm=True).index
    values = torch.randn(300, width).to(dtype)
    for order in ORDERS:
        with cuda.order(order, seed=width):
            got = scatter_add(cuda, values, index, 40)
            assert_close(got, reference.segment_sum(values.double(), index, 40))
    empty = scatter_add(cuda, values[:0], index[:0], 4)
    assert torch.equal(empty, torch.zeros(4, width, dtype=dtype))
