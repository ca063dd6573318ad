"""Schedules as text: a grid of steps by ranks, and back."""

from __future__ import annotations

import re

from megagnn.pipeline_parallel.actions import KINDS, Action, Schedule
from megagnn.pipeline_parallel.simulate import Costs, simulate

IDLE = "."
Cells = list[list[Action | None]]


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


def from_text(text: str) -> Schedule:
    """The schedule that a grid shows, whatever its alignment.

    Raises:
        ValueError: text that is no grid, naming the line.
    """
    lines = text.strip().splitlines()
    pattern = r"schedule (.+): (\d+) ranks, (\d+) micro-batches, stages on ranks ([\d ]+)"
    header = re.fullmatch(pattern, lines[0].strip()) if lines else None
    if header is None:
        raise ValueError(
            f"a grid begins with 'schedule NAME: P ranks, M micro-batches, stages on ranks 0 1 ...', "
            f"got {lines[:1]}"
        )
    rows: list[list[Action]] = [[] for _ in range(int(header[2]))]
    for number, line in enumerate(lines[2:], 3):
        fields = line.replace(">", " ").split()[1:]
        if len(fields) != len(rows):
            raise ValueError(
                f"line {number} has {len(fields)} columns for {len(rows)} ranks; write . for idle"
            )
        for row, cell in zip(rows, fields, strict=True):
            if cell != IDLE:
                row.append(Action.parse(cell))
    placement = tuple(map(int, header[4].split()))
    return Schedule(header[1], placement, int(header[3]), tuple(map(tuple, rows)))
