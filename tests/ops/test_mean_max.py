"""Segment mean and maximum: values, derivatives, compilation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megagnn.ops import Segments, backend, extension, reference, segment_max, segment_mean
from tests.ops.helpers import long_row, random_segments
from tests.ops.test_segment import DTYPES
from tests.tolerances import assert_close

compiled = pytest.mark.skipif(extension.module is None, reason="the extension is not built")
Operation = Callable[[Tensor, Segments], Tensor]
SHAPES = [(), (1,), (3,), (16,), (67,), (256,), (301,), (2050,), (3, 5), (4, 0)]
EXAMPLE = Segments(torch.tensor([0, 0, 2, 2, 2]), torch.tensor([0, 2, 2, 5]))


def exact_mean(values: Tensor, segments: Segments) -> Tensor:
    return reference.segment_mean(values.double(), segments.index, segments.num_rows)


def exact_max(values: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Row by row: the maximum, and the first entry that has it."""
    columns = values.double().flatten(1) if values.dim() > 1 else values.double()[:, None]
    out = torch.zeros(segments.num_rows, columns.shape[1], dtype=torch.float64)
    entry = torch.full(out.shape, -1)
    for i in range(segments.num_rows):
        entries = torch.arange(int(segments.ptr[i]), int(segments.ptr[i + 1]))
        if segments.perm is not None:
            entries = segments.perm[entries]
        if len(entries):
            for c in range(columns.shape[1]):
                rows = columns[entries, c]
                first = int((rows.isnan() if rows.isnan().any() else rows == rows.max()).nonzero()[0])
                out[i, c], entry[i, c] = rows[first], entries[first]
    shape = (segments.num_rows, *values.shape[1:])
    return out.view(shape), entry.view(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_literal_example(dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, -8], [3, -4], [9, -1], [3, -7], [9, -4]], dtype=dtype, requires_grad=True)
    mean, largest = segment_mean(values, EXAMPLE), segment_max(values, EXAMPLE)
    assert mean.dtype == largest.dtype == dtype
    assert mean.tolist() == [[2, -6], [0, 0], [7, -4]]
    assert largest.tolist() == [[3, -4], [0, 0], [9, -1]], "the empty row is 0, not the least number"
    (grad,) = torch.autograd.grad(mean, values, torch.tensor([[2.0, 4], [9, 9], [3, 6]], dtype=dtype))
    assert grad.tolist() == [[1, 2], [1, 2], [1, 2], [1, 2], [1, 2]]
    (grad,) = torch.autograd.grad(largest, values, torch.tensor([[2.0, 4], [9, 9], [3, 6]], dtype=dtype))
    assert grad.tolist() == [[0, 0], [2, 4], [3, 6], [0, 0], [0, 0]], "of two nines the first alone"


