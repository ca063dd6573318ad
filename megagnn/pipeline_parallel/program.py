"""A schedule with its messages: what each rank receives, runs and sends, in order. Executors walk it."""

from __future__ import annotations

from typing import NamedTuple

from megagnn.pipeline_parallel.actions import Action, Message, Schedule, receives, sends


class Receive(NamedTuple):
    """Wait for a message from another rank."""

    message: Message
    step: int


class Run(NamedTuple):
    """Run an action."""

    action: Action
    step: int


class Send(NamedTuple):
    """Start to send a message to another rank."""

    message: Message
    step: int


Op = Receive | Run | Send
Program = list[list[Op]]
Channel = tuple[int, int, str]


def lower(schedule: Schedule) -> Program:
    """Ops of each rank: before an action the receive of what it needs, after it the send of what it made.

    `step` is the action's place in the rank's row. Messages between stages of one rank are left out.
    """
    program: Program = []
    for rank, row in enumerate(schedule.rows):
        ops: list[Op] = []
        for step, action in enumerate(row):
            for message in receives(action, schedule.num_stages):
                if schedule.placement[message.source] != rank:
                    ops.append(Receive(message, step))
            ops.append(Run(action, step))
            for message in sends(action, schedule.num_stages):
                if schedule.placement[message.target] != rank:
                    ops.append(Send(message, step))
        program.append(ops)
    return program


def channel(message: Message, schedule: Schedule) -> Channel:
    """(source rank, target rank, kind): messages of one channel keep their order."""
    return schedule.placement[message.source], schedule.placement[message.target], message.kind
