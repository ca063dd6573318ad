"""Timelines, planned or measured, as pictures and as Chrome traces (chrome://tracing, Perfetto)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megagnn.pipeline_parallel.actions import KINDS, Kind
from megagnn.pipeline_parallel.simulate import Event

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


def chrome_trace(events: Sequence[Event], unit: float = 1e6) -> dict[str, Any]:
    """The trace as a dict to be dumped as JSON: one process a rank, one complete event an action.

    unit: microseconds in one unit of the events' times; 1e6 for seconds.
    """
    ranks = sorted({event.rank for event in events})
    rows = [(rank, f"pp{rank}", [e for e in events if e.rank == rank]) for rank in ranks]
    return _trace(rows, unit)


def _trace(rows: Sequence[tuple[int, str, Sequence[Event]]], unit: float) -> dict[str, Any]:
    """The trace of rows of (process number, name, events)."""
    records: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": number, "tid": 0, "args": {"name": name}}
        for number, name, _ in rows
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
        for number, _, events in rows
        for _, action, start, end in events
    ]
    return {"traceEvents": records, "displayTimeUnit": "ms"}


def save_chrome_trace(path: Path, events: Sequence[Event], unit: float = 1e6) -> None:
    """Write `chrome_trace` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(chrome_trace(events, unit)))


def save_trace_of(path: Path, timelines: Mapping[str, Sequence[Event]], unit: float = 1e6) -> None:
    """The same of processes by their names, in their order."""
    rows = [(number, name, events) for number, (name, events) in enumerate(timelines.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_trace(rows, unit)))


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
    """One timeline's bars; micro-batches carry numbers where they are few."""
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


def save_timeline(path: Path, timelines: Mapping[str, Sequence[Event]], unit: str = FORWARD_UNITS) -> None:
    """Draw and write the figure; the file's ending chooses the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    timeline_figure(timelines, unit).savefig(path, dpi=130)
