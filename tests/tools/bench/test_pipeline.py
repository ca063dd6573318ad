"""What the tool measures, on timelines of which the answer is known."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megagnn.pipeline_parallel.actions import Action
from megagnn.pipeline_parallel.simulate import CONSERVATIVE, ORDINARY, Costs, Event, bubble_of, simulate
from tools.bench import pipeline as bench_pipeline


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "conservative"])
def test_a_simulated_timeline_has_the_simulated_bubble(name: str) -> None:
    """Also where every action takes a time of its own, and whenever the clock began."""
    schedule = bench_pipeline.schedule_of(name, 4, 8)
    phase = CONSERVATIVE if schedule.conservative else ORDINARY
    found = simulate(schedule, Costs(phase, micro_batch=(1, 2, 1, 3, 1, 1, 2, 1), stage=(1, 2, 1, 1)))
    events = [e._replace(start=e.start + 7, end=e.end + 7) for e in found.events]
    assert bubble_of(events, 4) == pytest.approx(found.bubble)
    again = simulate(schedule, bench_pipeline.MeasuredCosts(events))
    assert again.makespan == pytest.approx(found.makespan)


def test_bubble_of_a_literal_timeline() -> None:
    events = [Event(0, Action(0, "F", 0), 1.0, 2.0), Event(1, Action(1, "F", 0), 2.0, 3.0)]
    assert bubble_of(events, 2) == 0.5
    assert bench_pipeline.mean_of("F", events) == 1.0
    assert bench_pipeline.kinds_of(events) == ["F"]


def test_a_line() -> None:
    schedule = bench_pipeline.schedule_of("1f1b", 2, 2)
    runs = [list(simulate(schedule).events)] * 3
    line = bench_pipeline.report("1f1b", 2, schedule, runs, slept=False)
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        *["1f1b", "2", "2", "33.3", "33.3", "+0.0", "33.3 to 33.3", "9.000"],
        "F 1000.0 B 2000.0",
    ]


def test_what_layers_cost() -> None:
    arguments = Namespace(edges=500, width=8, layers=5, ranks=[2])
    rows = [line.split("|")[1:-1] for line in bench_pipeline.layer_table(arguments).splitlines()[2:]]
    assert [row[0].strip() for row in rows] == ["direct"] * 2 + ["conservative"] * 2
    for row in rows:
        shares = [float(share) for share in row[2].split()]
        assert len(shares) == 5
        assert shares[1:-1] == [1.0] * 3
        assert sum(int(size) for size in row[3].split("+")) == 5
