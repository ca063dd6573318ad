"""Scatter by unsorted indices, and the gather that is its backward."""

from __future__ import annotations

import pytest
import torch

from megagnn.ops import backend, extension, gather_rows, reference, scatter_add
from tests.ops.helpers import random_segments
from tests.ops.test_segment import DTYPES
from tests.tolerances import assert_close

compiled = pytest.mark.skipif(extension.module is None, reason="the extension is not built")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_literal_example(dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, 10], [2, 20], [4, 40], [8, 80]], dtype=dtype, requires_grad=True)
    index = torch.tensor([3, 0, 3, 1])
    out = scatter_add(values, index, 5)
    assert out.dtype == dtype
    assert out.tolist() == [[2, 20], [8, 80], [0, 0], [5, 50], [0, 0]]
    assert gather_rows(out, index).tolist() == [[5, 50], [2, 20], [5, 50], [8, 80]]
    out.backward(torch.arange(10, dtype=dtype).view(5, 2))
    assert values.grad is not None
    assert values.grad.tolist() == [[6, 7], [0, 1], [6, 7], [2, 3]]


@pytest.mark.parametrize("shape", [(), (1,), (3,), (64,), (67,), (300,), (2050,), (3, 5), (4, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype: torch.dtype, shape: tuple[int, ...], simd: str) -> None:
    index = random_segments(40, 300, perm=True).index
    values = torch.randn(300, *shape).to(dtype)
    out = scatter_add(values, index, 40)
    assert_close(out, reference.segment_sum(values.double(), index, 40))
    assert torch.equal(gather_rows(out, index), out[index])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("giant", [False, True], ids=["even", "giant row"])
def test_large_and_the_same_bits_at_any_number_of_threads(dtype: torch.dtype, giant: bool) -> None:
    """Sorted by several threads, and equal to the sum of each row in the order of its entries."""
    index = torch.randint(0, 500, (70_000,), generator=torch.Generator().manual_seed(0))
    if giant:
        index[torch.rand(70_000) < 0.9] = 7
    values, before = torch.rand(70_000, 5).to(dtype), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5, 1):
            torch.set_num_threads(threads)
            out = scatter_add(values, index, 500)
            results.append((out, gather_rows(out, index)))
    finally:
        torch.set_num_threads(before)
    assert_close(results[0][0], reference.segment_sum(values.double(), index, 500))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


def test_not_contiguous_and_nothing() -> None:
    index = torch.tensor([2, 9, 0, 9, 2, 9])[::2]
    values = torch.tensor([[1.0, 2, 4], [10, 20, 40]]).t()
    assert scatter_add(values, index, 3).tolist() == [[2, 20], [0, 0], [5, 50]]
    none = torch.zeros(0, dtype=torch.int64)
    for num_rows in (0, 3):
        assert torch.equal(scatter_add(torch.ones(0, 2), none, num_rows), torch.zeros(num_rows, 2))
    assert gather_rows(torch.ones(3, 2), none).shape == (0, 2)


def test_derivatives() -> None:
    index = random_segments(6, 30, perm=True).index
    for function, rows in ((lambda v: scatter_add(v, index, 6), 30), (lambda v: gather_rows(v, index), 6)):
        values = torch.randn(rows, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(function, values, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(lambda v, f=function: f(v).sin(), values, check_fwd_over_rev=True)


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    index = random_segments(6, 30, perm=True).index
    values = torch.randn(30, 3, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.megagnn.scatter_add.default, (values, index, 6))
    rows = torch.randn(6, 3, dtype=dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.megagnn.gather_rows.default, (rows, index))


@compiled
def test_compiled_equals_eager() -> None:
    index = random_segments(6, 30, perm=True).index

    def function(v: torch.Tensor) -> torch.Tensor:
        return gather_rows(scatter_add(v.sin(), index, 6).sin(), index)

    fast = torch.compile(function, fullgraph=True, backend="aot_eager")
    values = torch.randn(30, 3, requires_grad=True)
    results = [f(values) for f in (function, fast)]
    assert torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(out.cos().sum(), values)[0] for out in results))
    torch.compiler.reset()


def test_misuse() -> None:
    values, index = torch.ones(3, 2), torch.tensor([0, 1, 5])
    name = rf"scatter_add \({backend()}\): "
    with pytest.raises(
        ValueError, match=name + "values must be float32, float64 or bfloat16, got torch.float16"
    ):
        scatter_add(values.half(), index, 6)
    with pytest.raises(ValueError, match=name + "values must have one row per element of index, 3, got"):
        scatter_add(values[:2], index, 6)
    with pytest.raises(ValueError, match=name + "index must be a vector of int64, got torch.int32"):
        scatter_add(values, index.int(), 6)
    with pytest.raises(ValueError, match=name + "index must be on the device of values, cpu, got meta"):
        scatter_add(values, index.to("meta"), 6)
    with pytest.raises(ValueError, match=name + "num_rows must not be negative, got -1"):
        scatter_add(values, index, -1)
    with pytest.raises(ValueError, match=r"gather_rows .* got torch.int32"):
        gather_rows(values, index.int())


@compiled
def test_index_out_of_bounds() -> None:
    for wrong in (-1, 5, 2**62):
        index = torch.tensor([0, 1, wrong])
        with pytest.raises(
            RuntimeError, match=r"scatter_add \(cpu\): index must lie in \[0, 5\), got an element"
        ):
            scatter_add(torch.ones(3, 2), index, 5)
        with pytest.raises(
            RuntimeError, match=r"gather_rows \(cpu\): index must lie in \[0, 5\), got an element"
        ):
            gather_rows(torch.ones(5, 2), index)
