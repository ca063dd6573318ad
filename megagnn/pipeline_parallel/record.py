"""The timeline of a training step, planned and measured, of all ranks."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megagnn.data import keys
from megagnn.parallel.context import ParallelContext, rank_name
from megagnn.parallel.world import all_gather_objects, barrier
from megagnn.pipeline_parallel.actions import Schedule
from megagnn.pipeline_parallel.model_work import Batch
from megagnn.pipeline_parallel.simulate import CONSERVATIVE, ORDINARY, Costs, Event, bubble_of, simulate
from megagnn.pipeline_parallel.timeline import save_trace_of, timeline_figure


class Record(NamedTuple):
    """Times in s from the first action on."""

    planned: list[Event]
    """The simulator's timeline of the first pipeline, with as much work in all as was measured."""
    measured: dict[str, list[Event]]
    """The timeline of each rank by its name, in the order of ranks."""
    schedule: Schedule

    @property
    def first_pipeline(self) -> list[Event]:
        """The measured timeline of the ranks that the plan is for."""
        return [e for name, events in self.measured.items() if _is_first(name) for e in events]

    @property
    def bubbles(self) -> tuple[float, float]:
        """(planned, measured) share of the first pipeline's ranks x time that no action fills."""
        num = self.schedule.num_ranks
        return bubble_of(self.planned, num), bubble_of(self.first_pipeline, num)

    def figure(self) -> Any:
        """A drawing of both, for the first pipeline."""
        panels = zip(("planned", "measured"), (self.planned, self.first_pipeline), self.bubbles, strict=True)
        timelines = {
            f"{self.schedule.name}, {word}: bubble {100 * share:.1f} %": events
            for word, events, share in panels
        }
        return timeline_figure(timelines, "seconds")

    def save_trace(self, path: Path) -> None:
        """A Chrome trace of the plan and of every rank."""
        ranks = range(self.schedule.num_ranks)
        planned = {f"planned pp{r}": [e for e in self.planned if e.rank == r] for r in ranks}
        save_trace_of(path, planned | self.measured)


def record(
    events: Sequence[Event],
    schedule: Schedule,
    stage_costs: Sequence[float],
    micro_batches: Sequence[Batch],
    context: ParallelContext,
) -> Record | None:
    """The record of a step on all ranks, for the main rank; None on the others. All ranks must call it.

    Clocks of several machines are set by a barrier, so between machines times are as exact as that.

    Args:
        events: of this rank.
        stage_costs: (S,) in any unit.
        micro_batches: of this rank.
    """
    barrier(context)
    gathered = all_gather_objects((socket.gethostname(), time.perf_counter(), list(events)), context)
    if not context.is_main:
        return None
    zero: dict[str, float] = {}
    names = [
        rank_name(dp, pp, tp)
        for dp in range(context.dp_size)
        for pp in range(context.pp_size)
        for tp in range(context.tp_size)
    ]
    measured = {}
    for name, (host, now, theirs) in zip(names, gathered, strict=True):
        begin = zero.setdefault(host, now)
        measured[name] = [e._replace(start=e.start - begin, end=e.end - begin) for e in theirs]
    first = min(e.start for theirs in measured.values() for e in theirs)
    shifted = {name: _moved(theirs, first) for name, theirs in measured.items()}
    found = Record([], shifted, schedule)
    return found._replace(
        planned=plan(schedule, stage_costs, micro_batches, sum(map(_length, found.first_pipeline)))
    )


def plan(
    schedule: Schedule, stage_costs: Sequence[float], micro_batches: Sequence[Batch], seconds: float
) -> list[Event]:
    """The simulator's timeline; its actions take `seconds` in all."""
    sizes = [float(len(b[keys.ATOMIC_NUMBERS]) + b[keys.EDGE_INDEX].shape[1]) for b in micro_batches]
    phase = CONSERVATIVE if schedule.conservative else ORDINARY
    found = simulate(schedule, Costs(phase, stage=stage_costs, micro_batch=sizes)).events
    unit = seconds / max(sum(map(_length, found)), 1e-30)
    return [e._replace(start=e.start * unit, end=e.end * unit) for e in found]


def _moved(events: Sequence[Event], first: float) -> list[Event]:
    return [e._replace(start=e.start - first, end=e.end - first) for e in events]


def _length(event: Event) -> float:
    return event.end - event.start


def _is_first(name: str) -> bool:
    return name.startswith("dp0-") and name.endswith("-tp0")
