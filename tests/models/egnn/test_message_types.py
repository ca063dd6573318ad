"""The edge operation on bfloat16, and on float32 with float64 geometry: [Note: types] of edge_runner.py."""

from typing import Any

import pytest
import torch

from megagnn.models.egnn.edge import EdgeSpec, EdgeWeights, edge_message, edge_message_pair
from megagnn.models.egnn.edge import reference as edge_reference
from megagnn.models.egnn.edge.runner import SERIAL, Call, has_kernels
from tests.models.egnn.edge_cases import (
    Case,
    Widths,
    first_order,
    largest_error,
    random_case,
    second_order,
    tangents_of,
)

FLOAT32, FLOAT64, BFLOAT16 = torch.float32, torch.float64, torch.bfloat16
WIDTHS = Widths(6, 16, 12, 8)
AGAIN = EdgeSpec(memory="recompute")
# One rounding at the end; two or three where c and g were kept in bfloat16, and in second derivatives
# those of the first; some tens where every intermediate is a tensor.
ONE_ROUNDING, SOME_ROUNDINGS, EVERY_STEP = 2.0**-8, 2.0**-6, 2.0**-4
if not has_kernels(torch.empty(0)):  # then there is no other way
    ONE_ROUNDING = SOME_ROUNDINGS = EVERY_STEP


def typed(case: Case, parameters: torch.dtype, geometry: torch.dtype) -> Case:
    """p, q and weights in one type, r and f in another."""
    p, q, r, f = case.inputs
    weights = EdgeWeights(*[None if t is None else t.to(parameters) for t in case.weights])
    weights = weights._replace(centres_R=None if case.weights[0] is None else case.weights[0].float())
    other = None if f is None else f.to(geometry)
    return Case((p.to(parameters), q.to(parameters), r.to(geometry), other), weights, case.graph)


def mixed_case(**values: Any) -> tuple[Case, Case]:
    """In bfloat16 with float32 geometry; the same numbers in float64."""
    low = typed(random_case(widths=WIDTHS, **values), BFLOAT16, FLOAT32)
    return low, low.to(FLOAT64)


@pytest.mark.skipif(not has_kernels(torch.empty(0)), reason="the reference has no kernels to be widened to")
@pytest.mark.parametrize("vector", [True, False])
def test_blocks_are_those_of_float32(vector: bool) -> None:
    """Without kept intermediates: the float32 operation, its results rounded once, to the bit."""
    low, _ = mixed_case(vector=vector)
    wide = low.to(FLOAT32)
    got = edge_message(*low.inputs, low.weights, low.graph, AGAIN)
    want = edge_message(*wide.inputs, wide.weights, wide.graph, AGAIN)
    assert torch.equal(got[0], want[0].to(BFLOAT16))
    assert (got[1] is None) == (not vector)
    if got[1] is not None and want[1] is not None:
        assert torch.equal(got[1], want[1])


@pytest.mark.parametrize(
    ("memory", "tolerance"), [("recompute", ONE_ROUNDING), ("save", SOME_ROUNDINGS)], ids=str
)
@pytest.mark.parametrize("parts", ["all", "no vectors", "squared"])
def test_first_derivatives(memory: Any, tolerance: float, parts: str) -> None:
    values: dict[str, Any] = {"vector": parts != "no vectors"}
    if parts == "squared":
        values |= {"envelope": False, "feature": "squared"}
    low, high = mixed_case(**values)
    spec = EdgeSpec(memory=memory, feature=values.get("feature", "bessel"))
    got, want = first_order(edge_message, low, spec), first_order(edge_message, high, spec)
    outputs = 2 if low.weights.w3_KM is not None else 1
    assert [t.dtype for t in got[:outputs]] == [BFLOAT16, FLOAT32][:outputs]
    assert [t.dtype for t in got[outputs:]] == [t.dtype for t in low.differentiable()]
    # cotangents are made of the rounded outputs
    assert largest_error(got[:outputs], want[:outputs]) < ONE_ROUNDING
    assert largest_error(got[outputs:], want[outputs:]) < 4 * tolerance


@pytest.mark.parametrize("memory", ["recompute", "save"])
def test_second_derivatives(memory: Any) -> None:
    low, high = mixed_case()
    spec = EdgeSpec(memory=memory)
    got, want = second_order(edge_message, low, spec), second_order(edge_message, high, spec)
    assert [t.dtype for t in got] == [t.dtype for t in low.differentiable()]
    assert largest_error(got, want) < 4 * SOME_ROUNDINGS


def test_pair() -> None:
    """Tangents of 1e-6, as a loss's cotangents are, keep their digits: bfloat16 has float32's range."""
    low, high = mixed_case()
    tangents: Any = tuple(None if t is None else 1e-6 * t for t in tangents_of(low))
    wide: Any = tuple(None if t is None else t.double() for t in tangents)
    got = edge_message_pair(low.inputs, tangents, low.weights, low.graph, AGAIN)
    want = edge_message_pair(high.inputs, wide, high.weights, high.graph, AGAIN)
    assert [t.dtype for t in got if t is not None] == [BFLOAT16, FLOAT32] * 2
    assert largest_error(got, want) < ONE_ROUNDING  # type: ignore[arg-type]


def test_every_intermediate_a_tensor() -> None:
    low, high = mixed_case()
    got = first_order(edge_reference.edge_message, low, EdgeSpec())
    want = first_order(edge_reference.edge_message, high, EdgeSpec())
    assert [t.dtype for t in got[:2]] == [BFLOAT16, FLOAT32]
    assert largest_error(got, want) < EVERY_STEP


@pytest.mark.skipif(not has_kernels(torch.empty(0)), reason="the reference keeps what autograd keeps")
def test_what_is_kept_is_bfloat16() -> None:
    """Half the memory of float32: c and g of every edge."""
    low, _ = mixed_case()
    call = Call(low.graph, EdgeSpec(), False, (*low.inputs, *low.weights))
    kept = SERIAL.forward(call, True)[1]
    edges = low.graph.destination.num_entries
    assert [(t.dtype, t.shape) for t in kept] == [
        (BFLOAT16, (edges, width)) for width in (WIDTHS.M, WIDTHS.K)
    ]


def test_float64_vectors_beside_float32() -> None:
    """Vectors and their gradients in float64, exact to float32."""
    case = random_case(widths=WIDTHS)
    low = typed(case, FLOAT32, FLOAT64)
    got, want = first_order(edge_message, low, AGAIN), first_order(edge_message, low.to(FLOAT64), AGAIN)
    assert [t.dtype for t in got[:2]] == [FLOAT32, FLOAT64]
    assert [t.dtype for t in got[2:]] == [t.dtype for t in low.differentiable()]
    assert largest_error(got, want) < 1e-5
