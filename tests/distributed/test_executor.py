"""The executor on actions that only pass names on: order, messages, buffers, times."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megagnn.parallel.context import ParallelContext
from megagnn.parallel.point_to_point import Channels, Expected, Incoming
from megagnn.parallel.world import barrier
from megagnn.pipeline_parallel.actions import (
    KINDS,
    Action,
    Message,
    Receive,
    Run,
    Schedule,
    Send,
    lower,
    needs,
)
from megagnn.pipeline_parallel.executor import Executor, proofs
from megagnn.pipeline_parallel.schedules.conservative import conservative, two_pass
from megagnn.pipeline_parallel.schedules.ordinary import gpipe, interleaved, one_f_one_b, zb_h1
from tests.distributed.nccl_like import HANG, nccl_like
from tests.distributed.spawn import spawn
from tools.bench.pipeline import timeline_of

SIZES = (3, 0, 5, 2, 1, 4, 0, 2)


def schedules(num_ranks: int) -> list[Schedule]:
    """One of each."""
    m = 2 * num_ranks
    ordinary = [gpipe(num_ranks, m), one_f_one_b(num_ranks, m), zb_h1(num_ranks, m)]
    split = conservative(num_ranks, m, split=True)
    return [*ordinary, interleaved(num_ranks, m), two_pass(num_ranks, m), conservative(num_ranks, m), split]


class NamingWork:
    """Messages hold the name of the action that made them, as many times as the micro-batch is large."""

    def __init__(self, schedule: Schedule, leave: int = -1) -> None:
        self.schedule, self.done, self.leave = schedule, list[Action](), leave

    def expects(self, message: Message) -> list[Expected]:
        """Two tensors of different types."""
        size = SIZES[message.micro_batch % len(SIZES)]
        return [Expected((size, 3), torch.int64), Expected((size,), torch.float32)]

    def run(self, action: Action, received: Sequence[Tensor]) -> list[Tensor]:
        """Check what came; say who sends."""
        kinds = list(KINDS)
        for need in needs(action, self.schedule.num_stages, self.schedule.conservative):
            if need.stage == action.stage:
                assert any(d.result == need for d in self.done)
            else:
                name, half = received
                assert half.dtype == torch.float32
                assert (half == 0.5).all()
                for row in name.tolist():
                    assert row == [need.stage, kinds.index(need.kind), need.micro_batch]
        self.done.append(action)
        size = SIZES[action.micro_batch % len(SIZES)]
        row = torch.tensor([action.stage, kinds.index(action.result.kind), action.micro_batch])
        return [row.repeat(size, 1), torch.full((size,), 0.5)]

    def kept(self) -> list[str]:
        """Planted."""
        return [f"thing {k}" for k in range(self.leave)]


def run_all(context: ParallelContext) -> list[Any]:
    """Every schedule twice; names of those with their events."""
    found = []
    for schedule in schedules(context.pp_size):
        executor = Executor(schedule, context)
        for _ in range(2):
            barrier(context)
            work = NamingWork(schedule)
            executor.run(work)
            assert work.done == list(schedule.rows[context.pp_rank])
        with pytest.raises(RuntimeError, match=rf"{schedule.name} on .* left thing 0, .* and 2 more"):
            executor.run(NamingWork(schedule, leave=7))
        found.append((timeline_of(executor, context), context.traffic.total("pp")))
    return found


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_every_schedule(num_ranks: int) -> None:
    """Each message goes to the action that needs it, and the timeline is one that the rules allow."""
    ranks = [run_all(ParallelContext())] if num_ranks == 1 else spawn(num_ranks, run_all, pp=num_ranks)
    for schedule, *found in zip(schedules(num_ranks), *ranks, strict=True):
        events, sent = found[0]
        assert all(other[0] == events for other in found)
        assert (sent > 0) == (num_ranks > 1)
        end = {event.action.result: event.end for event in events}
        assert len(events) == sum(map(len, schedule.rows))
        assert events[0].start == 0
        for event in events:
            assert event.start <= event.end
            for need in needs(event.action, schedule.num_stages, schedule.conservative):
                # a message without numbers is not sent, so nobody waits for it
                if need.stage == event.action.stage or SIZES[need.micro_batch % len(SIZES)]:
                    assert end[need] <= event.start


@pytest.mark.parametrize("num_ranks", [2, 4, 5])
def test_proofs_are_right_and_free_buffers(num_ranks: int) -> None:
    """What a receive proves had been taken before; few sends stay open, but for what nothing answers."""
    for schedule in schedules(num_ranks):
        program = lower(schedule)
        for rank, ops in enumerate(program):
            found = proofs(program, schedule, rank)
            proved = [message for messages in found.values() for message in messages]
            assert len(set(proved)) == len(proved)
            for index, messages in found.items():
                op = ops[index]
                assert isinstance(op, Receive)
                source = schedule.placement[op.message.source]
                sent = program[source].index(Send(op.message, step_of(program[source], op.message)))
                for message in messages:
                    before = [o for o in program[source][:sent] if isinstance(o, Receive)]
                    assert message in [o.message for o in before]
                    own = [o.message for o in ops[:index] if isinstance(o, Send)]
                    assert message in own
            sends = [op.message for op in ops if isinstance(op, Send)]
            # cotangents of the last micro-batches are answered by nothing
            left = {message for message in sends if message not in proved}
            assert {message.kind for message in left} <= {"B", "b"}
    first = proofs(lower(one_f_one_b(2, 4)), one_f_one_b(2, 4), 0)
    assert [[str(message) for message in messages] for messages in first.values()] == [
        [f"F{i} from stage 0 to 1"] for i in range(4)
    ]


def step_of(ops: Sequence[Any], message: Message) -> int:
    """The step of the send of a message."""
    return next(int(op.step) for op in ops if not isinstance(op, Run) and op.message == message)


def swapped(context: ParallelContext) -> str:
    """Two messages of one channel that are taken in the wrong order reach the wrong action."""
    schedule = one_f_one_b(2, 4)
    executor = Executor(schedule, context)
    if context.pp_rank == 1:
        places = [k for k, op in enumerate(executor.ops) if isinstance(op, Receive)]
        first, second = (executor.ops[k] for k in places[:2])
        assert isinstance(first, Receive)
        assert isinstance(second, Receive)
        executor.ops[places[0]] = first._replace(message=second.message)
        executor.ops[places[1]] = second._replace(message=first.message)
        with pytest.raises((RuntimeError, AssertionError, KeyError)) as caught:
            executor.run(NamingWork(schedule))
        return type(caught.value).__name__
    channels = executor.channels
    for i in range(2):
        channels.send(NamingWork(schedule).run(Action(0, "F", i), []), "F", 1).wait()
    return ""


def test_a_wrong_order_is_found() -> None:
    assert spawn(2, swapped, pp=2)[1]


def of_the_kind(channels: Channels, kind: str, _: bool) -> dict[str, Any]:
    """`Channels._settings` for groups of kinds alone."""
    return {"group": next(group() for key, group in channels._groups.items() if key[0] == kind), "tag": 0}


def as_on_nccl(context: ParallelContext, mistake: str = "") -> None:
    """Schedules where sends and receives wait as NCCL's do."""
    with nccl_like(patience=3.0 if mistake else 60.0), ExitStack() as stack:
        if mistake == "opens no channel":
            stack.enter_context(mock.patch.object(Channels, "_open"))
        if mistake == "one group for both directions":
            stack.enter_context(mock.patch.object(Channels, "_settings", of_the_kind))
        for schedule in schedules(context.pp_size):
            work = NamingWork(schedule)
            Executor(schedule, context).run(work)
            assert work.done == list(schedule.rows[context.pp_rank])


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_nothing_waits_for_ever_on_nccl(num_ranks: int) -> None:
    spawn(num_ranks, as_on_nccl, pp=num_ranks)


