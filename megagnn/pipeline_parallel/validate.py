"""Proof of a schedule without processes: complete, ordered, free of deadlock, within memory; and its grid.

How a program's sends and receives meet (`Semantics`):

    buffered    a send never waits; a receive waits for its message. What [Note: executor] asks for.
    batched     a send waits for its receive, but the communication between two actions is posted together, as
                Megatron-LM's send_forward_recv_backward does.
    rendezvous  each send waits for its receive, one after another, as blocking sends without buffers do.
"""

from collections.abc import Sequence
from typing import Literal

from megagnn.pipeline_parallel.actions import (
    KINDS,
    Action,
    Channel,
    Kind,
    Message,
    Program,
    Receive,
    Run,
    Schedule,
    Send,
    channel,
    lower,
    needs,
)
from megagnn.pipeline_parallel.simulate import Costs, kept, simulate

IDLE = "."
Cells = list[list[Action | None]]
Semantics = Literal["buffered", "batched", "rendezvous"]


class ScheduleError(ValueError):
    """A schedule breaks a rule, at `rank` and `step`; the message shows the step's line in the grid."""

    def __init__(self, schedule: Schedule, rank: int, step: int, rule: str, what: str) -> None:
        self.rank, self.step, self.rule = rank, step, rule
        row = schedule.rows[rank]
        action = f", {row[step]}" if step < len(row) else ""
        grid = to_text(schedule, by_step(schedule), mark=step, around=4)
        super().__init__(f"{schedule.name}, rank {rank}, step {step}{action}: {rule}: {what}\n{grid}")


def validate(
    schedule: Schedule,
    *,
    semantics: Semantics = "buffered",
    memory: float | None = None,
    program: Program | None = None,
) -> None:
    """Prove a schedule.

    Args:
        schedule: to be proved.
        semantics: how sends and receives meet.
        memory: most activations that a rank may keep, see `simulate.kept`.
        program: the messages to prove, by default those of `actions.lower`.

    Raises:
        ScheduleError: the first broken rule, one of placement, once, missing, order, message, channel,
        deadlock, memory,
            with rank, step and action.
    """
    places = _check_actions(schedule)
    _check_order(schedule, places)
    program = lower(schedule) if program is None else program
    _check_messages(schedule, program)
    stuck = find_deadlock(schedule, program, semantics)
    if stuck:
        rank, step, _ = stuck[0]
        waits = "; ".join(f"rank {r} at step {s} {w}" for r, s, w in stuck)
        raise ScheduleError(schedule, rank, step, "deadlock", f"with {semantics} sends {waits}")
    for rank, course in enumerate(kept(schedule)):
        for step, held in enumerate(course):
            if memory is not None and held > memory:
                raise ScheduleError(
                    schedule, rank, step, "memory", f"keeps {held:g} activations, the limit is {memory:g}"
                )


def _check_actions(schedule: Schedule) -> dict[Action, tuple[int, int]]:
    """Each action that the step needs is there once, on the rank of its stage; where each is."""
    places: dict[Action, tuple[int, int]] = {}
    for rank, step, action in schedule.actions():
        stage, kind, micro_batch = action
        if not (0 <= stage < schedule.num_stages and 0 <= micro_batch < schedule.num_micro_batches):
            what = f"there are {schedule.num_stages} stages and {schedule.num_micro_batches} micro-batches"
            raise ScheduleError(schedule, rank, step, "placement", what)
        if kind == "R" and stage:
            raise ScheduleError(
                schedule, rank, step, "placement", "forces are summed at stage 0; leave R out of others"
            )
        if schedule.placement[stage] != rank:
            what = f"stage {stage} is on rank {schedule.placement[stage]}"
            raise ScheduleError(schedule, rank, step, "placement", what)
        for same in {action, action.result}:
            if same in places:
                first = places[same][1]
                raise ScheduleError(schedule, rank, step, "once", f"was done at step {first}")
            places[same] = (rank, step)
    passes: tuple[Kind, ...] = ("f", "b", "F", "B") if schedule.conservative else ("F", "B")
    for micro_batch in range(schedule.num_micro_batches):
        for stage, rank in enumerate(schedule.placement):
            wanted = [Action(stage, kind, micro_batch) for kind in passes]
            wanted += [Action(0, "R", micro_batch)] if schedule.conservative and stage == 0 else []
            if Action(stage, "I", micro_batch) in places:
                wanted.append(Action(stage, "W", micro_batch))
            for action in wanted:
                if action not in places:
                    raise ScheduleError(
                        schedule, rank, len(schedule.rows[rank]), "missing", f"{action} is not done"
                    )
    for rank, step, action in schedule.actions():
        if action.kind == "W" and action._replace(kind="I") not in places:
            raise ScheduleError(schedule, rank, step, "once", "B has the weight part already")
    return places


def _check_order(schedule: Schedule, places: dict[Action, tuple[int, int]]) -> None:
    """Checks that what a rank makes for itself comes before what needs it."""
    for rank, step, action in schedule.actions():
        for need in needs(action, schedule.num_stages, schedule.conservative):
            where, when = places[need]
            if where == rank and when > step:
                raise ScheduleError(
                    schedule, rank, step, "order", f"needs {need}, which comes at step {when}"
                )


