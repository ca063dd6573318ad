"""The aggregation back ends: one suite over all that are installed, values and derivatives.

`test_installed` names them in the output: one that is missing is a skipped test with the way to install it.
"""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor

from megagnn.config import config_from_dict
from megagnn.ops import Segments, backends, reference
from megagnn.ops.backends import AggregationBackend, aggregation_backend
from tests.ops.helpers import random_segments
from tests.ops.installed import installed_backends
from tests.tolerances import RELATIVE, assert_close

INSTALLED, MISSING = installed_backends()
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
OPERATIONS = ["segment_sum", "segment_mean", "segment_max", "gather"]


@pytest.fixture(params=INSTALLED)
def backend(request: pytest.FixtureRequest) -> AggregationBackend:
    """Each back end that is installed."""
    return aggregation_backend(request.param)


@pytest.mark.parametrize("name", list(backends.BACKENDS))
def test_installed(name: str) -> None:
    if name in MISSING:
        pytest.skip(f"NOT TESTED: {MISSING[name]}")
    assert aggregation_backend(name).name == name
    assert aggregation_backend(name) is aggregation_backend(name)


def in_float64(operation: str, values: Tensor, segments: Segments) -> Tensor:
    """The operation in plain float64, row by row."""
    values = values.double()
    if operation == "gather":
        return reference.gather(values, segments.index)
    rows = []
    for row in range(segments.num_rows):
        mine = values[segments.index == row]
        if operation == "segment_max":
            rows.append(mine.amax(0) if len(mine) else values.new_zeros(values.shape[1:]))
        else:
            rows.append(mine.sum(0) / (max(len(mine), 1) if operation == "segment_mean" else 1))
    return torch.stack(rows)


