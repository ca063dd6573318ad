"""Values of the segment sum and the gather: literal examples, then against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from megagnn.ops import Segments, extension, gather, reference, segment_sum
from tests.ops.helpers import long_row, random_segments
from tests.tolerances import assert_close

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SHAPES = [(), (1,), (2,), (3,), (7,), (16,), (67,), (128,), (256,), (301,), (2050,), (3, 5), (4, 0)]


def exact_sum(values: torch.Tensor, segments: Segments) -> torch.Tensor:
    return reference.segment_sum(values.double(), segments.index, segments.num_rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_literal_example(dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, 10], [2, 20], [3, 30], [4, 40]], dtype=dtype)
    segments = Segments(torch.tensor([0, 0, 2, 2]), torch.tensor([0, 2, 2, 4]))
    sums = segment_sum(values, segments)
    assert sums.dtype == dtype
    assert sums.tolist() == [[3, 30], [0, 0], [7, 70]]
    assert gather(sums, segments).tolist() == [[3, 30], [3, 30], [7, 70], [7, 70]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_literal_example_with_perm(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 2, 4, 8], dtype=dtype)
    # Entries 0 and 3 are of row 1, entry 1 of row 2, entry 2 of row 0.
    segments = Segments(torch.tensor([1, 2, 0, 1]), torch.tensor([0, 1, 3, 4]), torch.tensor([2, 0, 3, 1]))
    segments.validate()
    assert segment_sum(values, segments).tolist() == [4, 9, 2]
    assert gather(torch.tensor([4.0, 9, 2], dtype=dtype), segments).tolist() == [9, 2, 4, 9]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("perm", [False, True], ids=["sorted", "perm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype: torch.dtype, perm: bool, shape: tuple[int, ...], simd: str) -> None:
    segments = random_segments(40, 300, perm=perm)
    assert (segments.ptr.diff() == 0).any(), "the example must have an empty row"
    values = torch.randn(300, *shape).to(dtype)
    sums = segment_sum(values, segments)
    assert_close(sums, exact_sum(values, segments))
    assert torch.equal(gather(sums, segments), sums[segments.index])


@pytest.mark.parametrize("perm", [False, True], ids=["sorted", "perm"])
@pytest.mark.parametrize("shape", [(), (3,), (64,), (300,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_summed_in_parts(dtype: torch.dtype, shape: tuple[int, ...], perm: bool) -> None:
    segments = long_row(20_011, perm=perm)
    values = torch.randn(20_011, *shape).to(dtype)
    # Random signs: the sum is about 1 % of what is added, hence a wider tolerance than for short rows.
    wider = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2**-7}[dtype]
    assert_close(segment_sum(values, segments), exact_sum(values, segments), wider)


def test_bfloat16_is_summed_in_float32() -> None:
    """1 + 300 x 2^-9: every addition in bfloat16 would round back to 1."""
    values = torch.full((301,), 2.0**-9, dtype=torch.bfloat16)
    values[0] = 1
    segments = Segments(torch.zeros(301, dtype=torch.int64), torch.tensor([0, 301]))
    assert segment_sum(values, segments).item() == pytest.approx(1 + 300 * 2**-9, rel=2**-8)


def test_bfloat16_rounds_like_torch_and_keeps_nan_and_infinity() -> None:
    values = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 3.3e38, 3.3e38, 1.00390625])
    halves = torch.stack([values, torch.tensor([2**-8, 0, 0, 0, 0, 3.3e38, 2**-8])], dim=1).bfloat16()
    segments = Segments(torch.arange(7).repeat_interleave(2), torch.arange(0, 15, 2))
    for width in (1, 3, 64):
        sums = segment_sum(halves.flatten()[:, None].expand(14, width), segments)
        want = halves.float().sum(1).bfloat16()[:, None].expand(7, width)
        torch.testing.assert_close(sums, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("perm", [False, True], ids=["sorted", "perm"])
def test_not_contiguous(perm: bool) -> None:
    segments = random_segments(40, 300, perm=perm)
    for values in (
        torch.randn(8, 300).t(),
        torch.randn(300, 16)[:, ::2],
        torch.randn(600, 8)[::2],
        torch.randn(8).expand(300, 8),
        torch.randn(300, 4, 2).transpose(1, 2),
    ):
        assert not values.is_contiguous()
        assert_close(segment_sum(values, segments), exact_sum(values, segments))
        rows = values[:40]
        assert torch.equal(gather(rows, segments), rows[segments.index])


def test_strided_index() -> None:
    index = torch.tensor([0, 9, 0, 9, 1, 9])[::2]
    segments = Segments(index, torch.tensor([0, 9, 2, 9, 3, 9])[::2])
    values = torch.tensor([1.0, 2, 4])
    assert segment_sum(values, segments).tolist() == [3, 4]
    assert gather(torch.tensor([5.0, 6]), segments).tolist() == [5, 5, 6]


@pytest.mark.parametrize("shape", [(), (3,), (64,), (0,)], ids=str)
def test_nothing_to_sum(shape: tuple[int, ...]) -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    for num_rows in (0, 4):
        segments = Segments(empty, torch.zeros(num_rows + 1, dtype=torch.int64), empty)
        sums = segment_sum(torch.ones(0, *shape), segments)
        assert torch.equal(sums, torch.zeros(num_rows, *shape))
        assert gather(sums, segments).shape == (0, *shape)


@pytest.mark.parametrize("perm", [False, True], ids=["sorted", "perm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_at_any_number_of_threads(dtype: torch.dtype, perm: bool) -> None:
    cases = [(random_segments(3000, 40_000, perm=perm), 40_000), (long_row(30_000, perm=perm), 30_000)]
    before = torch.get_num_threads()
    try:
        for segments, num_entries in cases:
            values = torch.randn(num_entries, 33).to(dtype)
            results = []
            for threads in (1, 2, 3, 5, 1):
                torch.set_num_threads(threads)
                sums = segment_sum(values, segments)
                results.append((sums, gather(sums, segments)))
            for sums, gathered in results[1:]:
                assert torch.equal(sums, results[0][0])
                assert torch.equal(gathered, results[0][1])
    finally:
        torch.set_num_threads(before)


def test_same_bits_at_every_simd_level() -> None:
    if extension.module is None:
        pytest.skip("the extension is not built")
    segments, values = random_segments(40, 300, perm=True), torch.randn(300, 77)
    results, before = [], extension.module.simd_level()
    for level in extension.module.simd_levels():
        extension.module.set_simd_level(level)
        results.append(segment_sum(values, segments))
    extension.module.set_simd_level(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_unknown_simd_level() -> None:
    if extension.module is None:
        pytest.skip("the extension is not built")
    with pytest.raises(ValueError, match=r"must be one of simd_levels\(\), got sse9"):
        extension.module.set_simd_level("sse9")
