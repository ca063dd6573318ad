"""Graphs at the edge of what there is, and misuse of the edge operation: the error, and no bad read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megagnn.models.egnn.edge import EdgeGraph, EdgeSpec, EdgeWeights, edge_message, edge_message_pair
from megagnn.models.egnn.edge import reference as edge_reference
from megagnn.ops import Segments, extension
from tests.models.egnn.edge_cases import (
    MODULE,
    Case,
    first_order,
    graph_of,
    largest_error,
    random_case,
    random_graph,
    second_order,
    tangents_of,
)
from tests.tolerances import RELATIVE

compiled = pytest.mark.skipif(extension.module is None, reason="the extension is not built")
ZEROS = torch.zeros(90, dtype=torch.int64)
ATOMS = torch.arange(90) % 30
GRAPHS = {
    "isolated_atoms": graph_of(torch.tensor([2, 2, 5]), torch.tensor([5, 7, 2]), 9),
    "one_giant_row": graph_of(ZEROS + 4, ATOMS, 30),
    "giant_row_between_small_ones": graph_of(
        torch.cat([ZEROS[:3], ZEROS[:80] + 1, ZEROS[:7] + 2]), ATOMS, 30
    ),
    "one_source": graph_of(ATOMS.sort().values, ZEROS + 7, 30),
    "edges_to_themselves": graph_of(ATOMS.sort().values, ATOMS.sort().values, 30),
    "last_atoms_alone": graph_of(ATOMS.sort().values, ATOMS, 40),
    "one_edge": graph_of(torch.tensor([1]), torch.tensor([0]), 2),
}


@pytest.fixture(autouse=True)
def two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small cases are shared out to two workers, which one thread runs one after the other."""
    monkeypatch.setattr(MODULE, "_WORKER_FLOPS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.mark.parametrize("block_edges", [1, 16, 100])
@pytest.mark.parametrize("name", GRAPHS)
def test_against_reference(name: str, block_edges: int) -> None:
    case = random_case(GRAPHS[name], seed=1)
    for memory in ("recompute", "save"):
        spec = EdgeSpec(block_edges=block_edges, memory=memory)  # type: ignore[arg-type]
        for order in (first_order, second_order):
            got, want = order(edge_message, case, spec), order(edge_reference.edge_message, case, spec)
            assert largest_error(got, want) <= 30 * RELATIVE[torch.float64]


@pytest.mark.parametrize("vector", [True, False])
@pytest.mark.parametrize("num_atoms", [0, 5])
def test_no_edges(num_atoms: int, vector: bool) -> None:
    """All is zero and has its shape, the derivatives as well; the envelope's is there and empty."""
    none = torch.empty(0, dtype=torch.int64)
    case = random_case(graph_of(none, none, num_atoms), vector=vector)
    for memory in ("recompute", "save"):
        spec = EdgeSpec(memory=memory)  # type: ignore[arg-type]
        for order in (first_order, second_order):
            got, want = order(edge_message, case, spec), order(edge_reference.edge_message, case, spec)
            assert [t.shape for t in got] == [t.shape for t in want]
            assert all((t == 0).all() for t in got)
        values = case.inputs
        pair = edge_message_pair(values, tangents_of(case), case.weights, case.graph, spec)
        assert pair.sum_tangent_NM.shape == (num_atoms, 8)


def test_coincident_atoms() -> None:
    """r = 0 on some edges, and on all: finite to second order, and the reference's numbers."""
    for rows in (slice(0, 40, 7), slice(None)):
        for feature in ("bessel", "gaussian", "distance", "squared"):
            case = random_case(random_graph(10, 40), seed=2, feature=feature)
            case.inputs[2][rows] = 0.0
            for direction in ("unit", "vector", "plus_one"):
                spec = EdgeSpec(feature=feature, direction=direction)  # type: ignore[arg-type]
                for order in (first_order, second_order):
                    got = order(edge_message, case, spec)
                    assert all(t.isfinite().all() for t in got)
                    want = order(edge_reference.edge_message, case, spec)
                    # Derivatives in r are 1/epsilon = 1000 times what they are made of.
                    got, want = [t for t in got if t.abs().max() > 0], [t for t in want if t.abs().max() > 0]
                    assert largest_error(got, want) <= 1e4 * RELATIVE[torch.float64]


def test_structures_of_a_batch_do_not_see_one_another() -> None:
    """Two structures in one batch give what each gives alone; so do both of them in the other order."""
    whole = random_case(random_graph(), seed=4)
    again = replace(random_case(random_graph(12, 60, seed=9), seed=8), weights=whole.weights)
    spec = EdgeSpec(block_edges=16)
    alone = [edge_message(*c.inputs, c.weights, c.graph, spec) for c in (whole, again)]
    for cases in ((whole, again), (again, whole)):
        first, second = cases
        shift = first.graph.destination.num_rows
        graph = graph_of(
            torch.cat([first.graph.destination.index, second.graph.destination.index + shift]),
            torch.cat([first.graph.source.index, second.graph.source.index + shift]),
            shift + second.graph.destination.num_rows,
        )
        inputs: Any = [torch.cat(pair) for pair in zip(first.inputs, second.inputs, strict=True)]
        both = edge_message(*inputs, whole.weights, graph, spec)
        order = (0, 1) if first is whole else (1, 0)
        for k in (0, 1):
            want = torch.cat([alone[order[0]][k], alone[order[1]][k]])  # type: ignore[list-item]
            assert largest_error([both[k]], [want]) <= RELATIVE[torch.float64]  # type: ignore[list-item]


@compiled
def test_not_contiguous() -> None:
    case = random_case()
    p_NH, q_NH, r_E3, f_E = case.inputs
    assert f_E is not None
    inputs = (p_NH.t().contiguous().t(), torch.stack([q_NH, q_NH], 1)[:, 0], r_E3.flip(1).flip(1))
    f_E = torch.stack([f_E, f_E], 1)[:, 1]
    weights = case.weights._replace(w2_MH=case.weights.w2_MH.t().contiguous().t())
    strided = replace(case, inputs=(inputs[0], inputs[1], r_E3.t().contiguous().t(), f_E), weights=weights)
    assert not any(t.is_contiguous() for t in (*strided.inputs, weights.w2_MH) if t is not None)
    for order in (first_order, second_order):
        got, want = order(edge_message, strided, EdgeSpec()), order(edge_message, case, EdgeSpec())
        assert all(map(torch.equal, got, want))


def test_more_sources_than_destinations() -> None:
    """Atoms of other ranks, whose features arrive from there, only send."""
    case, index = random_case(), torch.randint(0, 33, (150,), generator=torch.Generator().manual_seed(0))
    graph = replace(case.graph, source=graph_of(index, index, 33).source)
    q_NH = torch.randn(33, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    case = Case((case.inputs[0], q_NH, *case.inputs[2:]), case.weights, graph)
    for order in (first_order, second_order):
        got = order(edge_message, case, EdgeSpec(block_edges=16))
        want = order(edge_reference.edge_message, case, EdgeSpec())
        assert largest_error(got, want) <= 30 * RELATIVE[torch.float64]


@compiled
@pytest.mark.parametrize(
    ("destination", "message"),
    [
        (Segments(torch.tensor([1, 0]), torch.tensor([0, 1, 2])), "sorted by destination, got 1 in row 0"),
        (Segments(torch.tensor([0, 1]), torch.tensor([0, 2, 2])), "sorted by destination, got 1 in row 0"),
        (
            Segments(torch.tensor([0, 1]), torch.tensor([0, 1, 3])),
            "ptr must rise from 0 to the number of edges, 2, got 0 to 3",
        ),
        (Segments(torch.tensor([0, 1]), torch.tensor([1, 1, 2])), "number of edges, 2, got 1 to 2"),
        (Segments(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 3])), "number of edges, 3"),
    ],
)
def test_destinations_that_do_not_fit(destination: Segments, message: str) -> None:
    source = Segments(torch.tensor([0, 1]), torch.tensor([0, 1, 2]))
    case = random_case(graph_of(source.index, source.index, 2))
    with pytest.raises(RuntimeError, match=r"edge_plan \(cpu\): .*" + message):
        edge_message(*case.inputs, case.weights, EdgeGraph(destination, source), EdgeSpec())


