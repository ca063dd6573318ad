"""Plans of the edge operation that come with a batch."""

import pickle

import pytest
import torch

from megagnn.data.batch import batch_from_atoms
from megagnn.data.parcel import Parcel
from megagnn.models.egnn.config import EGNNConfig
from megagnn.models.egnn.edge import types
from megagnn.models.egnn.edge.ahead import EdgePlanner, edge_graph
from megagnn.models.potential import Potential, build_potential
from megagnn.ops import extension
from tests.models.physics import STATISTICS

pytestmark = pytest.mark.skipif(not extension.has_cpu, reason="the plan is of the compiled operation")


def potential(forces: str = "conservative", **options: object) -> Potential:
    config = EGNNConfig(width=8, num_layers=2, num_radial=4, cutoff=4.0, forces=forces, **options)  # type: ignore[arg-type]
    return build_potential(config, STATISTICS)


def batch() -> dict[str, torch.Tensor]:
    from ase.build import bulk, molecule

    elements = set(STATISTICS.elements)
    given = [molecule("H2O"), bulk("Cu", cubic=True)]
    for atoms in given:
        atoms.numbers[:] = sorted(elements)[0]
    return batch_from_atoms(given, 4.0, torch.float32)


@pytest.mark.parametrize("forces", ["direct", "conservative"])
def test_steps_take_what_the_batch_brings(forces: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All plans of a step on values and pairs, to the bits of those that the step makes."""
    made, given = potential(forces), batch()
    planner = pickle.loads(pickle.dumps(made.model.planner()))
    assert isinstance(planner, EdgePlanner)
    brought = Parcel.of({**given, **planner(given)}, narrow=True).batch(torch.device("cpu"))

    def outputs(of: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        predicted = made(of)
        found = [predicted["energy"], predicted["forces"]]
        if forces == "conservative":
            tangents = made.directional(of, torch.ones_like(of["positions"]), None)
            found += [tangents["energy"].value, tangents["energy"].tangent]
        return [x.detach() for x in found]

    expected = outputs(given)
    calls: list[object] = []
    original = types.EdgeGraph._make
    monkeypatch.setattr(types.EdgeGraph, "_make", lambda *a: calls.append(a) or original(*a))
    found = outputs(brought)
    assert not calls, "no plan was made"
    outputs(given)
    assert len(calls) == (2 if forces == "conservative" else 1)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


def test_of_a_gpu_it_has_the_runs_of_blocks() -> None:
    given = batch()
    planner = EdgePlanner((8, 8), 4, 16, (2,), on_cpu=False, on_threads=1)
    graph = edge_graph({**given, **planner(given)})
    blocks, workers, order, runs, begin = graph.plan(16, 1)
    fresh = edge_graph(given)
    expected = fresh.plan(16, 1, with_runs=True)
    for a, b in zip((blocks, workers, order, runs, begin), expected, strict=True):
        assert torch.equal(a, b)
    assert len(order) == fresh.destination.num_entries
    assert len(runs) == len(blocks) // 4 + 1 > 3


def test_who_has_nothing_to_plan_says_so() -> None:
    assert potential(edge_operation="unfused").model.planner() is None
