"""Schedules of random size and cost: proved, simulated, and held against what must be true of any."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagnn.pipeline_parallel.actions import Action, Schedule, needs
from megagnn.pipeline_parallel.schedules.conservative import conservative
from megagnn.pipeline_parallel.simulate import CONSERVATIVE, Costs, kept, simulate
from megagnn.pipeline_parallel.validate import ScheduleError, to_text, validate
from tests.pipeline_parallel.schedules import from_text, random_costs, schedules

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


@SETTINGS
@given(schedules())
def test_no_schedule_deadlocks_or_leaks(schedule: Schedule) -> None:
    validate(schedule)
    assert from_text(to_text(schedule)) == schedule
    assert simulate(schedule).finished
    for course in kept(schedule):
        assert min(course) >= 0
        assert course[-1] == 0


@SETTINGS
@given(st.data())
def test_every_action_starts_when_it_can(data: st.DataObject) -> None:
    """Not before what it needs has arrived, and not later than that or the end of the rank's last action."""
    schedule = data.draw(schedules())
    costs = random_costs(data.draw, schedule)
    found = simulate(schedule, costs)
    end = {event.action.result: event.end for event in found.events}
    before = [0.0] * schedule.num_ranks
    for event in sorted(found.events, key=lambda e: schedule.rows[e.rank].index(e.action)):
        arrivals = [before[event.rank]]
        for need in needs(event.action, schedule.num_stages, schedule.conservative):
            away = schedule.placement[need.stage] != event.rank
            arrivals.append(end[need] + (costs.flight(need.micro_batch) if away else 0))
        assert event.start == max(arrivals)
        assert event.end == event.start + costs.duration(event.action)
        before[event.rank] = event.end
    work = sum(costs.duration(action) for _, _, action in schedule.actions())
    assert found.bubble == pytest.approx(1 - work / (schedule.num_ranks * found.makespan), abs=1e-9)


@SETTINGS
@given(st.data())
def test_schedules_planned_with_uneven_costs_are_sound(data: st.DataObject) -> None:
    """Unequal stages, micro-batches and messages, little memory, few graphs."""
    p, m = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 10))
    size = st.floats(0.1, 4)
    costs = Costs(
        CONSERVATIVE,
        stage=data.draw(st.lists(size, min_size=p, max_size=p)),
        micro_batch=data.draw(st.lists(size, min_size=m, max_size=m)),
        latency=data.draw(st.floats(0, 2)),
    )
    memory, graphs = data.draw(st.integers(3, 3 * p + 3)), data.draw(st.integers(1, 3 * p))
    split = data.draw(st.booleans())
    validate(conservative(p, m, split=split, costs=costs, memory=memory, graphs=graphs), memory=memory)


@SETTINGS
@given(st.data())
def test_a_random_swap_is_caught_or_harmless(data: st.DataObject) -> None:
    """What the validator lets pass finishes in the simulator, and what it calls a deadlock does not."""
    schedule = data.draw(schedules())
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    row = list(schedule.rows[rank])
    i, j = (data.draw(st.integers(0, len(row) - 1)) for _ in range(2))
    row[i], row[j] = row[j], row[i]
    rows: list[tuple[Action, ...]] = list(schedule.rows)
    rows[rank] = tuple(row)
    swapped = Schedule("swapped", schedule.placement, schedule.num_micro_batches, tuple(rows))
    rule = "sound"
    try:
        validate(swapped)
    except ScheduleError as error:
        rule = error.rule
    assert rule in ("sound", "order", "channel", "deadlock")
    if rule != "channel":
        assert simulate(swapped).finished == (rule == "sound")


@given(st.integers(1, 6), st.integers(1, 6))
@SETTINGS
def test_costs_of_the_wrong_number(p: int, m: int) -> None:
    schedule = conservative(p, m)
    with pytest.raises(ValueError, match=f"{m + 1} micro-batch costs for a schedule of {m}; give one for"):
        simulate(schedule, Costs(CONSERVATIVE, micro_batch=[1.0] * (m + 1)))