@pytest.mark.parametrize("mistake", ["opens no channel", "one group for both directions"])
def test_what_would_hang_on_nccl_is_found(mistake: str) -> None:
    with pytest.raises(RuntimeError, match=HANG):
        spawn(2, as_on_nccl, mistake, pp=2)


def test_channels_of_another_schedule() -> None:
    """Those that a schedule needs must be open."""
    schedule, few = one_f_one_b(2, 2), Channels(ParallelContext(), [(0, 1, "F")])
    with pytest.raises(ValueError, match=r"needs channels that were not opened: \[\(1, 0, 'B'\)\]; give"):
        Executor(schedule, ParallelContext(pp_size=2), few)


def test_another_number_of_ranks() -> None:
    with pytest.raises(ValueError, match="schedule 1f1b is for 2 pipeline ranks, but there are 1; make one"):
        Executor(one_f_one_b(2, 2), ParallelContext())


def test_places_are_aligned() -> None:
    """Tensors of any type can be viewed in the buffer."""
    expected = [
        Expected((3,), torch.bfloat16),
        Expected((0, 3), torch.float32),
        Expected((2,), torch.float64),
    ]
    buffer = torch.arange(32, dtype=torch.uint8)
    half, nothing, double = Incoming(None, buffer, expected).wait()
    assert half.shape == (3,)
    assert nothing.shape == (0, 3)
    assert torch.equal(double.view(torch.uint8), buffer[16:])
