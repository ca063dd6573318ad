"""Weighted sum of gathered rows, and the dot products per entry that are its derivative by the weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megagnn.ops import Segments, backend, extension, gather_weighted_sum, reference
from tests.conftest import LEVELS
from tests.ops.helpers import long_row, random_segments
from tests.ops.test_segment import DTYPES
from tests.tolerances import assert_close

compiled = pytest.mark.skipif(extension.module is None, reason="the extension is not built")
SHAPES = [(), (1,), (3,), (16,), (67,), (128,), (256,), (301,), (2050,), (3, 5), (4, 0)]


def graph(num_rows: int, num_sources: int, num_entries: int, *, perm: bool) -> tuple[Segments, Segments]:
    """Edges by destination (with perm: in random order) and by source (always in random order)."""
    return random_segments(num_rows, num_entries, perm=perm), random_segments(
        num_sources, num_entries, perm=True, seed=1
    )


def exact(values: Tensor, weight: Tensor, destination: Segments, source: Segments) -> Tensor:
    rows = values.double()[source.index] * weight.double().view(-1, *(1,) * (values.dim() - 1))
    return reference.segment_sum(rows, destination.index, destination.num_rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_literal_example(dtype: torch.dtype) -> None:
    """Atom 0 hears 1 and 2, atom 1 hears nobody, atom 2 hears 0."""
    destination = Segments(torch.tensor([0, 0, 2]), torch.tensor([0, 2, 2, 3]))
    source = Segments(torch.tensor([1, 2, 0]), torch.tensor([0, 1, 2, 3]), torch.tensor([2, 0, 1]))
    values = torch.tensor([[1.0, 10], [2, 20], [3, 30]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([2.0, -1, 4], dtype=dtype, requires_grad=True)
    out = gather_weighted_sum(values, weight, destination, source)
    assert out.dtype == dtype
    assert out.tolist() == [[1, 10], [0, 0], [4, 40]]
    out.backward(torch.tensor([[1.0, 0], [9, 9], [0, 1]], dtype=dtype))
    assert values.grad is not None
    assert weight.grad is not None
    assert values.grad.tolist() == [[0, 4], [2, 0], [-1, 0]]
    assert weight.grad.tolist() == [2, 3, 10]
    assert weight.grad.dtype == dtype


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("perm", [False, True], ids=["sorted", "perm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype: torch.dtype, perm: bool, shape: tuple[int, ...], simd: str) -> None:
    destination, source = graph(40, 25, 300, perm=perm)
    values = torch.randn(25, *shape).to(dtype).requires_grad_()
    weight = torch.randn(300, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    weight.requires_grad_()
    out = gather_weighted_sum(values, weight, destination, source)
    grad = torch.randn(40, *shape).to(dtype)
    out.backward(grad)
    wide = [t.detach().double().requires_grad_() for t in (values, weight)]
    want = exact(*wide, destination, source)
    want.backward(grad.double())
    assert_close(out.detach(), want.detach())
    assert_close(values.grad, wide[0].grad)
    if values.numel():
        assert_close(weight.grad, wide[1].grad, 1e-5 if dtype == torch.bfloat16 else None)


@pytest.mark.parametrize("perm", [False, True], ids=["sorted", "perm"])
@pytest.mark.parametrize("width", [3, 64, 300])
def test_one_giant_row(width: int, perm: bool) -> None:
    destination, source = long_row(20_011, perm=perm), random_segments(50, 20_011, perm=True)
    values, weight = torch.randn(50, width), torch.rand(20_011)
    got = gather_weighted_sum(values, weight, destination, source)
    assert_close(got, exact(values, weight, destination, source), 1e-4)


def test_weight_as_a_column_not_contiguous_and_nothing() -> None:
    destination, source = graph(40, 25, 300, perm=False)
    values, weight = torch.randn(8, 25).t(), torch.randn(600)[::2]
    got = gather_weighted_sum(values, weight[:, None], destination, source)
    assert_close(got, exact(values, weight, destination, source))
    none = Segments(torch.zeros(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    assert torch.equal(gather_weighted_sum(torch.ones(2, 5), torch.ones(0), none, none), torch.zeros(2, 5))


@pytest.mark.parametrize("perm", [False, True], ids=["sorted", "perm"])
def test_derivatives(perm: bool) -> None:
    """First and second, in reverse and forward mode, by values and by weights."""
    destination, source = graph(6, 5, 20, perm=perm)
    values = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(20, dtype=torch.float64, requires_grad=True)

    def function(v: Tensor, w: Tensor) -> Tensor:
        return gather_weighted_sum(v, w, destination, source)

    forward = extension.module is not None
    assert torch.autograd.gradcheck(function, (values, weight), check_forward_ad=forward)
    assert torch.autograd.gradgradcheck(
        function, (values, weight), check_fwd_over_rev=forward, check_rev_over_rev=True
    )


def test_derivatives_of_third_order() -> None:
    destination, source = graph(6, 5, 20, perm=False)
    start = torch.linspace(-1, 1, 10, dtype=torch.float64).view(5, 2)
    weight = torch.linspace(0.5, 2, 20, dtype=torch.float64).requires_grad_()
    results = []
    for function in (gather_weighted_sum, exact):
        values = start.clone().requires_grad_()
        derivative = function(values, weight, destination, source).pow(4).sum()
        for _ in range(3):
            by_values, by_weight = torch.autograd.grad(derivative, (values, weight), create_graph=True)
            derivative = by_values.pow(2).sum() + by_weight.pow(2).sum()
        results.append((by_values.detach(), by_weight.detach()))
    assert_close(results[0][0], results[1][0], 1e-11)
    assert_close(results[0][1], results[1][1], 1e-11)


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    destination, source = graph(6, 5, 30, perm=True)
    rows = (destination.index, destination.ptr, destination.perm, source.index, source.ptr, source.perm)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.randn(5, 3, dtype=dtype, requires_grad=True)
    weight = torch.randn(30, dtype=wide, requires_grad=True)
    left = torch.randn(6, 3, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.megagnn.gather_weighted_sum.default, (values, weight, *rows))
    torch.library.opcheck(torch.ops.megagnn.gather_dot.default, (left, values, *rows))


@compiled
def test_compiled_equals_eager() -> None:
    destination, source = graph(6, 5, 30, perm=True)

    def function(v: Tensor, w: Tensor) -> Tensor:
        return gather_weighted_sum(v.sin(), w, destination, source)

    fast = torch.compile(function, fullgraph=True, backend="aot_eager")
    values = torch.randn(5, 3, requires_grad=True)
    weight = torch.randn(30, requires_grad=True)
    results = []
    for f in (function, fast):
        out = f(values, weight)
        results.append((out.detach(), *torch.autograd.grad(out.cos().sum(), (values, weight))))
    for got, want in zip(*results, strict=True):
        assert_close(got, want)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_at_any_number_of_threads_and_level(dtype: torch.dtype) -> None:
    destination, source = graph(3000, 2000, 40_000, perm=False)
    giant = (long_row(30_000, perm=True), random_segments(2000, 30_000, perm=True))
    before = torch.get_num_threads()
    level = extension.module.simd_level() if extension.module else None
    try:
        for rows in ((destination, source), giant):
            values = torch.randn(2000, 33).to(dtype).requires_grad_()
            weight = torch.rand(rows[0].num_entries, dtype=dtype, requires_grad=True)
            results = []
            for threads, name in ((1, LEVELS[-1]), (2, LEVELS[-1]), (5, LEVELS[0]), (1, LEVELS[-1])):
                torch.set_num_threads(threads)
                if extension.module:
                    extension.module.set_simd_level(name)
                out = gather_weighted_sum(values, weight, *rows)
                results.append((out.detach(), *torch.autograd.grad(out.sum(), (values, weight))))
            for result in results[1:]:
                assert all(map(torch.equal, result, results[0]))
    finally:
        torch.set_num_threads(before)
        if extension.module:
            extension.module.set_simd_level(level)


def test_misuse() -> None:
    destination, source = graph(6, 5, 30, perm=False)
    values, weight = torch.ones(5, 2), torch.ones(30)
    name = rf"gather_weighted_sum \({backend()}\): "
    for v, w, d, s, message in (
        (
            values.half(),
            weight,
            destination,
            source,
            "values must be float32, float64 or bfloat16, got torch.float16",
        ),
        (
            values[:4],
            weight,
            destination,
            source,
            r"values must have one row per row of source, 5, got shape \(4, 2\)",
        ),
        (
            values,
            weight[:7],
            destination,
            source,
            r"weight must have one element per entry, 30, got shape \(7,\)",
        ),
        (values, weight.double(), destination, source, "weight must be torch.float32, got torch.float64"),
        (
            values,
            weight,
            graph(6, 5, 31, perm=False)[0],
            source,
            "destination and source must have the same entries, got 31 and 30",
        ),
    ):
        with pytest.raises(ValueError, match=name + message):
            gather_weighted_sum(v, w, d, s)
    bad = Segments(source.index.clone(), source.ptr, source.perm)
    bad.index[3] = 5
    if extension.module:
        with pytest.raises(
            RuntimeError, match=r"gather_weighted_sum \(cpu\): source_index must lie in \[0, 5\)"
        ):
            gather_weighted_sum(values, weight, destination, bad)
        rows = (destination.index, destination.ptr, None, bad.index, bad.ptr, None)
        with pytest.raises(
            RuntimeError, match=r"gather_dot \(cpu\): .*right_index in \[0, 5\), got an element"
        ):
            torch.ops.megagnn.gather_dot(torch.ones(6, 2), values, *rows)
