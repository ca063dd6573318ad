from __future__ import annotations

import pytest

from megagnn.pipeline_parallel.actions import Action, Receive, Schedule, Send, lower
from megagnn.pipeline_parallel.registry import registered
from megagnn.pipeline_parallel.schedules.conservative import conservative, two_pass
from megagnn.pipeline_parallel.schedules.ordinary import gpipe, interleaved, one_f_one_b, zb_h1
from megagnn.pipeline_parallel.simulate import ORDINARY, Costs, peaks, simulate
from megagnn.pipeline_parallel.validate import Semantics, by_step, find_deadlock, to_text, validate
from tests.pipeline_parallel.schedules import from_text, make

SIZES = [(1, 1), (1, 5), (2, 1), (2, 2), (3, 7), (4, 4), (4, 8), (8, 8), (8, 20)]


def holds(schedule: Schedule, semantics: Semantics) -> bool:
    """Whether a (proved) schedule runs to its end under other semantics."""
    return not find_deadlock(schedule, lower(schedule), semantics)


def row(schedule: Schedule, rank: int) -> str:
    return " ".join(map(str, schedule.rows[rank]))


def test_rows_at_small_sizes() -> None:
    assert row(gpipe(2, 2), 0) == "0F0 0F1 0B1 0B0"
    assert row(one_f_one_b(3, 4), 0) == "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3"
    assert row(one_f_one_b(3, 4), 2) == "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3"
    assert row(zb_h1(3, 3), 2) == "2F0 2I0 2F1 2I1 2F2 2I2 2W0 2W1 2W2"
    assert row(zb_h1(3, 4), 0) == "0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3"
    assert row(interleaved(2, 4), 0) == "0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3"
    assert row(interleaved(2, 2), 1) == "1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1"


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_bubble_of_flushed_schedules(p: int, m: int) -> None:
    """(p-1)/(m+p-1), whatever forward and backward cost."""
    for build in (gpipe, one_f_one_b):
        for backward in (1, 2, 3.5):
            costs = Costs({**ORDINARY, "B": backward})
            assert simulate(build(p, m), costs).bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)


@pytest.mark.parametrize(("p", "rounds", "chunks"), [(1, 3, 2), (2, 1, 2), (2, 4, 3), (4, 2, 2), (8, 3, 4)])
def test_bubble_of_interleaving(p: int, rounds: int, chunks: int) -> None:
    """(p-1)/(v m + p-1)."""
    m = p * rounds
    found = simulate(interleaved(p, m, chunks)).bubble
    assert found == pytest.approx((p - 1) / (chunks * m + p - 1), abs=1e-12)
    assert interleaved(p, m, 1).rows == one_f_one_b(p, m).rows


@pytest.mark.parametrize(("p", "m"), [(p, m) for p, m in SIZES if m >= p])
def test_bubble_of_zb_h1(p: int, m: int) -> None:
    """(p-1)(F+I-W), Qi et al. 2023, table 2; a third of 1F1B's where the three are equal."""
    costs = Costs({**ORDINARY, "F": 1, "I": 1, "W": 1})
    assert simulate(zb_h1(p, m), costs).makespan == 3 * m + (p - 1)
    costs = Costs({**ORDINARY, "F": 3, "I": 3, "W": 2})
    assert simulate(zb_h1(p, m), costs).makespan == 8 * m + (p - 1) * 4


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_memory(p: int, m: int) -> None:
    assert peaks(gpipe(p, m)) == [m] * p
    assert peaks(one_f_one_b(p, m)) == [min(m, p - rank) for rank in range(p)]
    assert max(peaks(zb_h1(p, m))) == min(m, p)


def test_memory_of_interleaving() -> None:
    """2(p-1-r) + (v-1)p forwards ahead and one more, in chunks."""
    assert peaks(interleaved(4, 8, 2)) == [11, 9, 7, 5]
    assert peaks(interleaved(4, 16, 3)) == [15, 13, 11, 9]


@pytest.mark.parametrize("name", sorted(registered()))
def test_grid_and_back(name: str) -> None:
    schedule = make(name, 3, 7)
    for cells in (None, by_step(schedule)):
        assert from_text(to_text(schedule, cells)) == schedule


def test_the_grid_that_is_printed() -> None:
    lines = to_text(one_f_one_b(2, 2), mark=1).splitlines()
    assert lines[0] == "schedule 1f1b: 2 ranks, 2 micro-batches, stages on ranks 0 1"
    assert [line.split() for line in lines[1:]] == [
        ["step", "0", "1"],
        ["0", "0F0", "."],
        [">", "1", "0F1", "1F0"],
        ["2", ".", "1B0"],
        ["3", "0B0", "1F1"],
        ["4", ".", "1B1"],
        ["5", "0B1", "."],
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "begins with 'schedule NAME"),
        ("schedule x: 2 ranks, 1 micro-batches, stages on ranks 0 1\n step 0 1\n 0 0F0", "1 columns for 2"),
        (
            "schedule x: 1 ranks, 1 micro-batches, stages on ranks 0\n step 0\n 0 0Q0",
            "'0Q0' is not an action",
        ),
    ],
)
def test_what_is_no_grid(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_text(text)


def test_messages_around_an_action() -> None:
    program = lower(interleaved(2, 2))
    texts = [str(op.message) if isinstance(op, Send | Receive) else str(op.action) for op in program[0]]
    assert texts[:5] == ["0F0", "F0 from stage 0 to 1", "0F1", "F1 from stage 0 to 1", "F0 from stage 1 to 2"]
    assert not any(isinstance(op, Send | Receive) for op in lower(interleaved(1, 2))[0])


@pytest.mark.parametrize("p", [2, 3, 5])
@pytest.mark.parametrize("m", [4, 9])
def test_which_schedules_need_buffers(p: int, m: int) -> None:
    """GPipe runs with sends that block; 1F1B with those posted together; interleaving with neither."""
    assert holds(gpipe(p, m), "rendezvous")
    for build in (one_f_one_b, zb_h1, two_pass):
        assert holds(build(p, m), "batched")
        assert not holds(build(p, m), "rendezvous")
    assert not holds(interleaved(p, 2 * p), "rendezvous")
    assert not holds(conservative(p, m), "rendezvous")


def test_some_need_buffers_even_so() -> None:
    assert not holds(interleaved(4, 8), "batched")
    assert not holds(conservative(4, 32), "batched")
    validate(interleaved(4, 8))
    validate(conservative(4, 32))


def test_actions_print_and_parse() -> None:
    assert str(Action(1, "F", 12)) == "1F12"
    assert Action.parse("1F12") == Action(1, "F", 12)
    for text in ("F12", "1F", "1X2", "1F2 ", "-1F2"):
        with pytest.raises(ValueError, match="is not an action; write stage"):
            Action.parse(text)


def test_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 of its micro-batches, got 0"):
        one_f_one_b(2, 0)
    with pytest.raises(ValueError, match=r"over 4 pipeline ranks does not take 6 micro-batches .*; use 8"):
        interleaved(4, 6)