def test_first_of_equal_entries_in_the_order_of_perm() -> None:
    values = torch.tensor([5.0, 7, 7, 5], requires_grad=True)
    segments = Segments(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 4]), torch.tensor([0, 2, 1, 3]))
    segment_max(values, segments).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0, 0, 1, 0]
    entry = reference.segment_max_entry(values, segments.index, 1, segments.perm)
    assert entry.tolist() == [2]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("perm", [False, True], ids=["sorted", "perm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype: torch.dtype, perm: bool, shape: tuple[int, ...], simd: str) -> None:
    segments = random_segments(40, 300, perm=perm)
    values = torch.randn(300, *shape).to(dtype)
    values.view(-1)[::7] = 0.5  # equal ones
    assert_close(segment_mean(values, segments), exact_mean(values, segments))
    if values[0].numel() > 400:
        return  # the loop of the reference is slow
    largest, entry = exact_max(values, segments)
    assert torch.equal(segment_max(values, segments).double(), largest)
    assert torch.equal(
        reference.segment_max_entry(values, segments.index, segments.num_rows, segments.perm), entry
    )
    if extension.module:
        got = torch.ops.megagnn.segment_max(values, segments.index, segments.ptr, segments.perm)
        assert torch.equal(got[1], entry)


@pytest.mark.parametrize("perm", [False, True], ids=["sorted", "perm"])
@pytest.mark.parametrize("shape", [(), (3,), (70,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_giant_row(dtype: torch.dtype, shape: tuple[int, ...], perm: bool) -> None:
    segments = long_row(20_011, perm=perm)
    values = (torch.rand(20_011, *shape) * 100).round().to(dtype)  # many equal maxima
    assert_close(segment_mean(values, segments), exact_mean(values, segments))
    largest, entry = exact_max(values, segments)
    leaf = values.clone().requires_grad_()
    out = segment_max(leaf, segments)
    assert torch.equal(out.detach().double(), largest)
    out.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.sum() == entry.numel()
    assert leaf.grad.view(20_011, -1)[entry.view(3, -1), torch.arange(entry[0].numel())].eq(1).all()


@pytest.mark.parametrize("perm", [False, True], ids=["sorted", "perm"])
def test_nan_and_infinity(perm: bool) -> None:
    nan, inf = float("nan"), float("inf")
    values = torch.tensor([[-inf], [-inf], [1.0], [nan], [inf], [nan]]).expand(6, 70)
    order = torch.arange(6) if perm else None
    segments = Segments(torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([0, 2, 6]), order)
    out = segment_max(values, segments)
    assert out[0].eq(-inf).all()
    assert out[1].isnan().all()
    entry = reference.segment_max_entry(values, segments.index, 2, segments.perm)
    assert entry[:, 0].tolist() == [0, 3]
    if extension.module:
        assert torch.equal(
            torch.ops.megagnn.segment_max(values, segments.index, segments.ptr, order)[1], entry
        )


@pytest.mark.parametrize("perm", [False, True], ids=["sorted", "perm"])
@pytest.mark.parametrize("operation", [segment_mean, segment_max])
def test_derivatives(operation: Operation, perm: bool) -> None:
    segments = random_segments(6, 30, perm=perm)
    values = torch.randperm(90, generator=torch.Generator().manual_seed(0)).double().view(30, 3) / 10
    values.requires_grad_()
    forward = extension.module is not None or operation is segment_mean
    assert torch.autograd.gradcheck(lambda v: operation(v, segments), values, check_forward_ad=forward)
    assert torch.autograd.gradgradcheck(
        lambda v: operation(v, segments).sin(), values, check_fwd_over_rev=forward
    )


@pytest.mark.parametrize("operation", [segment_mean, segment_max])
def test_nothing_to_reduce(operation: Operation) -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    for num_rows, shape in ((0, (3,)), (4, (3,)), (4, ()), (4, (0,))):
        segments = Segments(empty, torch.zeros(num_rows + 1, dtype=torch.int64))
        values = torch.ones(0, *shape, requires_grad=True)
        out = operation(values, segments)
        assert torch.equal(out.detach(), torch.zeros(num_rows, *shape))
        out.sum().backward()
        assert values.grad is not None
        assert values.grad.shape == values.shape


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("perm", [False, True], ids=["sorted", "perm"])
def test_opcheck(perm: bool, dtype: torch.dtype) -> None:
    s = random_segments(6, 30, perm=perm)
    for operation in (torch.ops.megagnn.segment_mean, torch.ops.megagnn.segment_max):
        values = torch.randn(30, 3, dtype=dtype, requires_grad=True)
        torch.library.opcheck(operation.default, (values, s.index, s.ptr, s.perm))


@compiled
@pytest.mark.parametrize("operation", [segment_mean, segment_max])
def test_compiled_equals_eager(operation: Operation) -> None:
    segments = random_segments(6, 30, perm=True)
    fast = torch.compile(lambda v: operation(v.sin(), segments), fullgraph=True, backend="aot_eager")
    values = torch.randn(30, 3, requires_grad=True)
    results = [f(values) for f in (lambda v: operation(v.sin(), segments), fast)]
    assert torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(out.cos().sum(), values)[0] for out in results))
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_at_any_number_of_threads(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    try:
        for segments in (random_segments(3000, 40_000, perm=True), long_row(30_000, perm=False)):
            values = torch.randn(segments.num_entries, 33).to(dtype)
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                results.append((segment_mean(values, segments), segment_max(values, segments)))
            for result in results[1:]:
                assert all(map(torch.equal, result, results[0]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("operation", [segment_mean, segment_max])
def test_misuse(operation: Operation) -> None:
    name = rf"{operation.__name__} \({backend()}\): "
    with pytest.raises(
        ValueError, match=name + "values must be float32, float64 or bfloat16, got torch.int64"
    ):
        operation(torch.ones(5, dtype=torch.int64), EXAMPLE)
    with pytest.raises(
        ValueError, match=name + r"values must have one row per entry of index, 5, got shape \(4,\)"
    ):
        operation(torch.ones(4), EXAMPLE)
    if extension.module is None:
        return
    name = rf"{operation.__name__} \(cpu\): "
    with pytest.raises(
        RuntimeError, match=name + "ptr must rise from 0 to the number of entries, 5, got 0 to 4"
    ):
        operation(torch.ones(5), Segments(EXAMPLE.index, EXAMPLE.ptr.clamp(max=4)))
    with pytest.raises(RuntimeError, match=name + r"perm must lie in \[0, 5\), got an element outside"):
        operation(torch.ones(5), Segments(EXAMPLE.index, EXAMPLE.ptr, torch.tensor([0, 1, 2, 3, 5])))
