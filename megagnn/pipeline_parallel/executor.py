"""Runs a schedule on a rank: receives, actions, sends, as [Note: executor] in `actions` demands.

It knows nothing of models: what an action computes, and what its messages look like, a `Work` says.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megagnn.parallel.context import ParallelContext
from megagnn.parallel.point_to_point import Channels, Expected, Incoming, Sent
from megagnn.pipeline_parallel.actions import (
    Action,
    Message,
    Op,
    Receive,
    Run,
    Schedule,
    Send,
    channel,
    lower,
    receives,
    sends,
)
from megagnn.pipeline_parallel.simulate import Event


class Work(Protocol):
    """The work behind a rank's actions: what each computes and what its message holds."""

    def expects(self, message: Message) -> Sequence[Expected]:
        """The tensors of a message, from sizes that this rank knows."""

    def run(self, action: Action, received: Sequence[Tensor]) -> Sequence[Tensor]:
        """Do the action with the tensors of its message, if it has one; returns those of the one it makes."""

    def kept(self) -> Sequence[str]:
        """Names of what is still kept for a later action."""


class Executor:
    """See the module.

    A message is expected one receive ahead of its turn, so that it travels while the rank works. The buffer
    of a send is freed when a later message from its target proves that it has arrived: which one does is
    known from the programs of both. What nothing proves lives to the end of the batch.

    Args:
        channels: of another executor, which have those of this schedule; by itself it opens its own.

    Raises:
        ValueError: a schedule of another number of ranks than the context has along pp, or of channels that
            were not opened.
    """

    def __init__(
        self, schedule: Schedule, context: ParallelContext, channels: Channels | None = None
    ) -> None:
        if schedule.num_ranks != context.pp_size:
            raise ValueError(
                f"schedule {schedule.name} is for {schedule.num_ranks} pipeline ranks, but there are "
                f"{context.pp_size}; make one for {context.pp_size}"
            )
        self.schedule, self.context = schedule, context
        program = lower(schedule)
        used = {channel(op.message, schedule) for ops in program for op in ops if isinstance(op, Send)}
        self.channels = channels or Channels(context, used)
        if missing := used - self.channels.opened:
            raise ValueError(
                f"schedule {schedule.name} needs channels that were not opened: {sorted(missing)}; give the "
                "executor those of a schedule that has them, or none"
            )
        self.ops = program[context.pp_rank]
        self._proofs = proofs(program, schedule, context.pp_rank)
        self.events: list[Event] = []
        """This rank's actions of the last batch with their times, s, on this machine's clock."""
        self.synchronised = False
        """Let an action end when a GPU has done its work, to time it; else when the work is queued."""

    def run(self, work: Work) -> None:
        """One batch.

        Raises:
            RuntimeError: something is left over at its end, naming what.
        """
        self.events = []
        place, stages = self.schedule.placement, self.schedule.num_stages
        sent: dict[Message, Sent] = {}
        arrived: dict[Message, Sequence[Tensor]] = {}
        coming = _Ahead(self.ops, self.schedule, self.channels, work)
        made: Sequence[Tensor] = ()
        for index, op in enumerate(self.ops):
            if isinstance(op, Receive):
                arrived[op.message] = coming.take(op.message)
                for message in self._proofs.get(index, ()):
                    sent.pop(message).wait()
            elif isinstance(op, Send):
                target = place[op.message.target]
                sent[op.message] = self.channels.send(made, op.message.kind, target)
            else:
                needed = receives(op.action, stages)
                made = self._timed(work, op.action, arrived.pop(needed[0]) if needed else ())
                for message in sends(op.action, stages):
                    if place[message.target] == self.context.pp_rank:
                        arrived[message] = [t.detach() for t in made]
        for each in sent.values():
            each.wait()
        left = [f"message {message}" for message in arrived] + list(work.kept())
        if left:
            raise RuntimeError(
                f"schedule {self.schedule.name} on {self.context} left {', '.join(left[:5])}"
                + (f" and {len(left) - 5} more" if len(left) > 5 else "")
            )

    def _timed(self, work: Work, action: Action, received: Sequence[Tensor]) -> Sequence[Tensor]:
        start = time.perf_counter()
        made = work.run(action, received)
        if self.synchronised and self.context.device.type == "cuda":
            torch.cuda.synchronize(self.context.device)
        self.events.append(Event(self.context.pp_rank, action, start, time.perf_counter()))
        return made


class _Ahead:
    """The receives of a rank, each posted when the one before it is taken."""

    def __init__(self, ops: Sequence[Op], schedule: Schedule, channels: Channels, work: Work) -> None:
        self._left = [op.message for op in ops if isinstance(op, Receive)][::-1]
        self._schedule, self._channels, self._work = schedule, channels, work
        self._posted: tuple[Message, Incoming] | None = None
        self._post()

    def _post(self) -> None:
        self._posted = None
        if self._left:
            message = self._left.pop()
            source = self._schedule.placement[message.source]
            expected = self._work.expects(message)
            self._posted = message, self._channels.receive(expected, message.kind, source)

    def take(self, message: Message) -> tuple[Tensor, ...]:
        assert self._posted is not None
        assert self._posted[0] == message
        tensors = self._posted[1].wait()
        self._post()
        return tensors


class _Place(NamedTuple):
    rank: int
    step: int


def proofs(program: Sequence[Sequence[Op]], schedule: Schedule, rank: int) -> dict[int, list[Message]]:
    """For each receive of a rank, by its index in the program, the sends that it proves to have arrived.

    A rank that sends has taken all receives that come before that send in its program.
    """
    sent_at: dict[Message, _Place] = {}
    taken_at: dict[Message, _Place] = {}
    for r, ops in enumerate(program):
        for index, op in enumerate(ops):
            if not isinstance(op, Run):
                (sent_at if isinstance(op, Send) else taken_at)[op.message] = _Place(r, index)
    open_sends: list[Message] = []
    found: dict[int, list[Message]] = {}
    for index, op in enumerate(program[rank]):
        if isinstance(op, Send):
            open_sends.append(op.message)
        elif isinstance(op, Receive):
            source = sent_at[op.message]
            proved = [
                message
                for message in open_sends
                if taken_at[message].rank == source.rank and taken_at[message].step < source.step
            ]
            if proved:
                found[index] = proved
                open_sends = [message for message in open_sends if message not in proved]
    return found
