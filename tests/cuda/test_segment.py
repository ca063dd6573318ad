"""The CUDA kernels of the segment sum and the gather, emulated, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch

from megagnn.ops import Segments, reference
from tests.cuda.emulator import ORDERS, SCALARS, Emulator, Guarded, LaunchError, at_offset
from tests.cuda.sums import row_sum_workspace
from tests.ops.helpers import long_row, random_segments
from tests.tolerances import assert_close

WIDTHS = [1, 2, 3, 7, 16, 67, 128, 256, 301]
DTYPES = pytest.mark.parametrize("dtype", list(SCALARS), ids=str)
PERM = pytest.mark.parametrize("perm", [False, True], ids=["sorted", "perm"])


def segment_sum(
    cuda: Emulator, values: torch.Tensor, segments: Segments, offset: int = 0, *, mean: bool = False
) -> torch.Tensor:
    num_rows, width = segments.num_rows, values.shape[1]
    out = Guarded((num_rows, width), values.dtype, offset)
    workspace = row_sum_workspace(values.dtype, segments.num_entries, width)
    cuda(
        "megagnn_cuda_segment_sum",
        *(SCALARS[values.dtype], values, segments.ptr, segments.perm, out.tensor),
        *(num_rows, segments.num_entries, width, int(mean), workspace.tensor),
    )
    workspace.check()
    return out.check()


def gather(cuda: Emulator, values: torch.Tensor, index: torch.Tensor, offset: int = 0) -> torch.Tensor:
    out = Guarded((len(index), values.shape[1]), values.dtype, offset)
    cuda(
        "megagnn_cuda_gather",
        *(SCALARS[values.dtype], values, index, out.tensor, len(index), values.shape[1]),
    )
    return out.check()


def exact_sum(values: torch.Tensor, segments: Segments) -> torch.Tensor:
    return reference.segment_sum(values.double(), segments.index, segments.num_rows)


@pytest.mark.parametrize("width", WIDTHS)
@PERM
@DTYPES
def test_against_float64_in_every_order(cuda: Emulator, dtype: torch.dtype, perm: bool, width: int) -> None:
    segments = random_segments(40, 300, perm=perm)
    assert (segments.ptr.diff() == 0).any(), "the example must have an empty row"
    values = torch.randn(300, width).to(dtype)
    sums = segment_sum(cuda, values, segments)
    assert_close(sums, exact_sum(values, segments))
    assert torch.equal(gather(cuda, sums, segments.index), sums[segments.index])
    for order in ORDERS:
        with cuda.order(order, seed=width):
            assert torch.equal(segment_sum(cuda, values, segments), sums)
            assert torch.equal(gather(cuda, sums, segments.index), sums[segments.index])


@pytest.mark.parametrize("width", [1, 3, 64])
@PERM
@DTYPES
def test_giant_row(cuda: Emulator, dtype: torch.dtype, perm: bool, width: int) -> None:
    segments = long_row(5003, perm=perm)
    values = torch.randn(5003, width).to(dtype)
    # Random signs: the sum is about 1 % of what is added, hence a wider tolerance than for short rows.
    wider = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2**-7}[dtype]
    sums = segment_sum(cuda, values, segments)
    assert_close(sums, exact_sum(values, segments), wider)
    for order in ORDERS:
        with cuda.order(order, seed=1):
            assert torch.equal(segment_sum(cuda, values, segments), sums)
    mean = segment_sum(cuda, values, segments, mean=True)
    assert_close(mean, reference.segment_mean(values.double(), segments.index, 3), wider)


@pytest.mark.parametrize(
    "lengths", [[1024, 1024], [1025], [2048, 1, 1025, 0, 3000], [7, 1030, 1030, 1030, 5]], ids=str
)
@DTYPES
def test_rows_about_the_length_that_is_split(cuda: Emulator, dtype: torch.dtype, lengths: list[int]) -> None:
    """[Note: giant rows]: rows that begin and end at a cut, next to one, and inside a piece."""
    counts = torch.tensor(lengths)
    index = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    segments = Segments(index, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
    values = torch.rand(len(index), 5).to(dtype)
    assert_close(segment_sum(cuda, values, segments), exact_sum(values, segments))


@PERM
@DTYPES
def test_mean(cuda: Emulator, dtype: torch.dtype, perm: bool) -> None:
    segments = random_segments(40, 300, perm=perm)
    values = torch.randn(300, 24).to(dtype)
    want = reference.segment_mean(values.double(), segments.index, 40)
    assert_close(segment_sum(cuda, values, segments, mean=True), want)


@pytest.mark.parametrize("width", [8, 64])
@pytest.mark.parametrize(("offset", "out_offset"), [(1, 0), (0, 1), (3, 3)])
@DTYPES
def test_unaligned(cuda: Emulator, dtype: torch.dtype, offset: int, out_offset: int, width: int) -> None:
    """Rows that would allow packs of 16 bytes at addresses that do not."""
    segments = random_segments(20, 100, perm=False)
    values = torch.randn(100, width).to(dtype)
    shifted = at_offset(values, offset)
    assert (shifted.data_ptr() % 16 != 0) == (offset > 0)
    aligned = segment_sum(cuda, values, segments)
    assert_close(segment_sum(cuda, shifted, segments, out_offset), aligned)
    rows = at_offset(aligned, offset)
    assert torch.equal(gather(cuda, rows, segments.index, out_offset), aligned[segments.index])


def test_rows_without_entries(cuda: Emulator) -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    segments = Segments(empty, torch.zeros(6, dtype=torch.int64), empty)
    assert torch.equal(segment_sum(cuda, torch.ones(0, 9), segments), torch.zeros(5, 9))


@pytest.mark.parametrize("width", [5, 8])
def test_few_blocks(cuda: Emulator, width: int) -> None:
    """Small enough to be run where races are looked for: see test_sanitized.py."""
    segments = random_segments(6, 30, perm=True)
    values = torch.randn(30, width)
    sums = segment_sum(cuda, values, segments)
    assert_close(sums, exact_sum(values, segments))
    assert torch.equal(gather(cuda, sums, segments.index), sums[segments.index])


def test_bfloat16_is_summed_in_float32(cuda: Emulator) -> None:
    """1 + 300 x 2^-9: every addition in bfloat16 would round back to 1."""
    values = torch.full((301, 1), 2.0**-9, dtype=torch.bfloat16)
    values[0] = 1
    segments = Segments(torch.zeros(301, dtype=torch.int64), torch.tensor([0, 301]))
    assert segment_sum(cuda, values, segments).item() == pytest.approx(1 + 300 * 2**-9, rel=2**-8)


def test_bfloat16_keeps_nan_and_infinity(cuda: Emulator) -> None:
    values = torch.tensor(
        [[1.0, float("nan"), float("inf"), -float("inf"), 3.3e38]] * 2, dtype=torch.bfloat16
    )
    segments = Segments(torch.zeros(2, dtype=torch.int64), torch.tensor([0, 2]))
    want = values.float().sum(0, keepdim=True).bfloat16()
    sums = segment_sum(cuda, values, segments)
    torch.testing.assert_close(sums, want, rtol=0, atol=0, equal_nan=True)


def test_an_empty_grid_is_refused(cuda: Emulator) -> None:
    """As by a device; the bindings return before they would ask for one."""
    segments = Segments(torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(LaunchError, match=r"error 9: row_sum_kernel.*grid must be.*got \(0, 1, 1"):
        segment_sum(cuda, torch.ones(0, 4), segments)
