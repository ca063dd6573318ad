from __future__ import annotations

import pytest

from megagnn.pipeline_parallel.schedules.conservative import conservative, open_graphs, two_pass
from megagnn.pipeline_parallel.simulate import (
    CONSERVATIVE,
    CREATE_GRAPH,
    RECOMPUTED,
    Costs,
    peaks,
    simulate,
)
from megagnn.pipeline_parallel.validate import validate

SIZES = [(1, 3), (2, 4), (2, 16), (3, 7), (4, 8), (4, 9), (4, 32), (8, 16), (8, 40)]


@pytest.mark.parametrize(("p", "m"), [*SIZES, (2, 1), (4, 2), (8, 8)])
def test_two_flushed_passes(p: int, m: int) -> None:
    """Two 1F1B one after the other: 8 (m + p-1) units, the bubble of one."""
    found = simulate(two_pass(p, m))
    assert found.makespan == 8 * (m + p - 1)
    assert found.bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
    assert simulate(two_pass(p, m), Costs(CREATE_GRAPH)).makespan == 6 * (m + p - 1)


@pytest.mark.parametrize("phase", [CONSERVATIVE, RECOMPUTED, CREATE_GRAPH])
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_whole_backward_is_as_short_as_can_be(p: int, m: int, phase: dict) -> None:  # type: ignore[type-arg]
    """The last rank starts after p-1 f, works on everything, and its last B climbs p-1 stages."""
    costs = Costs(phase)
    schedule = conservative(p, m, costs=costs)
    validate(schedule, memory=3 * p)
    period = sum(phase[kind] for kind in "fbFB")
    assert simulate(schedule, costs).makespan == period * m + (p - 1) * (phase["f"] + phase["B"])
    assert open_graphs(schedule) <= 2 * p


@pytest.mark.parametrize(("p", "m"), [(2, 16), (4, 32), (8, 40)])
def test_steady_state_alternates(p: int, m: int) -> None:
    """In the middle every rank runs f b F B in turn, as 1F1B runs F B."""
    for rank, row in enumerate(conservative(p, m).rows):
        kinds = "".join(action.kind for action in row if action.kind != "R")
        assert "fbFB" * (m - 3 * p) in kinds, rank


@pytest.mark.parametrize(("p", "m"), [(2, 8), (4, 16), (8, 32)])
def test_memory_of_two_passes_suffices(p: int, m: int) -> None:
    """With all graphs in memory the same length needs no more activations than 1F1B on pairs keeps."""
    schedule = conservative(p, m, memory=2 * p, graphs=m)
    validate(schedule, memory=2 * p)
    assert max(peaks(schedule)) == max(peaks(two_pass(p, m))) == 2 * p
    assert simulate(schedule).makespan == 8 * m + 5 * (p - 1)


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 4), (2, 16), (4, 8), (4, 32), (8, 64)])
def test_split_backward_leaves_little_idle(p: int, m: int) -> None:
    """At least p-1 units idle on the last rank; at most one more a rank is found here."""
    schedule = conservative(p, m, split=True)
    validate(schedule, memory=3 * p)
    idle = simulate(schedule).makespan - 8 * m
    assert p - 1 <= idle <= 2 * (p - 1)
    assert open_graphs(schedule) <= 3 * p


def test_it_is_the_same_every_time() -> None:
    assert conservative(4, 12, split=True) == conservative(4, 12, split=True)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="3 activations, and one graph, got a memory of 2 and 12 graphs"):
        conservative(4, 8, memory=2)
    with pytest.raises(ValueError, match="3 stage costs for a schedule of 4; give one for each, or none"):
        conservative(4, 8, costs=Costs(CONSERVATIVE, stage=[1, 1, 1]))
    with pytest.raises(ValueError, match="at least 1 of its ranks, got 0"):
        conservative(0, 8)
