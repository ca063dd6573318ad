"""Derivatives, fake tensors and compilation of the segment sum and the gather."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megagnn.ops import Segments, extension, gather, segment_sum
from tests.ops.helpers import random_segments
from tests.tolerances import assert_close

compiled = pytest.mark.skipif(extension.module is None, reason="the extension is not built")
Operation = Callable[[Tensor, Segments], Tensor]
OPERATIONS = [pytest.param(segment_sum, 30, id="segment_sum"), pytest.param(gather, 6, id="gather")]


@pytest.fixture(params=[False, True], ids=["sorted", "perm"])
def segments(request: pytest.FixtureRequest) -> Segments:
    """6 rows, 30 entries."""
    return random_segments(6, 30, perm=request.param)


@pytest.mark.parametrize(("operation", "rows"), OPERATIONS)
def test_first_and_second_derivatives(operation: Operation, rows: int, segments: Segments) -> None:
    values = torch.randn(rows, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: operation(v, segments), values)
    assert torch.autograd.gradgradcheck(lambda v: operation(v, segments).sin(), values)


@pytest.mark.parametrize(("operation", "rows"), OPERATIONS)
def test_third_derivative(operation: Operation, rows: int, segments: Segments) -> None:
    """d/dv of sum(op(v)^4), three times, against the same with plain indexing."""
    values = torch.randn(rows, 2, dtype=torch.float64, requires_grad=True)

    def plain(v: Tensor) -> Tensor:
        if operation is gather:
            return v[segments.index]
        return torch.zeros(6, 2, dtype=v.dtype).index_add(0, segments.index, v)

    results = []
    for function in (lambda v: operation(v, segments), plain):
        derivative = function(values).pow(4).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(derivative, values, create_graph=True)
            derivative = gradient.pow(2).sum()
        results.append(gradient)
    assert_close(results[0], results[1], 1e-12)


@compiled
def test_same_gradients_by_both_ways_into_autograd(segments: Segments) -> None:
    """[Note: two ways into autograd]: the registered formulas equal the Functions of eager mode."""
    arguments = (segments.index, segments.ptr, segments.perm)
    gradients = []
    for by_operation in (False, True):
        values = torch.linspace(-1, 1, 60, dtype=torch.float64).view(30, 2).requires_grad_()
        if by_operation:
            sums = torch.ops.megagnn.segment_sum(values, *arguments)
            rows = torch.ops.megagnn.gather(sums.sin(), *arguments)
        else:
            sums = segment_sum(values, segments)
            rows = gather(sums.sin(), segments)
        (first,) = torch.autograd.grad(rows.pow(3).sum(), values, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), values)
        gradients.append(second)
    assert torch.equal(gradients[0], gradients[1])


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_opcheck(segments: Segments, dtype: torch.dtype) -> None:
    """PyTorch's own checks: schema, autograd registration, fake tensors, dynamic shapes."""
    for operation, rows in ((torch.ops.megagnn.segment_sum, 30), (torch.ops.megagnn.gather, 6)):
        values = torch.randn(rows, 3, dtype=dtype, requires_grad=True)
        torch.library.opcheck(operation.default, (values, segments.index, segments.ptr, segments.perm))


@pytest.mark.parametrize("perm", [False, True], ids=["sorted", "perm"])
def test_compile_in_one_graph(perm: bool) -> None:
    """Also with another number of edges and atoms, and with the gradient inside the compiled function."""

    def message(h: Tensor, weight: Tensor, index: Tensor, ptr: Tensor, order: Tensor | None) -> Tensor:
        segments = Segments(index, ptr, order)
        return segment_sum(gather(h, segments).sin() * weight, segments)

    fast = torch.compile(message, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_rows, num_entries in ((6, 30), (9, 47)):
        s = random_segments(num_rows, num_entries, perm=perm)
        h = torch.randn(num_rows, 4, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(num_entries, 1, dtype=torch.float64)
        results = []
        for function in (message, fast):
            out = function(h, weight, s.index, s.ptr, s.perm)
            results.append((out.detach(), torch.autograd.grad(out.cos().sum(), h)[0]))
        assert torch.equal(results[0][0], results[1][0])
        assert_close(results[1][1], results[0][1])
    torch.compiler.reset()


def test_segments_pass_into_a_compiled_function() -> None:
    s = random_segments(6, 30, perm=True)
    fast = torch.compile(lambda v, s: gather(segment_sum(v, s) * 2, s), fullgraph=True, backend="aot_eager")
    values = torch.randn(30, 2)
    assert torch.equal(fast(values, s), gather(segment_sum(values, s) * 2, s))
    torch.compiler.reset()


@compiled
def test_results_are_contiguous_whatever_the_input() -> None:
    """The fake implementation promises it, and compiled code relies on it."""
    s = random_segments(6, 30, perm=False)
    assert segment_sum(torch.randn(4, 30).t(), s).is_contiguous()
    assert segment_sum(torch.randn(30, 4, 3).transpose(1, 2), s).stride() == (12, 4, 1)
    assert gather(torch.randn(4, 6).t(), s).stride() == (4, 1)
