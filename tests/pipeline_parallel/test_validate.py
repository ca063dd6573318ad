"""Planted mistakes: each rule is broken once, and the error names where."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megagnn.pipeline_parallel.actions import Action, Receive, Schedule, Send, lower
from megagnn.pipeline_parallel.registry import registered
from megagnn.pipeline_parallel.schedules.conservative import conservative
from megagnn.pipeline_parallel.schedules.ordinary import gpipe, interleaved, one_f_one_b, zb_h1
from megagnn.pipeline_parallel.validate import ScheduleError, validate
from tests.pipeline_parallel.schedules import make


def with_row(schedule: Schedule, rank: int, text: str) -> Schedule:
    rows = list(schedule.rows)
    rows[rank] = tuple(map(Action.parse, text.split()))
    return replace(schedule, rows=tuple(rows))


def without(schedule: Schedule, text: str) -> Schedule:
    rows = tuple(tuple(a for a in row if str(a) != text) for row in schedule.rows)
    return replace(schedule, rows=rows)


def broken(schedule: Schedule, **options: object) -> ScheduleError:
    with pytest.raises(ScheduleError) as caught:
        validate(schedule, **options)  # type: ignore[arg-type]
    return caught.value


@pytest.mark.parametrize("name", sorted(registered()))
def test_good_schedules_pass(name: str) -> None:
    validate(make(name, 4, 9))


def test_backward_before_forward() -> None:
    error = broken(with_row(one_f_one_b(2, 2), 1, "1B0 1F0 1F1 1B1"))
    assert (error.rule, error.rank, error.step) == ("order", 1, 0)
    assert "rank 1, step 0, 1B0: order: needs 1F0, which comes at step 1" in str(error)
    marked = [line for line in str(error).splitlines() if line.startswith(">")]
    assert [line.split() for line in marked] == [[">", "0", "0F0", "1B0"]]


def test_forward_twice() -> None:
    error = broken(with_row(one_f_one_b(2, 2), 1, "1F0 1B0 1F0 1F1 1B1"))
    assert (error.rule, error.rank, error.step) == ("once", 1, 2)
    assert "was done at step 0" in str(error)


def test_backward_whole_and_split() -> None:
    error = broken(with_row(one_f_one_b(2, 2), 1, "1F0 1B0 1I0 1F1 1B1"))
    assert (error.rule, error.rank, error.step) == ("once", 1, 2)
    error = broken(with_row(one_f_one_b(2, 2), 1, "1F0 1B0 1W0 1F1 1B1"))
    assert (error.rule, error.step) == ("once", 2)
    assert "B has the weight part already" in str(error)


@pytest.mark.parametrize("text", ["1F1", "1B0"])
def test_action_left_out(text: str) -> None:
    error = broken(without(one_f_one_b(2, 2), text))
    assert (error.rule, error.rank) == ("missing", 1)
    assert f"{text} is not done" in str(error)


def test_weight_part_left_out() -> None:
    assert "2W1 is not done" in str(broken(without(zb_h1(3, 3), "2W1")))


@pytest.mark.parametrize("text", ["0R1", "1b1", "0f0"])
def test_part_of_pass_one_left_out(text: str) -> None:
    assert f"{text} is not done" in str(broken(without(conservative(2, 2), text)))


def test_pairs_before_the_forces() -> None:
    row = "0f0 0f1 0b0 0F0 0R0 0b1 0R1 0F1 0B0 0B1"
    error = broken(with_row(conservative(2, 2), 0, row))
    assert (error.rule, error.step) == ("order", 3)
    assert "0F0: order: needs 0R0, which comes at step 4" in str(error)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("0F0 0B0 1F0", "stage 0 is on rank 0"),
        ("1F0 1F7 1B0", "there are 2 stages and 2 micro-batches"),
        ("1F0 2F0 1B0", "there are 2 stages and 2 micro-batches"),
        ("1R0 1F0", "forces are summed at stage 0"),
    ],
)
def test_action_where_it_does_not_belong(row: str, what: str) -> None:
    error = broken(with_row(one_f_one_b(2, 2), 1, row))
    assert error.rule == "placement"
    assert what in str(error)


def test_receive_left_out() -> None:
    schedule = one_f_one_b(2, 2)
    program = lower(schedule)
    program[1] = [op for op in program[1] if not isinstance(op, Receive)]
    error = broken(schedule, program=program)
    assert (error.rule, error.rank, error.step) == ("message", 0, 0)
    assert "F0 from stage 0 to 1 is never received" in str(error)


def test_send_left_out() -> None:
    schedule = one_f_one_b(2, 2)
    program = lower(schedule)
    program[1] = [op for op in program[1] if not isinstance(op, Send)]
    error = broken(schedule, program=program)
    assert (error.rule, error.rank, error.step) == ("message", 0, 2)
    assert "B0 from stage 1 to 0 is never sent" in str(error)


def test_message_twice_or_on_the_wrong_rank() -> None:
    schedule = one_f_one_b(2, 2)
    program = lower(schedule)
    send = next(op for op in program[0] if isinstance(op, Send))
    program[0].append(send)
    assert "F0 from stage 0 to 1 comes twice" in str(broken(schedule, program=program))
    program = lower(schedule)
    program[1].append(send)
    assert "is between ranks 0 and 1" in str(broken(schedule, program=program))


def test_messages_overtake() -> None:
    """Without tags, F1 would be taken for F0."""
    error = broken(with_row(gpipe(2, 2), 1, "1F1 1F0 1B1 1B0"))
    assert (error.rule, error.rank, error.step) == ("channel", 1, 0)
    assert "waits for F1 from stage 0 to 1, but the next message of its channel is F0" in str(error)


def test_circle() -> None:
    """Rank 1 wants F1 before it gives B0, rank 0 wants B0 before it gives F1."""
    schedule = with_row(one_f_one_b(2, 2), 0, "0F0 0B0 0F1 0B1")
    error = broken(with_row(schedule, 1, "1F0 1F1 1B0 1B1"))
    assert (error.rule, error.rank, error.step) == ("deadlock", 0, 1)
    assert "rank 0 at step 1 receives B0 from stage 1 to 0" in str(error)
    assert "rank 1 at step 1 receives F1 from stage 0 to 1" in str(error)


def test_circle_over_chunks() -> None:
    """Rank 0 waits for what its own later action makes, by way of rank 1; messages keep their order."""
    schedule = with_row(interleaved(2, 2), 0, "0F0 2F0 2F1 0F1 2B0 2B1 0B0 0B1")
    error = broken(with_row(schedule, 1, "1F0 3F0 3F1 1F1 3B0 3B1 1B0 1B1"))
    assert (error.rule, error.rank, error.step) == ("deadlock", 0, 2)
    assert "rank 0 at step 2 receives F1 from stage 1 to 2" in str(error)


def test_sends_that_block() -> None:
    error = broken(one_f_one_b(2, 3), semantics="rendezvous")
    assert error.rule == "deadlock"
    assert "with rendezvous sends rank 0 at step 1 sends F1" in str(error)
    validate(gpipe(2, 3), semantics="rendezvous")


def test_memory_limit() -> None:
    validate(one_f_one_b(4, 8), memory=4)
    error = broken(gpipe(4, 8), memory=4)
    assert (error.rule, error.rank, error.step) == ("memory", 0, 4)
    assert "keeps 5 activations, the limit is 4" in str(error)
