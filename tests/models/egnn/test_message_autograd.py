"""Derivatives of the edge operation by the engine: numeric, their bits, what is kept, what is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megagnn.models.egnn.edge import EdgeSpec, EdgeWeights, edge_message
from megagnn.models.egnn.edge import reference as edge_reference
from megagnn.ops import extension
from tests.models.egnn.edge_cases import (
    MODULE,
    Case,
    Widths,
    first_order,
    largest_error,
    present,
    random_case,
    random_graph,
    second_order,
    waves,
)
from tests.tolerances import RELATIVE

compiled = pytest.mark.skipif(extension.module is None, reason="the extension is not built")
THREADS = torch.get_num_threads  # the true one
SPECS = [
    EdgeSpec(block_edges=4),
    EdgeSpec("gaussian", "vector", bounded=True, memory="save", block_edges=5),
    EdgeSpec("distance", "plus_one"),
    EdgeSpec("squared", memory="save"),
]


@pytest.fixture(autouse=True)
def two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small cases are shared out to two workers, which one thread runs one after the other."""
    monkeypatch.setattr(MODULE, "_WORKER_FLOPS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def tiny_case(spec: EdgeSpec, *, vector: bool = True, envelope: bool = True) -> Case:
    """4 atoms, 7 edges, and no width equal to another."""
    graph = random_graph(4, 7)
    return random_case(graph, Widths(2, 3, 4, 5), vector=vector, envelope=envelope, feature=spec.feature)


def function_of(case: Case, spec: EdgeSpec) -> Any:
    """The operation as a function of `Case.differentiable`."""

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        inputs: Any = [None if t is None else next(rest) for t in case.inputs]
        weights = [None if t is None else next(rest) for t in case.weights[1:]]
        return tuple(
            present(edge_message(*inputs, EdgeWeights(case.weights[0], *weights), case.graph, spec))  # type: ignore[arg-type]
        )

    return function


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.feature)
@pytest.mark.parametrize("vector", [True, False], ids=["vector", "scalar"])
def test_numeric_derivatives(spec: EdgeSpec, vector: bool) -> None:
    """First and second, of and with respect to inputs and weights; the latter take the reference's way."""
    case = tiny_case(spec, vector=vector, envelope=vector).leaves()
    function, leaves = function_of(case, spec), tuple(case.differentiable())
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, atol=1e-4)


def test_gradients_of_weights_are_differentiated_on_the_reference() -> None:
    """A loss on gradients of weights, as meta-learning has."""
    results = []
    for operation in (edge_message, edge_reference.edge_message):
        case = random_case(random_graph(12, 60)).leaves()
        outputs = operation(*case.inputs, case.weights, case.graph, EdgeSpec(block_edges=16))
        first = torch.autograd.grad(waves(outputs), case.differentiable(), create_graph=True)
        results.append(torch.autograd.grad(waves(first), case.differentiable()))
    assert largest_error(*results) <= 30 * RELATIVE[torch.float64]


@compiled
def test_third_derivative_is_an_error() -> None:
    """Also where nothing but the inputs, and no cotangent, requires a gradient."""
    for loss in (lambda outputs: outputs[0].sum(), waves):
        case = random_case(random_graph(12, 60)).leaves()
        outputs = edge_message(*case.inputs, case.weights, case.graph, EdgeSpec())
        (first,) = torch.autograd.grad(loss(outputs), case.inputs[0], create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), case.inputs[0], create_graph=True)
        with pytest.raises(
            RuntimeError, match=r"second derivatives.* cannot be differentiated; use edge_ref"
        ):
            torch.autograd.grad((second + case.inputs[0]).sum(), case.inputs[0])


@pytest.mark.parametrize("memory", ["recompute", "save"])
def test_same_bits_on_repeated_runs(memory: Any) -> None:
    case, spec = random_case(random_graph(50, 700), seed=6), EdgeSpec(memory=memory, block_edges=32)
    for order in (first_order, second_order):
        runs = [order(edge_message, case, spec) for _ in range(3)]
        assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(run, runs[0], strict=True))


def test_same_bits_of_both_kinds_of_memory() -> None:
    """What is kept is what would be made again."""
    case = random_case(random_graph(50, 700), seed=6)
    for order in (first_order, second_order):
        recompute, save = (order(edge_message, case, EdgeSpec(memory=m)) for m in ("recompute", "save"))  # type: ignore[arg-type]
        assert all(map(torch.equal, recompute, save))