@compiled
def test_falling_ptr() -> None:
    index = torch.tensor([0, 0, 2])
    graph = EdgeGraph(
        Segments(index, torch.tensor([0, 2, 1, 3])), Segments(index, torch.tensor([0, 2, 2, 3]))
    )
    case = random_case(graph_of(index, index, 3))
    with pytest.raises(RuntimeError, match=r"edge_plan \(cpu\): ptr must rise, got 2 before 1"):
        edge_message(*case.inputs, case.weights, graph, EdgeSpec())


@compiled
def test_destinations_with_a_perm() -> None:
    graph = random_graph()
    unsorted = EdgeGraph(graph.source, graph.destination)
    case = random_case(graph)
    with pytest.raises(ValueError, match="edges must be sorted by destination, got destination segments"):
        edge_message(*case.inputs, case.weights, unsorted, EdgeSpec())


@compiled
@pytest.mark.parametrize("wrong", [-1, 20, 2**62])
def test_source_out_of_range(wrong: int) -> None:
    case = random_case()
    index = case.graph.source.index.clone()
    index[17] = wrong
    graph = replace(case.graph, source=replace(case.graph.source, index=index))
    with pytest.raises(RuntimeError, match=rf"sources must lie in \[0, 20\), got {wrong}"):
        edge_message(*case.inputs, case.weights, graph, EdgeSpec())


