"""The blockwise edge operation against a literal example and against its reference: values and gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
import torch

from megagnn.models.egnn.edge import EdgeSpec, EdgeWeights, edge_message
from megagnn.models.egnn.edge import reference as edge_reference
from megagnn.models.egnn.edge.runner import Call, compiled_arguments
from megagnn.ops import extension
from tests.conftest import LEVELS
from tests.models.egnn.edge_cases import (
    MODULE,
    Widths,
    first_order,
    graph_of,
    largest_error,
    pairwise_cover,
    random_case,
    second_order,
)
from tests.tolerances import RELATIVE

FACTORS: dict[str, Any] = {
    "feature": ["bessel", "gaussian", "distance", "squared"],
    "direction": ["unit", "vector", "plus_one"],
    "activation": ["silu", "relu"],
    "bounded": [False, True],
    "vector": [True, False],
    "envelope": [True, False],
    "bias": [True, False],
    "memory": ["recompute", "save"],
    # A vector holds 2 to 16 numbers: less than one, one and a rest, whole ones, whole ones and a rest.
    "widths": [Widths(1, 1, 1, 1), Widths(3, 20, 3, 8), Widths(8, 8, 20, 3), Widths(20, 3, 8, 20)],
    "block_edges": [1, 7, 64, None],
    "threads": [1, 2],
    "simd": LEVELS,
    "dtype": [torch.float64, torch.float32],
}
COVER = pairwise_cover(FACTORS)
# Beyond the rounding of a sum: a chain of three products with up to 20 terms each, and their derivatives,
# which divide by a distance or its square.
FIRST, SECOND = 10.0, 30.0


@pytest.fixture
def settings() -> Iterator[None]:
    """Restores the number of threads and the SIMD level."""
    threads, level = torch.get_num_threads(), extension.module.simd_level() if extension.module else None
    yield
    torch.set_num_threads(threads)
    if extension.module is not None:
        extension.module.set_simd_level(level)


@pytest.fixture(autouse=True)
def many_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small cases are shared out to all threads."""
    monkeypatch.setattr(MODULE, "_WORKER_FLOPS", 1)


def spec_of(factors: dict[str, Any]) -> EdgeSpec:
    names = ("feature", "direction", "activation", "bounded", "memory", "block_edges")
    return EdgeSpec(**{name: factors[name] for name in names if name in factors})


def test_literal_example() -> None:
    """Two edges into atom 0, from 1 and from 2, one into 2 from 0; one feature of each kind, by hand."""
    p, q = [[0.1], [0.2], [0.3]], [[-0.4], [0.5], [0.6]]
    r, f = [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, -2.0, 0.0]], [0.5, 0.25, 2.0]
    w1, w2, b2, w3, b3, w4, b4 = 0.7, 1.1, -0.2, 0.9, 0.3, 1.3, -0.6

    def silu(x: float) -> float:
        return x / (1 + math.exp(-x))

    sums, vectors = [0.0] * 3, [[0.0] * 3 for _ in range(3)]
    for e, (i, j) in enumerate(((0, 1), (0, 2), (2, 0))):
        d = math.sqrt(sum(x * x for x in r[e]) + 1e-6)
        rho = math.sin(0.8 * d) * 5.0 / d
        m = silu(w2 * silu(p[i][0] + q[j][0] + w1 * rho) + b2)
        sums[i] += f[e] * m
        for axis in range(3):
            vectors[i][axis] += f[e] * (w4 * silu(w3 * m + b3) + b4) / d * r[e][axis]

    def tensor(x: Any) -> torch.Tensor:
        return torch.tensor(x, dtype=torch.float64)

    weights = EdgeWeights(*map(tensor, ([0.8], [[w1]], [[w2]], [b2], [[w3]], [b3], [w4], [b4])))
    graph = graph_of(torch.tensor([0, 0, 2]), torch.tensor([1, 2, 0]), 3)
    for function in (edge_message, edge_reference.edge_message):
        got = function(*map(tensor, (p, q, r, f)), weights, graph, EdgeSpec())
        assert got[1] is not None
        assert got[0][:, 0].tolist() == pytest.approx(sums, rel=1e-14)
        assert got[1].flatten().tolist() == pytest.approx([x for row in vectors for x in row], rel=1e-14)
        assert got[0][1].item() == 0.0, "atom 1 receives nothing"


def test_cover_is_complete() -> None:
    """Each two values of two factors meet in one of the combinations below."""
    for a, b in combinations(FACTORS, 2):
        met = {(row[a], row[b]) for row in COVER}
        assert met == {(x, y) for x in FACTORS[a] for y in FACTORS[b]}


def name_of(row: dict[str, Any]) -> str:
    values = {**row, "widths": "x".join(map(str, row["widths"])), "dtype": str(row["dtype"])[6:]}
    return "-".join(k if v is True else f"no_{k}" if v is False else str(v) for k, v in values.items())


@pytest.mark.parametrize("row", COVER, ids=name_of)
def test_against_reference(row: dict[str, Any], settings: None) -> None:
    torch.set_num_threads(row["threads"])
    if extension.module is not None:
        extension.module.set_simd_level(row["simd"])
    names = ("widths", "vector", "envelope", "bias", "feature")
    case = random_case(seed=3, **{name: row[name] for name in names}).to(row["dtype"])
    spec = spec_of(row)
    exact = case.to(torch.float64)  # float32 is compared to float64 of the same numbers
    for order, factor in ((first_order, FIRST), (second_order, SECOND)):
        got, want = order(edge_message, case, spec), order(edge_reference.edge_message, exact, spec)
        assert all(t.dtype == row["dtype"] for t in got)
        error = largest_error(got, want)
        assert error <= factor * RELATIVE[row["dtype"]], f"{order.__name__}: {error:.1e}"


@pytest.mark.skipif(extension.module is None, reason="the extension is not built")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_products_by_torch_equal_those_of_blas(dtype: torch.dtype) -> None:
    """Where torch exports no BLAS, the products go through its addmm; here both can be asked for."""
    case = random_case().to(dtype)
    tensors = (*case.inputs, *case.weights)
    *lists, integers, reals = compiled_arguments(Call(case.graph, EdgeSpec(block_edges=7), False, tensors))
    results = []
    for blas in (1, 0):
        arguments = (*lists, [*integers[:5], blas], reals)
        outputs = torch.ops.megagnn.edge_message_forward(*arguments, False)
        bars, none = [t.sin() for t in outputs[:4]], [torch.empty(0)] * 2
        results.append(
            [
                *outputs[:2],
                *torch.ops.megagnn.edge_message_backward(*arguments, none, bars, True, True, False),
            ]
        )
    kept = [[t for t in result if t.is_floating_point() and t.numel()] for result in results]
    assert len(kept[0]) == 13
    assert largest_error(*kept) < FIRST * RELATIVE[dtype]
