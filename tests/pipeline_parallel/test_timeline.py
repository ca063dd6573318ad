from __future__ import annotations

import json
from pathlib import Path

import pytest

from megagnn.pipeline_parallel.actions import Action
from megagnn.pipeline_parallel.schedules.conservative import conservative
from megagnn.pipeline_parallel.schedules.ordinary import one_f_one_b
from megagnn.pipeline_parallel.simulate import Event, simulate
from megagnn.pipeline_parallel.timeline import save_chrome_trace, save_timeline, timeline_figure


def test_chrome_trace(tmp_path: Path) -> None:
    """Measured seconds come out in microseconds, one process a rank."""
    save_chrome_trace(tmp_path / "deep" / "trace.json", [Event(1, Action(1, "F", 3), 0.5, 0.75)])
    name, event = json.loads((tmp_path / "deep" / "trace.json").read_text())["traceEvents"]
    assert (name["ph"], name["pid"], name["args"]) == ("M", 1, {"name": "pp1"})
    assert (event["ph"], event["name"], event["pid"]) == ("X", "1F3", 1)
    assert (event["ts"], event["dur"]) == (500_000, 250_000)
    assert event["args"] == {"stage": 1, "micro_batch": 3}


def test_drawing(tmp_path: Path) -> None:
    timelines = {"1F1B": simulate(one_f_one_b(2, 3)).events, "forces": simulate(conservative(3, 4)).events}
    save_timeline(tmp_path / "deep" / "timeline.png", timelines)
    assert (tmp_path / "deep" / "timeline.png").read_bytes().startswith(b"\x89PNG")
    panels = timeline_figure(timelines).axes
    assert [axes.get_title() for axes in panels] == ["1F1B", "forces"]
    bars = [
        sorted((bar.get_x(), bar.get_y() + 0.45, bar.get_width()) for bar in axes.patches) for axes in panels
    ]
    wanted = sorted((e.start, float(e.rank), e.end - e.start) for e in timelines["1F1B"])
    assert [tuple(map(float, bar)) for bar in bars[0]] == [pytest.approx(bar) for bar in wanted]
    assert len(bars[1]) == len(timelines["forces"])


@pytest.mark.parametrize("timelines", [{}, {"empty": ()}])
def test_nothing_to_draw(timelines: dict) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match="at least one timeline, and events in each"):
        timeline_figure(timelines)
