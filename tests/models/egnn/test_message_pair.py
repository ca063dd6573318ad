"""The pair of value and tangent against three other ways to a derivative; its gradients; forces by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megagnn.models.egnn.edge import EdgeSpec, EdgeWeights, edge_message, edge_message_pair
from megagnn.models.egnn.edge import reference as edge_reference
from megagnn.models.egnn.edge.message import pair_reference
from megagnn.ops import extension
from megagnn.ops.backends import aggregation_backend
from tests.models.egnn.edge_cases import (
    MODULE,
    Case,
    Widths,
    largest_error,
    pairwise_cover,
    present,
    random_case,
    random_graph,
    second_order,
    tangents_of,
    waves,
)
from tests.tolerances import RELATIVE

compiled = pytest.mark.skipif(extension.module is None, reason="the extension is not built")
FACTORS: dict[str, Any] = {
    "feature": ["bessel", "gaussian", "distance", "squared"],
    "direction": ["unit", "vector", "plus_one"],
    "activation": ["silu", "relu"],
    "bounded": [False, True],
    "vector": [True, False],
    "envelope": [True, False],
    "memory": ["recompute", "save"],
    "widths": [Widths(1, 1, 1, 1), Widths(3, 20, 3, 8), Widths(8, 8, 20, 3), Widths(20, 3, 8, 20)],
    "block_edges": [1, 7, 64],
}
COVER = pairwise_cover(FACTORS)
SPEC = EdgeSpec(block_edges=16)


@pytest.fixture(autouse=True)
def two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small cases are shared out to two workers, which one thread runs one after the other."""
    monkeypatch.setattr(MODULE, "_WORKER_FLOPS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def case_and_spec(row: dict[str, Any]) -> tuple[Case, EdgeSpec]:
    names = ("feature", "vector", "envelope", "widths")
    case = random_case(random_graph(15, 80), **{name: row[name] for name in names})
    return case, EdgeSpec(**{k: v for k, v in row.items() if k not in ("vector", "envelope", "widths")})


def pair(case: Case, tangents: Any, spec: EdgeSpec) -> list[Tensor]:
    """Outputs of the pair, without those that are not there."""
    return present(edge_message_pair(case.inputs, tangents, case.weights, case.graph, spec))


def pair_by_dual_numbers(
    case: Case, tangents: Any, spec: EdgeSpec, patch: pytest.MonkeyPatch
) -> list[Tensor]:
    """Forward mode of PyTorch through the reference made of PyTorch's own operations alone."""
    plain, inputs = aggregation_backend("torch"), case.inputs

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        p_NH, q_NH, r_E3, *f = tensors
        f_E = f[0] if f else None
        return tuple(
            present(edge_reference.edge_message(p_NH, q_NH, r_E3, f_E, case.weights, case.graph, spec, plain))
        )

    with patch.context() as patched:
        patched.setattr(edge_reference, "silu", functional.silu)
        values, found = torch.func.jvp(function, tuple(present(inputs)), tuple(present(tangents)))
    return [*values, *found]


def gradients_of_pair(function: Any, case: Case, tangents: Any, spec: EdgeSpec) -> list[Tensor]:
    """Of a loss on values and tangents, with respect to values, tangents and weights."""
    case = case.leaves()
    tangents = [None if t is None else t.clone().requires_grad_() for t in tangents]
    outputs = present(function(case.inputs, tangents, case.weights, case.graph, spec))
    return list(torch.autograd.grad(waves(outputs), [*case.differentiable(), *present(tangents)]))


@compiled
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # in torch.func.jvp
@pytest.mark.parametrize("row", COVER, ids=lambda row: f"{row['feature']}-{row['direction']}-{row['memory']}")
def test_pair_against_dual_numbers_and_its_gradients_against_the_reference(
    row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, spec = case_and_spec(row)
    tangents = tangents_of(case)
    want = pair_by_dual_numbers(case, tangents, spec, monkeypatch)
    got = pair(case, tangents, spec)
    assert largest_error(got, want) <= 10 * RELATIVE[torch.float64]
    got = gradients_of_pair(edge_message_pair, case, tangents, spec)
    want = gradients_of_pair(pair_reference, case, tangents, spec)
    assert largest_error(got, want) <= 30 * RELATIVE[torch.float64]


@pytest.mark.parametrize("feature", FACTORS["feature"])
def test_pair_against_finite_differences(feature: Any) -> None:
    """Central differences of the operation's own values, h = 1e-5: an error of h^2 and of 1e-16 / h."""
    case, spec, step = random_case(random_graph(15, 80), feature=feature), EdgeSpec(feature=feature), 1e-5
    tangents = tangents_of(case)

    def values(h: float) -> list[Tensor]:
        moved: Any = [x if t is None else x + h * t for x, t in zip(case.inputs, tangents, strict=True)]  # type: ignore[operator]
        return present(edge_message(*moved, case.weights, case.graph, spec))

    differences = [(x - y) / (2 * step) for x, y in zip(values(step), values(-step), strict=True)]
    sums, vectors, *found = pair(case, tangents, spec)
    assert largest_error([sums, vectors], values(0.0)) <= RELATIVE[torch.float64]
    assert largest_error(found, differences) <= 1e-7


@compiled
def test_numeric_derivatives_of_the_pair() -> None:
    for spec in (SPEC, EdgeSpec("gaussian", "plus_one", bounded=True, memory="save", block_edges=3)):
        case = random_case(random_graph(4, 7), Widths(2, 3, 4, 5)).leaves()
        tangents: Any = tuple(t.requires_grad_() for t in present(tangents_of(case)))
        centres = case.weights.centres_R

        def function(
            *tensors: Tensor, spec: EdgeSpec = spec, case: Case = case, centres: Any = centres
        ) -> Any:
            weights = EdgeWeights(centres, *tensors[8:])
            return tuple(edge_message_pair(tensors[:4], tensors[4:8], weights, case.graph, spec))  # type: ignore[arg-type]

        assert torch.autograd.gradcheck(function, (*case.inputs, *tangents, *case.weights[1:]))


@compiled
@pytest.mark.parametrize("row", COVER[:8], ids=lambda row: f"{row['feature']}-{row['direction']}")
def test_force_loss_by_one_pair_equals_create_graph(row: dict[str, Any]) -> None:
    """Gradients of <u, forces> + energy, u constant, are those of <dE/dy, tangent of y along u> + energy."""
    case, spec = case_and_spec(row)
    want = second_order(edge_message, case, spec)
    leaves = case.leaves()

    outputs = present(edge_message(*leaves.inputs, leaves.weights, leaves.graph, spec))
    forces = torch.autograd.grad(waves(outputs), leaves.present_inputs())
    forces = tuple(t.requires_grad_() for t in forces)
    along = iter(torch.autograd.grad(waves([*forces, *(t.detach() for t in outputs)]), forces))
    tangents = [None if t is None else next(along) for t in leaves.inputs]

    both = pair(leaves, tangents, spec)
    values, found = both[: len(outputs)], both[len(outputs) :]
    bars = torch.autograd.grad(waves(values), values, create_graph=True)
    product = sum((bar * t).sum() for bar, t in zip(bars, found, strict=True))
    # second_order's loss has the values behind the forces, with other weights than in front.
    behind = waves([*(torch.zeros_like(t) for t in forces), *values])
    got = torch.autograd.grad(product + behind, leaves.differentiable())
    assert largest_error(list(got), want) <= 1e-12


@compiled
def test_pair_is_differentiated_once() -> None:
    case = random_case(random_graph(12, 60)).leaves()
    outputs = pair(case, tangents_of(case), SPEC)
    (first,) = torch.autograd.grad(outputs[2].sum(), case.inputs[0], create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"edge_message_pair, cannot be differentiated; use edge_reference"
    ):
        torch.autograd.grad((first + case.inputs[0]).sum(), case.inputs[0])
