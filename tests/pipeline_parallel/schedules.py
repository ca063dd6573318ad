"""Schedules for tests: of every name, of random size and cost, read from text."""

from __future__ import annotations

import re

from hypothesis import strategies as st

from megagnn.pipeline_parallel.actions import Action, Schedule
from megagnn.pipeline_parallel.registry import find, registered
from megagnn.pipeline_parallel.schedules.ordinary import interleaved, whole_rounds
from megagnn.pipeline_parallel.simulate import CONSERVATIVE, ORDINARY, Costs
from megagnn.pipeline_parallel.validate import IDLE


def make(name: str, num_ranks: int, num_micro_batches: int) -> Schedule:
    """The schedule of this name, with more micro-batches where it does not take as few."""
    entry = find(name)
    return entry.build(num_ranks, entry.fewest(num_ranks, num_micro_batches))


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Any schedule of up to 6 ranks and 14 micro-batches."""
    sizes = draw(st.integers(1, 6)), draw(st.integers(1, 14))
    name = draw(st.sampled_from([*sorted(registered()), "three chunks"]))
    if name == "three chunks":
        return interleaved(sizes[0], whole_rounds(*sizes), 3)
    return make(name, *sizes)


def random_costs(draw: st.DrawFn, schedule: Schedule) -> Costs:
    """Costs of uneven stages, micro-batches and messages."""
    size = st.floats(0.1, 4)
    return Costs(
        CONSERVATIVE if schedule.conservative else ORDINARY,
        stage=draw(st.lists(size, min_size=schedule.num_stages, max_size=schedule.num_stages)),
        micro_batch=draw(
            st.lists(size, min_size=schedule.num_micro_batches, max_size=schedule.num_micro_batches)
        ),
        latency=draw(st.floats(0, 2)),
        per_size=draw(st.floats(0, 2)),
    )


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