@compiled
@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("num_rows", [0, 19, 21])
def test_one_row_per_atom(position: int, num_rows: int) -> None:
    """The kernels would write past the end of the sums."""
    case, name = random_case(), "pq"[position]
    inputs: Any = list(case.inputs)
    inputs[position] = torch.zeros(num_rows, 8, dtype=torch.float64)
    message = rf"{name} must be a matrix of one row per atom of the graph, 20, got shape \({num_rows}, 8\)"
    with pytest.raises(ValueError, match=r"edge_message \(compiled\): " + message):
        edge_message(*inputs, case.weights, case.graph, EdgeSpec())


INPUTS = {"p": 0, "q": 1, "r": 2, "f": 3}
WEIGHTS = {"centres": 0, "w1c": 1, "w2": 2, "b2": 3, "w3": 4, "b3": 5, "w4": 6, "b4": 7}


@compiled
@pytest.mark.parametrize("name", [*list(INPUTS)[1:], *list(WEIGHTS)])
def test_wrong_type(name: str) -> None:
    """The type is that of p or, of what belongs to edges, of r, which must not be narrower."""
    case = random_case()
    inputs: Any = [t.float() if k == INPUTS.get(name) else t for k, t in enumerate(case.inputs)]  # type: ignore[union-attr]
    weights = EdgeWeights(
        *[t.float() if k == WEIGHTS.get(name) else t for k, t in enumerate(case.weights)]  # type: ignore[union-attr,arg-type]
    )
    message = rf"edge_message \(compiled\): {name} must have the type of .*float64.* got .*float32"
    with pytest.raises(RuntimeError, match=message):
        edge_message(*inputs, weights, case.graph, EdgeSpec())


