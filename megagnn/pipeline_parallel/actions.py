"""Pipeline schedules as data: actions, messages between them, schedules.

[Note: executor] What interprets a schedule must honour this; `validate` proves schedules under these rules.

1. Rank r runs `schedule.rows[r]` in order. Action (stage, kind, micro-batch) acts on the layers of that
   stage, of which a rank has several under interleaving; `lower` puts its receives before and its
   sends after it.
2. A receive blocks. A send is started and never waited for by what follows; its buffer lives until the
   message has left. `validate` also says which schedules hold when sends block (docs/pipeline.md).
3. Messages of one channel (source rank, target rank, kind) are sent and received in the same order, so that
   they need no tags: a kind is a tag, or a communicator for each direction where there are none. A message
   between two stages of one rank is handed over without a copy.
4. Every stage reads the micro-batch's graph itself, so shapes are known and only floating-point rows travel:

   | kind | from, to | an ordinary step | a step on conservative forces |
   |---|---|---|---|
   | f | k, k+1 | | h, x |
   | b | k, k-1 | | cotangents of h, x; dE/dx0 and dE/dstrain summed so far; the energies |
   | F | k, k+1 | h, x | h, x, h', x'; the seeds x0', cell' (of strain'); dLoss/dE |
   | B | k, k-1 | cotangents of h, x | cotangents of h, x, h', x' |

   Positions and strain enter every stage (through the envelope), so dE/dx0 is a sum over stages. It travels
   with b, each stage adding its own; at stage 0 it is whole, and no collective is needed. R (stage 0 only)
   forms forces, the loss and its cotangents u, v, w there, and the seeds travel down with F; every stage
   seeds its own envelope and edge vectors from them. Seeds are constants: B brings no cotangent of them, and
   begins at the last stage from sum(u E) + sum(E'). The loss's denominators are counts of labels over all
   micro-batches and data-parallel ranks, known before the first action. Where layers leave coordinates where
   they are, x and x' are x0 and its seed and do not travel twice.
5. f keeps what b needs, and b frees it; parameters require no grad then. F keeps what B, or I and W, need. I
   (input part) sends the cotangent on and keeps what W (weight part) needs. Gradients of parameters are
   added up over micro-batches in the order of the row, so a schedule's result does not depend on timing;
   two schedules differ by rounding. Random numbers of f and F of one micro-batch are the same.
6. After the last action nothing is in flight: no kept activation, no message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, cast

from megagnn.parallel.point_to_point import Channel

Kind = Literal["f", "b", "R", "F", "B", "I", "W"]
KINDS: dict[Kind, str] = {
    "f": "forward to the energies, values only",
    "b": "backward to positions and strain",
    "R": "forces are summed: loss, cotangents, seeds",
    "F": "forward; on pairs of value and tangent for conservative forces",
    "B": "backward of F to inputs and parameters",
    "I": "input part of B",
    "W": "weight part of B",
}


class Action(NamedTuple):
    """One piece of work of a rank, printed as `1F0`: stage 1, forward, micro-batch 0."""

    stage: int
    kind: Kind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that prints as `text`.

        Raises:
            ValueError: it is none.
        """
        match = re.fullmatch(r"(\d+)([fbRFBIW])(\d+)", text)
        if match is None:
            raise ValueError(
                f"{text!r} is not an action; write stage, one of {''.join(KINDS)}, micro-batch, as in 1F0"
            )
        return cls(int(match[1]), cast(Kind, match[2]), int(match[3]))

    @property
    def result(self) -> Action:
        """The result under which others know the action; that of I is B's."""
        return self._replace(kind="B") if self.kind == "I" else self


class Message(NamedTuple):
    """A result (kind f, b, F or B) on its way to the stage after or before."""

    kind: Kind
    micro_batch: int
    source: int
    target: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch} from stage {self.source} to {self.target}"


@dataclass(frozen=True)
class Schedule:
    """Per-rank lists of actions.

    placement: (S,) rank of each stage. rows: for each rank its actions in order.
    """

    name: str
    placement: tuple[int, ...]
    num_micro_batches: int
    rows: tuple[tuple[Action, ...], ...]

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks p."""
        return len(self.rows)

    @property
    def num_stages(self) -> int:
        """Stages S, p times the chunks of a rank."""
        return len(self.placement)

    @cached_property
    def conservative(self) -> bool:
        """Whether a micro-batch takes two passes, for forces F = -dE/dx in the loss."""
        return any(action.kind in "fbR" for row in self.rows for action in row)

    def actions(self) -> Iterator[tuple[int, int, Action]]:
        for rank, row in enumerate(self.rows):
            for step, action in enumerate(row):
                yield rank, step, action


def needs(action: Action, num_stages: int, conservative: bool) -> list[Action]:
    """Results that an action waits for, of its own stage and of the stages beside it."""
    stage, kind, micro_batch = action
    last = num_stages - 1
    if kind in ("f", "F"):
        if stage > 0:
            return [Action(stage - 1, kind, micro_batch)]
        return [Action(0, "R", micro_batch)] if kind == "F" and conservative else []
    if kind == "R":
        return [Action(stage, "b", micro_batch)]
    if kind == "W":
        return [Action(stage, "B", micro_batch)]
    forward, backward = ("f", "b") if kind == "b" else ("F", "B")
    found = [Action(stage, cast(Kind, forward), micro_batch)]
    return found + ([Action(stage + 1, cast(Kind, backward), micro_batch)] if stage < last else [])


def receives(action: Action, num_stages: int) -> list[Message]:
    """The messages that an action takes in (none or one)."""
    found = needs(action, num_stages, conservative=False)
    return [Message(a.kind, a.micro_batch, a.stage, action.stage) for a in found if a.stage != action.stage]


def sends(action: Action, num_stages: int) -> list[Message]:
    """The messages that an action gives out (none or one)."""
    kind = action.result.kind
    step = {"f": 1, "F": 1, "b": -1, "B": -1}.get(kind, 0)
    target = action.stage + step
    if not step or not 0 <= target < num_stages:
        return []
    return [Message(kind, action.micro_batch, action.stage, target)]


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