def _check_messages(schedule: Schedule, program: Program) -> None:
    """Every receive has its send and every send its receive, once, in the same order on their channel."""
    sides: dict[type, dict[Channel, list[tuple[Message, int, int]]]] = {Send: {}, Receive: {}}
    for rank, ops in enumerate(program):
        for op in ops:
            if not isinstance(op, Run):
                source, target, _ = key = channel(op.message, schedule)
                if rank != (source if isinstance(op, Send) else target):
                    what = f"{op.message} is between ranks {source} and {target}"
                    raise ScheduleError(schedule, rank, op.step, "message", what)
                sides[type(op)].setdefault(key, []).append((op.message, rank, op.step))
    for side, other, word in ((Receive, Send, "sent"), (Send, Receive, "received")):
        for key, entries in sides[side].items():
            there = {message for message, _, _ in sides[other].get(key, [])}
            seen: set[Message] = set()
            for message, rank, step in entries:
                if message not in there or message in seen:
                    what = f"{message} is never {word}" if message not in seen else f"{message} comes twice"
                    raise ScheduleError(schedule, rank, step, "message", what)
                seen.add(message)
    for key, entries in sides[Receive].items():
        for (message, rank, step), (sent, _, _) in zip(entries, sides[Send][key], strict=True):
            if message != sent:
                what = f"waits for {message}, but the next message of its channel is {sent}"
                raise ScheduleError(schedule, rank, step, "channel", what)


def _groups(program: Program, semantics: Semantics) -> list[list[list[Receive | Send]]]:
    """Communication of each rank, in groups that are posted together."""
    ranks = []
    for ops in program:
        groups: list[list[Receive | Send]] = [[]]
        for op in ops:
            if isinstance(op, Run):
                groups.append([])
            elif semantics == "batched":
                groups[-1].append(op)
            else:
                groups.append([op])
        ranks.append([group for group in groups if group])
    return ranks


def find_deadlock(
    schedule: Schedule, program: Program, semantics: Semantics
) -> Sequence[tuple[int, int, str]]:
    """Ranks that wait for one another for ever, (rank, step, what it waits for) round the circle; or none."""
    groups = _groups(program, semantics)
    position = [0] * len(groups)
    posted: set[tuple[type, Message]] = set()
    place = schedule.placement

    def waits_for(rank: int) -> Receive | Send | None:
        """The first operation of the rank's group whose other side is not there."""
        for op in groups[rank][position[rank]]:
            other = Send if isinstance(op, Receive) else Receive
            if (other, op.message) not in posted and not (semantics == "buffered" and isinstance(op, Send)):
                return op
        return None

    def peer(op: Receive | Send) -> int:
        return place[op.message.source if isinstance(op, Receive) else op.message.target]

    active = list(range(len(groups)))
    while active:
        rank = active.pop()
        while position[rank] < len(groups[rank]):
            for op in groups[rank][position[rank]]:
                if (type(op), op.message) not in posted:
                    posted.add((type(op), op.message))
                    active.append(peer(op))
            if waits_for(rank):
                break
            position[rank] += 1
    rank = next((r for r in range(len(groups)) if position[r] < len(groups[r])), -1)
    circle: dict[int, tuple[int, int, str]] = {}
    while rank >= 0 and rank not in circle:
        if position[rank] == len(groups[rank]):
            return list(circle.values())  # it waits for a rank that has ended
        stuck = waits_for(rank)
        assert stuck is not None
        verb = "receives" if isinstance(stuck, Receive) else "sends"
        circle[rank] = (rank, stuck.step, f"{verb} {stuck.message}")
        rank = peer(stuck)
    return list(circle.values())[list(circle).index(rank) :] if rank >= 0 else []


def aligned(schedule: Schedule) -> Cells:
    """Steps x ranks, every action one step long and as early as its dependencies allow.

    Where the ranks wait for ever, what can run comes first and the rest follows in the order of the rows.
    """
    found = simulate(schedule, Costs(dict.fromkeys(KINDS, 1)))
    cells: Cells = [[None] * schedule.num_ranks for _ in range(int(found.makespan))]
    done = [0] * schedule.num_ranks
    for event in found.events:
        cells[int(event.start)][event.rank] = event.action
        done[event.rank] += 1
    left = [row[count:] for row, count in zip(schedule.rows, done, strict=True)]
    for step in range(max(map(len, left))):
        cells.append([row[step] if step < len(row) else None for row in left])
    return cells


def by_step(schedule: Schedule) -> Cells:
    """Steps x ranks, the n-th actions of all ranks in line n."""
    longest = max(map(len, schedule.rows))
    return [[row[step] if step < len(row) else None for row in schedule.rows] for step in range(longest)]


def to_text(
    schedule: Schedule, cells: Cells | None = None, mark: int | None = None, around: int | None = None
) -> str:
    """The grid, one line a step and one column a rank; idle is a dot.

    cells: `aligned` (the default) or `by_step`. mark: line to mark with `>`. around: shows only so many
    lines on either side of it.
    """
    cells = aligned(schedule) if cells is None else cells
    texts = [[IDLE if action is None else str(action) for action in line] for line in cells]
    width = max(4, *(len(text) for line in texts for text in line)) if texts else 4
    placement = " ".join(map(str, schedule.placement))
    lines = [
        f"schedule {schedule.name}: {schedule.num_ranks} ranks, {schedule.num_micro_batches} micro-batches, "
        f"stages on ranks {placement}",
        "  step  " + "  ".join(f"{rank:>{width}}" for rank in range(schedule.num_ranks)),
    ]
    for step, line in enumerate(texts):
        if mark is None or around is None or abs(step - mark) <= around:
            sign = ">" if step == mark else " "
            lines.append(f"{sign} {step:>4}  " + "  ".join(f"{text:>{width}}" for text in line))
    return "\n".join(lines) + "\n"