@compiled
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (20, 7), r"q must have shape \(20, 8\) .* got \(20, 7\)"),
        ("r", (149, 3), r"r must have shape \(150, 3\) .* got \(149, 3\)"),
        ("r", (150, 2), r"r must have shape \(150, 3\) .* got \(150, 2\)"),
        ("f", (149,), r"f must have shape \(150\) .* got \(149\)"),
        ("f", (150, 1), r"f must have shape \(150\) .* got \(150, 1\)"),
        ("centres", (5,), r"centres must have shape \(6\) .* got \(5\)"),
        ("w1c", (7, 6), r"w1c must have shape \(8, 6\) .* got \(7, 6\)"),
        ("w1c", (8,), "p, w1c and w2 must be matrices, got 2, 1 and 2 dimensions"),
        ("w2", (8, 7), r"w2 must have shape \(8, 8\) .* got \(8, 7\)"),
        ("b2", (7,), r"b2 must have shape \(8\) .* got \(7\)"),
        ("w3", (8, 7), r"w3 must have shape \(8, 8\) .* got \(8, 7\)"),
        ("b3", (7,), r"b3 must have shape \(8\) .* got \(7\)"),
        ("w4", (7,), r"w4 must have shape \(8\) .* got \(7\)"),
        pytest.param("b4", (2,), r"b4 must have shape \(1\)"),
    ],
)
def test_wrong_shape(name: str, shape: tuple[int, ...], message: str) -> None:
    case = random_case()
    inputs: Any = list(case.inputs)
    weights: Any = list(case.weights)
    wrong = torch.zeros(shape, dtype=torch.float64)
    if name in INPUTS:
        inputs[INPUTS[name]] = wrong
    else:
        weights[WEIGHTS[name]] = wrong
    with pytest.raises(RuntimeError, match=r"edge_message \(compiled\): " + message):
        edge_message(*inputs, EdgeWeights(*weights), case.graph, EdgeSpec())


@compiled
def test_parts_that_are_missing() -> None:
    case = random_case()
    for name, message in (("w4_K", "w4 must have shape"), ("b3_K", "b3 must have shape")):
        with pytest.raises(RuntimeError, match=rf"edge_message \(compiled\): {message}"):
            edge_message(*case.inputs, case.weights._replace(**{name: None}), case.graph, EdgeSpec())
    with pytest.raises(RuntimeError, match=r"centres must have shape \(6\)"):
        edge_message(*case.inputs, case.weights._replace(centres_R=None), case.graph, EdgeSpec())
    with pytest.raises(RuntimeError, match="w1c must have one column for a distance as feature, got 6"):
        edge_message(*case.inputs, case.weights, case.graph, EdgeSpec(feature="distance"))


@compiled
def test_tangents_that_do_not_fit() -> None:
    case = random_case()
    p_NH, q_NH, r_E3, f_E = tangents_of(case)
    assert f_E is not None
    wrong: Any = {
        "p_tangent": (p_NH[:, 1:], q_NH, r_E3, f_E),
        "q_tangent": (p_NH, q_NH[1:], r_E3, f_E),
        "r_tangent": (p_NH, q_NH, r_E3[1:], f_E),
        "f_tangent": (p_NH, q_NH, r_E3, f_E[1:]),
    }
    for name, tangents in wrong.items():
        with pytest.raises(RuntimeError, match=rf"edge_message \(compiled\): {name} must have shape"):
            edge_message_pair(case.inputs, tangents, case.weights, case.graph, EdgeSpec())


def test_tangent_of_an_absent_envelope() -> None:
    """The kernels would use it, and the reference would not."""
    case, tangents = random_case(envelope=False), tangents_of(random_case())
    with pytest.raises(
        ValueError, match="an absent envelope has no tangent, got one; pass an envelope of on"
    ):
        edge_message_pair(case.inputs, tangents, case.weights, case.graph, EdgeSpec())


@compiled
def test_blocks_without_edges() -> None:
    case = random_case()
    with pytest.raises(
        RuntimeError, match=r"edge_plan \(cpu\): block_edges and max_workers must be positive"
    ):
        edge_message(*case.inputs, case.weights, case.graph, EdgeSpec(block_edges=-3))
