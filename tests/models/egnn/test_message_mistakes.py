"""The tests of the edge operation can fail: what a mistake changes is far outside their tolerances."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megagnn.models.egnn.edge import EdgeSpec, edge_message, edge_message_pair
from megagnn.models.egnn.edge import reference as edge_reference
from megagnn.ops import activation, extension
from tests.models.egnn.edge_cases import (
    Case,
    first_order,
    largest_error,
    present,
    random_case,
    random_graph,
    second_order,
    tangents_of,
)
from tests.tolerances import RELATIVE

SPEC = EdgeSpec(block_edges=16)
# A thousand million times what the tests in float64 accept, a hundred times what those in float32 do.
VISIBLE = 1e-3


@pytest.mark.parametrize("name", ["p", "q", "r", "f"])
def test_pair_misses_no_tangent(name: str) -> None:
    """One that is left out, the envelope's for example, is far outside the tolerance."""
    case, k = random_case(random_graph(15, 80)), "pqrf".index(name)
    tangents: Any = tangents_of(case)
    right = present(edge_message_pair(case.inputs, tangents, case.weights, case.graph, SPEC))
    dropped = [torch.zeros_like(t) if j == k else t for j, t in enumerate(tangents)]
    wrong = present(edge_message_pair(case.inputs, dropped, case.weights, case.graph, SPEC))
    assert largest_error(wrong[:2], right[:2]) == 0.0
    assert min(largest_error([x], [y]) for x, y in zip(wrong[2:], right[2:], strict=True)) > VISIBLE


def swapped(case: Case) -> Case:
    p_NH, q_NH, *rest = case.inputs
    return replace(case, inputs=(q_NH, p_NH, *rest))


def reversed_edges(case: Case) -> Case:
    p_NH, q_NH, r_E3, f_E = case.inputs
    return replace(case, inputs=(p_NH, q_NH, -r_E3, f_E))


def without_envelope(case: Case) -> Case:
    return replace(case, inputs=(*case.inputs[:3], None))


def neighbouring_row(case: Case) -> Case:
    """As if one edge were counted to the next atom."""
    f_E = case.inputs[3]
    assert f_E is not None
    less = f_E.clone()
    less[40] = 0.0
    return replace(case, inputs=(*case.inputs[:3], less))


def negative_bias(name: str) -> Any:
    return lambda case: replace(case, weights=case.weights._replace(**{name: -getattr(case.weights, name)}))


MISTAKES = [
    swapped,
    reversed_edges,
    without_envelope,
    neighbouring_row,
    *(pytest.param(negative_bias(name), id=f"minus_{name}") for name in ("b2_M", "b3_K", "b4_1", "w4_K")),
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_inputs_is_seen(mistake: Any) -> None:
    """In the values, in the first and in the second derivatives."""
    case = random_case(random_graph(15, 80))
    right = edge_message(*case.inputs, case.weights, case.graph, SPEC)
    wrong_case = mistake(case)
    wrong = edge_message(*wrong_case.inputs, wrong_case.weights, case.graph, SPEC)
    assert largest_error(present(wrong), present(right)) > VISIBLE
    second, other = (second_order(edge_message, c, SPEC)[:3] for c in (case, wrong_case))
    assert largest_error(other, second) > VISIBLE


@pytest.mark.parametrize(
    "change",
    [
        {"feature": "gaussian"},
        {"direction": "vector"},
        {"direction": "plus_one"},
        {"activation": "relu"},
        {"bounded": True},
        {"epsilon": 0.1},
        {"cutoff": 5.1},
    ],
    ids=str,
)
def test_a_mistake_in_the_spec_is_seen(change: dict[str, Any]) -> None:
    case = random_case(random_graph(15, 80))
    right = second_order(edge_reference.edge_message, case, SPEC)
    wrong = second_order(edge_message, case, replace(SPEC, **change))
    assert largest_error(wrong, right) > VISIBLE
    assert largest_error(second_order(edge_message, case, SPEC), right) <= 30 * RELATIVE[torch.float64]


@pytest.mark.skipif(extension.module is None, reason="the extension is not built")
def test_a_missing_second_derivative_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tangent line of the activation has its value and its slope: only second derivatives tell."""
    case = random_case(random_graph(15, 80))

    def tangent_line(x: Tensor) -> Tensor:
        at = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(activation.silu(at).sum(), at)
        return activation.silu(x.detach()) + slope * (x - x.detach())

    monkeypatch.setattr(edge_reference, "silu", tangent_line)
    wrong = [order(edge_reference.edge_message, case, SPEC) for order in (first_order, second_order)]
    assert largest_error(first_order(edge_message, case, SPEC), wrong[0]) <= 10 * RELATIVE[torch.float64]
    assert largest_error(second_order(edge_message, case, SPEC), wrong[1]) > VISIBLE
