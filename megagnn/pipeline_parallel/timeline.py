"""Timelines of a step, planned and measured, as pictures and Chrome traces (chrome://tracing, Perfetto)."""

import json
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megagnn.data import keys
from megagnn.parallel.context import ParallelContext, rank_name
from megagnn.parallel.world import barrier, gather_along
from megagnn.pipeline_parallel.actions import KINDS, Kind, Schedule
from megagnn.pipeline_parallel.model_work import Batch
from megagnn.pipeline_parallel.simulate import CONSERVATIVE, ORDINARY, Costs, Event, bubble_of, simulate

COLOURS: dict[Kind, str] = {
    "f": "#9ecae1",
    "b": "#fdd0a2",
    "R": "#636363",
    "F": "#3182bd",
    "B": "#e6550d",
    "I": "#e6550d",
    "W": "#74c476",
}
FORWARD_UNITS = "units of a forward product"
NUMBERED = 40  # micro-batches; more, and their numbers only darken the picture


def by_rank(events: Sequence[Event], prefix: str = "") -> dict[str, list[Event]]:
    """The events of each pipeline rank, under its name: PREFIXpp0."""
    ranks = sorted({event.rank for event in events})
    return {f"{prefix}pp{rank}": [e for e in events if e.rank == rank] for rank in ranks}


def save_trace(path: Path, timelines: Mapping[str, Sequence[Event]], unit: float = 1e6) -> None:
    """Write timelines by their names as JSON: one process for each of them, one complete event an action.

    unit: microseconds in one unit of the events' times; 1e6 for seconds.
    """
    records: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": number, "tid": 0, "args": {"name": name}}
        for number, name in enumerate(timelines)
    ]
    records += [
        {
            "ph": "X",
            "name": str(action),
            "cat": KINDS[action.kind],
            "pid": number,
            "tid": 0,
            "ts": start * unit,
            "dur": (end - start) * unit,
            "args": {"stage": action.stage, "micro_batch": action.micro_batch},
        }
        for number, events in enumerate(timelines.values())
        for _, action, start, end in events
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": records, "displayTimeUnit": "ms"}))


def timeline_figure(timelines: Mapping[str, Sequence[Event]], unit: str = FORWARD_UNITS) -> Any:
    """A matplotlib figure, one panel for each named timeline, all on one time axis; ranks from top to bottom.

    unit: of the events' times, for the label.

    Raises:
        ValueError: no timeline, or one without events.
    """
    if not timelines or not all(map(len, timelines.values())):
        raise ValueError("a drawing needs at least one timeline, and events in each")
    from matplotlib.figure import Figure  # needs a moment to import
    from matplotlib.patches import Patch

    ranks = {name: 1 + max(event.rank for event in events) for name, events in timelines.items()}
    height = sum(0.3 * count + 0.6 for count in ranks.values()) + 0.8
    figure = Figure(figsize=(12, height), layout="constrained")
    panels = figure.subplots(
        len(timelines), 1, sharex=True, squeeze=False, height_ratios=[count + 1.5 for count in ranks.values()]
    )[:, 0]
    end = max(event.end for events in timelines.values() for event in events)
    for axes, (name, events) in zip(panels, timelines.items(), strict=True):
        _draw(axes, events)
        axes.set(title=name, ylabel="rank", xlim=(0, end), ylim=(ranks[name] - 0.5, -0.5))
        axes.set_yticks(range(ranks[name]))
    panels[-1].set_xlabel(f"time, {unit}")
    used = {event.action.kind for events in timelines.values() for event in events}
    patches = [Patch(color=COLOURS[k], label=f"{k}: {text}") for k, text in KINDS.items() if k in used]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _draw(axes: Any, events: Sequence[Event]) -> None:
    numbered = max(event.action.micro_batch for event in events) < NUMBERED
    for kind, colour in COLOURS.items():
        chosen = [event for event in events if event.action.kind == kind]
        axes.barh(
            [event.rank for event in chosen],
            [event.end - event.start for event in chosen],
            left=[event.start for event in chosen],
            height=0.9,
            color=colour,
            edgecolor="white",
            linewidth=0.3,
        )
    for event in events if numbered else ():
        if event.end > event.start:
            middle = (event.start + event.end) / 2
            axes.text(middle, event.rank, event.action.micro_batch, ha="center", va="center", fontsize=5)


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
        save_trace(path, by_rank(self.planned, "planned ") | self.measured)


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
    gathered = gather_along((socket.gethostname(), time.perf_counter(), list(events)), context, "world")
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
    shifted = {
        name: [e._replace(start=e.start - first, end=e.end - first) for e in theirs]
        for name, theirs in measured.items()
    }
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


def _length(event: Event) -> float:
    return event.end - event.start


def _is_first(name: str) -> bool:
    return name.startswith("dp0-") and name.endswith("-tp0")
