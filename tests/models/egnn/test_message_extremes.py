"""Elementary functions of the edge kernels, seen through the operation: accuracy, large inputs, NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megagnn.models.egnn.edge import EdgeSpec, EdgeWeights, edge_message
from megagnn.models.egnn.edge import reference as edge_reference
from megagnn.models.radial import distance_features
from megagnn.ops import extension
from tests.models.egnn.edge_cases import (
    Case,
    first_order,
    graph_of,
    largest_error,
    present,
    random_case,
    second_order,
)
from tests.tolerances import RELATIVE, assert_close

pytestmark = [
    pytest.mark.skipif(extension.module is None, reason="the extension is not built"),
    pytest.mark.usefixtures("simd"),
]
DTYPES = [torch.float32, torch.float64]
EPSILON = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


def chain(num_edges: int) -> Case:
    """Edge e from atom 0 to atom e, of width one and without features: sum_e = act(act(p_e))."""
    one = torch.ones(1, 1, dtype=torch.float64)
    graph = graph_of(torch.arange(num_edges), torch.zeros(num_edges, dtype=torch.int64), num_edges)
    zeros = torch.zeros(num_edges, 1, dtype=torch.float64)
    r_E3 = torch.zeros(num_edges, 3, dtype=torch.float64)
    weights = EdgeWeights(one[0], 0 * one, one, torch.zeros(1, dtype=torch.float64))
    return Case((zeros, zeros, r_E3, None), weights, graph)


def activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """silu(silu(x)) of each element by the kernels, and the derivative."""
    case = chain(len(x)).to(x.dtype)
    p_NH = x.unsqueeze(1).requires_grad_()
    sums, _ = edge_message(p_NH, *case.inputs[1:], case.weights, case.graph, EdgeSpec())
    (slope,) = torch.autograd.grad(sums.sum(), p_NH)
    return sums.detach()[:, 0], slope[:, 0]


def exact_silu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative, float64."""
    s = torch.sigmoid(x.double())
    return x * s, s + x * s * (1 - s)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation(dtype: torch.dtype) -> None:
    """Within a few roundings of each value, from where the result is denormal to where it is x."""
    for x in (torch.linspace(-85, 0, 4001), torch.linspace(0, 85, 4001), torch.logspace(-30, 2, 1001)):
        x = x.to(dtype)
        y, slope = exact_silu(x)
        want, outer = exact_silu(y)
        got, got_slope = activations(x)
        # The inner value is as wrong as exp(-x), whose argument is wrong by a rounding of x.
        assert ((got - want).abs() <= 8 * EPSILON[dtype] * (want.abs() + 1e-30)).all()
        # In x s (1 - s) the factor 1 - s is rounded in units of s.
        assert ((got_slope - outer * slope).abs() <= (8 + x.double().abs()) * EPSILON[dtype]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_pre_activations(dtype: torch.dtype) -> None:
    """1e4 either way: no NaN, silu(-1e4) is zero for every purpose, silu(1e4) is 1e4 itself."""
    x = torch.tensor([-1e4, -1e3, -100.0, 100.0, 1e3, 1e4], dtype=dtype)
    sums, slopes = activations(x)
    assert sums[:3].abs().max() <= 1e-30
    assert_close(sums[3:], x[3:].double(), 4 * EPSILON[dtype])
    assert slopes[:3].abs().max() <= 1e-30
    assert_close(slopes[3:], torch.ones(3, dtype=torch.float64), 4 * EPSILON[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bounded", [False, True])
def test_large_inputs_give_no_nan(dtype: torch.dtype, bounded: bool) -> None:
    """Values, first and second derivatives."""
    case = random_case(seed=3)
    for scale in (1e2, 1e4):
        p_NH, q_NH, *rest = case.inputs
        large = Case((p_NH * scale, q_NH, *rest), case.weights, case.graph).to(dtype)  # type: ignore[arg-type]
        for order in (first_order, second_order):
            assert all(t.isfinite().all() for t in order(edge_message, large, EdgeSpec(bounded=bounded)))


def features(feature: str, d: Tensor, centres: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of the features of each distance and its derivative along r, by the kernels and in float64.

    The activation is ReLU and everything around the features the identity, shifted by 100 to stay positive.
    """
    count, dtype = len(centres), d.dtype
    graph = chain(len(d)).graph
    zeros, r_E3 = torch.zeros(len(d), count, dtype=dtype), torch.zeros(len(d), 3, dtype=dtype)
    r_E3[:, 1] = d
    eye = torch.eye(count, dtype=dtype)
    weights = EdgeWeights(centres, eye, eye, torch.zeros(count, dtype=dtype))
    spec = EdgeSpec(feature=feature, activation="relu", epsilon=0.0, spread=0.7)  # type: ignore[arg-type]
    results = []
    for sign in (1.0, -1.0):  # rho = relu(rho) - relu(-rho)
        r_E3 = r_E3.detach().requires_grad_()
        signed = weights._replace(w1c_HR=sign * eye)
        sums, _ = edge_message(zeros, zeros, r_E3, None, signed, graph, spec)
        (slope,) = torch.autograd.grad(sums.sum(), r_E3)
        results.append((sums.detach(), slope[:, 1]))
    value = results[0][0] - results[1][0]
    first = results[0][1] - results[1][1]
    d_E = d.double().requires_grad_()
    exact = distance_features(feature, d_E, d_E * d_E, centres.double(), spec.cutoff, spec.spread)
    (slope,) = torch.autograd.grad(exact.sum(), d_E)
    return value, exact.detach(), first, slope


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sine_and_cosine(dtype: torch.dtype) -> None:
    """Bessel features up to 64 half waves in the cutoff, out to twice the cutoff."""
    centres = (torch.arange(1, 65, dtype=torch.float64) * (torch.pi / 5)).to(dtype)
    d = torch.linspace(0.05, 9.95, 500, dtype=torch.float64).to(dtype)
    value, exact, first, slope = features("bessel", d, centres)
    # The product k d is rounded, by half a unit of its 400: that, and not the sine, is the error in float32.
    arguments = 64 * torch.pi / 5 * 10
    assert ((value - exact).abs() <= EPSILON[dtype] * arguments * (5.0 / d.double()).unsqueeze(1)).all()
    assert_close(first, slope, 2 * EPSILON[dtype] * arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gaussian(dtype: torch.dtype) -> None:
    """Also far from the centre, where the feature is below every rounding."""
    centres = torch.linspace(0, 12, 9, dtype=torch.float64).to(dtype)
    d = torch.linspace(0.05, 25.0, 500, dtype=torch.float64).to(dtype)
    value, exact, first, slope = features("gaussian", d, centres)
    # The exponent is rounded by half a unit of itself; what it makes is largest where it is 1.
    assert ((value - exact).abs() <= 8 * EPSILON[dtype]).all()
    assert_close(first, slope, 16 * EPSILON[dtype])
    assert first.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bounded_scalar_near_zero(dtype: torch.dtype) -> None:
    """tanh of a scalar of 1e-4, where a coordinate branch starts, is as accurate as the scalar."""
    case = random_case(bias=False)
    assert case.weights.w4_K is not None
    case = Case(case.inputs, case.weights._replace(w4_K=case.weights.w4_K * 1e-4), case.graph).to(dtype)
    _, vectors = edge_message(*case.inputs, case.weights, case.graph, EdgeSpec(bounded=True))
    exact = case.to(torch.float64)
    _, want = edge_reference.edge_message(*exact.inputs, exact.weights, exact.graph, EdgeSpec(bounded=True))
    assert vectors is not None
    assert want is not None
    assert_close(vectors, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_nan_stays_with_the_rows_concerned(position: int, dtype: torch.dtype) -> None:
    """NaN in p_i, q_j, r_e or f_e: sums of the receivers of those edges, and no others."""
    case = random_case(seed=3).to(dtype)
    graph = case.graph
    inputs = [t.clone() for t in present(case.inputs)]
    row = {0: 5, 1: int(graph.source.index[60]), 2: 60, 3: 60}[position]
    inputs[position][row] = float("nan")
    concerned = torch.zeros(20, dtype=torch.bool)
    edges = {
        0: graph.destination.index == row,
        1: graph.source.index == row,
    }.get(position, torch.arange(150) == row)
    concerned[graph.destination.index[edges]] = True
    assert 0 < concerned.sum() < 20
    for feature in ("bessel", "gaussian"):
        spec = EdgeSpec(feature=feature, block_edges=32)  # type: ignore[arg-type]
        p_NH, q_NH, r_E3, f_E = inputs
        sums, vectors = edge_message(p_NH, q_NH, r_E3, f_E, case.weights, graph, spec)
        clean = edge_message(*case.inputs, case.weights, graph, spec)
        for got, want in zip(present((sums, vectors)), present(clean), strict=True):
            assert got[concerned].isnan().all()
            assert largest_error([got[~concerned]], [want[~concerned]]) <= RELATIVE[dtype]