def test_rows_have_the_same_bits_at_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row is shared; only sums over sources and over all edges depend on the number of workers."""
    case, spec = random_case(random_graph(50, 700), seed=6), EdgeSpec(block_edges=32)
    runs = []
    before = THREADS()
    for threads in (1, 2, 3, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        torch.set_num_threads(threads)
        sums, vectors, p_bar, q_bar, r_bar, f_bar, *_ = first_order(edge_message, case, spec)
        runs.append((sums, vectors, p_bar, r_bar, f_bar, q_bar))
    torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(map(torch.equal, run[:-1], runs[0][:-1]))
        assert largest_error(run[-1:], runs[0][-1:]) <= RELATIVE[torch.float64]


def kept_sizes(case: Case, spec: EdgeSpec) -> list[tuple[int, ...]]:
    """Shapes of what the forward keeps for the backward."""
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        edge_message(*case.inputs, case.weights, case.graph, spec)
    return shapes


@compiled
def test_what_is_kept() -> None:
    """recompute: nothing of E rows but r and f; save: what the products of two linear maps gave more."""
    widths = Widths(6, 8, 7, 5)
    case = random_case(random_graph(20, 150), widths).leaves()
    own = sorted(tuple(t.shape) for t in (*case.inputs, *case.weights) if t is not None)
    assert sorted(s for s in kept_sizes(case, EdgeSpec()) if 0 not in s) == own
    kept = [s for s in kept_sizes(case, EdgeSpec(memory="save")) if 0 not in s]
    assert sorted(kept) == sorted([*own, (150, 7), (150, 5)])
    with torch.no_grad():
        assert kept_sizes(case, EdgeSpec(memory="save")) == []
    of_reference: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: of_reference.append(tuple(t.shape)), lambda t: t):  # type: ignore[func-returns-value,arg-type,return-value]
        edge_reference.edge_message(*case.inputs, case.weights, case.graph, EdgeSpec())
    assert sum(s[0] == 150 and len(s) == 2 and s[1] > 3 for s in of_reference) > 3, "the check sees them"


class Recorder:
    """The compiled operations, and whether each backward was asked for gradients of (r or f), of weights."""

    def __init__(self) -> None:
        self.wanted: list[tuple[bool, bool]] = []

    def __getattr__(self, name: str) -> Any:
        if name == "edge_message_backward":
            return self._backward
        return getattr(torch.ops.megagnn, name)

    def _backward(self, *arguments: Any) -> Any:
        self.wanted.append(arguments[-3:-1])
        return torch.ops.megagnn.edge_message_backward(*arguments)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(MODULE, "_OPS", recorder)
    return recorder


@compiled
@pytest.mark.parametrize("create_graph", [False, True])
def test_only_the_gradients_that_are_asked_for_are_computed(recorder: Recorder, create_graph: bool) -> None:
    case = random_case().leaves()
    p_NH, _, r_E3, f_E = case.inputs
    weights = present(case.weights[1:])
    x_N3 = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    graph = case.graph
    vectors_E3 = x_N3[graph.source.index] - x_N3[graph.destination.index] + r_E3

    outputs = edge_message(p_NH, case.inputs[1], vectors_E3, f_E, case.weights, graph, EdgeSpec())
    loss = waves(outputs)
    for leaves, geometry, of_weights in (
        ([x_N3], True, False),  # forces
        ([f_E], True, False),
        ([p_NH], False, False),
        (weights, False, True),
        ([weights[2]], False, True),
        ([x_N3, weights[0]], True, True),
    ):
        got = torch.autograd.grad(loss, leaves, retain_graph=True, create_graph=create_graph)  # type: ignore[arg-type]
        assert recorder.wanted.pop() == (geometry, of_weights)
        all_leaves = [x_N3, *case.differentiable()]
        everything = torch.autograd.grad(loss, all_leaves, retain_graph=True)
        assert recorder.wanted.pop() == (True, True)
        of_all = dict(zip(map(id, all_leaves), everything, strict=True))
        assert all(torch.equal(t, of_all[id(leaf)]) for t, leaf in zip(got, leaves, strict=True))
    loss.backward(inputs=[x_N3], retain_graph=True)
    loss.backward()
    assert recorder.wanted == [(True, False), (True, True)]
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@compiled
def test_inputs_without_gradients_cost_nothing(recorder: Recorder) -> None:
    case = random_case()
    for k, (geometry, of_weights) in enumerate(
        ((False, False), (False, False), (True, False), (True, False))
    ):
        inputs: Any = [t.clone().requires_grad_() if k == j else t for j, t in enumerate(case.inputs)]  # type: ignore[union-attr]
        waves(edge_message(*inputs, case.weights, case.graph, EdgeSpec())).backward()
        assert inputs[k].grad is not None
        assert recorder.wanted.pop() == (geometry, of_weights)


@compiled
def test_force_training_step(recorder: Recorder) -> None:
    """Forces without the weights' gradients, then one call for all second derivatives."""
    case = random_case().leaves()
    outputs = edge_message(*case.inputs, case.weights, case.graph, EdgeSpec())
    (forces,) = torch.autograd.grad(waves(outputs), case.inputs[2], create_graph=True)
    assert recorder.wanted == [(True, False)]
    waves([forces, *outputs]).backward()
    assert len(recorder.wanted) == 3, "the pair's backward, and the operation's own"
    assert all(t.grad is not None for t in case.differentiable())


@compiled
def test_centres_are_constants() -> None:
    """Bessel frequencies get no gradient; that is said, not zero."""
    case = random_case()
    centres = case.weights[0]
    assert centres is not None
    weights = case.weights._replace(centres_R=centres.clone().requires_grad_())
    outputs = edge_message(*case.inputs, weights, case.graph, EdgeSpec())
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        torch.autograd.grad(waves(outputs), weights.centres_R)


def test_compiled_graphs_take_the_reference() -> None:
    """torch.compile knows nothing of the kernels; what it makes of the reference is the same function."""
    case = random_case()

    def energy(p_NH: Tensor, q_NH: Tensor, r_E3: Tensor, f_E: Tensor | None) -> Tensor:
        sums, vectors = edge_message(p_NH, q_NH, r_E3, f_E, case.weights, case.graph, EdgeSpec())
        assert vectors is not None
        return sums.sin().sum() + vectors.sin().sum()

    inputs = [None if t is None else t.clone().requires_grad_() for t in case.inputs]
    leaves = present(inputs)
    gradients = []
    for function in (torch.compile(energy, backend="aot_eager"), energy):
        gradients.append(torch.autograd.grad(function(*inputs), leaves))
    assert largest_error(*gradients) < 10 * RELATIVE[torch.float64]