def tolerance(backend: AggregationBackend, dtype: torch.dtype) -> float:
    """Of a sum of some tens of terms; in bfloat16 where the library adds in it, every addition rounds."""
    if dtype == torch.bfloat16 and backend.sums_bfloat16_in == dtype:
        return 16 * RELATIVE[dtype]
    return 2 * RELATIVE[dtype]  # a mean rounds twice


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", [(), (1,), (16,), (3, 5), (4, 0)], ids=str)
@pytest.mark.parametrize("perm", [False, True], ids=["sorted", "perm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(
    backend: AggregationBackend, dtype: torch.dtype, perm: bool, shape: tuple[int, ...], operation: str
) -> None:
    segments = random_segments(12, 60, perm=perm)
    assert (segments.ptr.diff() == 0).any(), "the example must have an empty row"
    values = torch.randn(12 if operation == "gather" else 60, *shape).to(dtype)
    got = getattr(backend, operation)(values, segments)
    assert got.dtype == dtype
    assert_close(got, in_float64(operation, values, segments), tolerance(backend, dtype))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_to_sum(backend: AggregationBackend, operation: str) -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    for num_rows in (0, 3):
        segments = Segments(empty, torch.zeros(num_rows + 1, dtype=torch.int64))
        values = torch.ones(num_rows if operation == "gather" else 0, 2, requires_grad=True)
        out = getattr(backend, operation)(values, segments)
        assert torch.equal(out, torch.zeros(0 if operation == "gather" else num_rows, 2))
        (grad,) = torch.autograd.grad(out.sum(), values)
        assert torch.equal(grad, torch.zeros_like(values))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_not_contiguous(backend: AggregationBackend, operation: str) -> None:
    segments = random_segments(12, 60, perm=False)
    num_rows = 12 if operation == "gather" else 60
    for values in (torch.randn(4, num_rows).t(), torch.randn(num_rows, 8)[:, ::2]):
        got = getattr(backend, operation)(values, segments)
        assert_close(got, in_float64(operation, values, segments))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("perm", [False, True], ids=["sorted", "perm"])
def test_first_and_second_derivatives(backend: AggregationBackend, perm: bool, operation: str) -> None:
    """Of a function that is not linear in the values: a back end that loses the second derivative fails."""
    segments = random_segments(6, 20, perm=perm)
    values = torch.randn(6 if operation == "gather" else 20, 3, dtype=torch.float64, requires_grad=True)
    function = getattr(backend, operation)
    assert torch.autograd.gradcheck(lambda v: function(v, segments), values)
    assert torch.autograd.gradgradcheck(lambda v: function(v.sin(), segments).square(), values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_first_derivatives_in_every_type(
    backend: AggregationBackend, operation: str, dtype: torch.dtype
) -> None:
    segments = random_segments(12, 60, perm=True)
    values = torch.randn(12 if operation == "gather" else 60, 5).to(dtype)
    want = values.double().clone().requires_grad_()
    got = values.clone().requires_grad_()
    out = getattr(backend, operation)(got, segments)
    weight = torch.randn(out.shape).to(dtype)
    (out * weight).sum().backward()
    # bfloat16 values tie; own subgradients differ there, so the maximum is compared by what rows receive
    exact = in_float64(operation, want, segments)
    (exact * weight.double()).sum().backward()
    assert got.grad is not None
    assert want.grad is not None
    if operation == "segment_max":
        sums = [reference.segment_sum(v.grad.double(), segments.index, 12) for v in (got, want)]
        assert_close(sums[0], sums[1], 2 * RELATIVE[dtype])
    else:
        assert_close(got.grad, want.grad, tolerance(backend, dtype))


def test_a_tie_gives_a_subgradient(backend: AggregationBackend) -> None:
    segments = Segments(torch.tensor([0, 0, 0, 2]), torch.tensor([0, 3, 3, 4]))
    values = torch.tensor([2.0, 1.0, 2.0, -5.0], requires_grad=True)
    largest = backend.segment_max(values, segments)
    assert largest.tolist() == [2, 0, -5]  # an empty row gives 0, a row of negative values its largest
    largest.sum().backward()
    assert values.grad is not None
    assert values.grad[1] == 0
    assert values.grad[0] + values.grad[2] == 1
    assert values.grad[3] == 1


def test_how_bfloat16_is_summed(backend: AggregationBackend) -> None:
    """1 + 300 x 2^-9: every addition in bfloat16 rounds back to 1. The attribute tells the truth."""
    segments = Segments(torch.zeros(301, dtype=torch.int64), torch.tensor([0, 301]))
    lost = backend.sums_bfloat16_in == torch.bfloat16
    for shape in ((), (1,), (64,)):
        values = torch.full((301, *shape), 2.0**-9, dtype=torch.bfloat16)
        values[0] = 1
        got = backend.segment_sum(values, segments).flatten()[0].item()
        assert got == pytest.approx(1 if lost else 1 + 300 * 2**-9, rel=2**-8)


def test_copies_are_the_same_object(backend: AggregationBackend) -> None:
    """A model is copied for its weight average, and a module of a library cannot be."""
    assert copy.deepcopy(backend) is backend


def test_names() -> None:
    """The configuration admits what there is, and the missing are told apart from the unknown."""
    assert {"own", "torch"} <= set(INSTALLED)
    assert set(INSTALLED) | set(MISSING) == set(backends.BACKENDS)
    for name in backends.BACKENDS:
        assert config_from_dict({"model": {"aggregation_backend": name}}).model.aggregation_backend == name
    with pytest.raises(ValueError, match=r"must be one of \['own', .*\], got 'numpy'"):
        aggregation_backend("numpy")
    with pytest.raises(ValueError, match=r"'model.aggregation_backend'.*nearest: 'torch_scatter'"):
        config_from_dict({"model": {"aggregation_backend": "torch_scater"}})


@pytest.mark.parametrize("library", ["torch_scatter", "torch_sparse"])
def test_a_missing_library_is_named_with_its_install(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)  # what an import finds where it is not installed
    with pytest.raises(ValueError, match=rf"{library} must be installed.*pip install .*{library}.*'own'"):
        backends.BACKENDS[library]()
