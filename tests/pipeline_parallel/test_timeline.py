from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megagnn.parallel.context import ParallelContext
from megagnn.pipeline_parallel import timeline as module
from megagnn.pipeline_parallel.actions import Action
from megagnn.pipeline_parallel.schedules.conservative import conservative
from megagnn.pipeline_parallel.schedules.ordinary import one_f_one_b
from megagnn.pipeline_parallel.simulate import CONSERVATIVE, Costs, Event, simulate
from megagnn.pipeline_parallel.timeline import by_rank, plan, record, save_trace, timeline_figure
from tests.distributed.parity import batch_of


def test_chrome_trace(tmp_path: Path) -> None:
    """Measured seconds come out in microseconds, one process a rank."""
    events = [Event(1, Action(1, "F", 3), 0.5, 0.75)]
    save_trace(tmp_path / "deep" / "trace.json", {"pp0": [], **by_rank(events)})
    _, name, event = json.loads((tmp_path / "deep" / "trace.json").read_text())["traceEvents"]
    assert (name["ph"], name["pid"], name["args"]) == ("M", 1, {"name": "pp1"})
    assert (event["ph"], event["name"], event["pid"]) == ("X", "1F3", 1)
    assert (event["ts"], event["dur"]) == (500_000, 250_000)
    assert event["args"] == {"stage": 1, "micro_batch": 3}


def test_drawing() -> None:
    timelines = {"1F1B": simulate(one_f_one_b(2, 3)).events, "forces": simulate(conservative(3, 4)).events}
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


SCHEDULE = conservative(2, 4)
BATCHES = [batch_of(range(k)) for k in (1, 3, 4, 2)]
COSTS = [3.0, 2.0]
CONTEXT = ParallelContext(dp_size=2, pp_size=2)


def sizes() -> list[float]:
    return [float(len(b["atomic_numbers"]) + b["edge_index"].shape[1]) for b in BATCHES]


def test_the_plan_takes_as_much_work_as_was_measured() -> None:
    wanted = simulate(SCHEDULE, Costs(CONSERVATIVE, stage=COSTS, micro_batch=sizes()))
    events = plan(SCHEDULE, COSTS, BATCHES, 10.0)
    assert sum(e.end - e.start for e in events) == pytest.approx(10)
    assert [e.action for e in events] == [e.action for e in wanted.events]
    assert module.bubble_of(events, 2) == pytest.approx(wanted.bubble)


def gathered(monkeypatch: pytest.MonkeyPatch, hosts: list[str]) -> module.Record:
    """Both data-parallel ranks do as planned; the second machine's clock is 100 s ahead; the third rank ends
    the barrier 3 s late."""
    true = plan(SCHEDULE, COSTS, BATCHES, 10.0)
    answers = []
    for rank, host in enumerate(hosts):
        ahead = 100.0 if host == "b" else 0.0
        own = [Event(e.rank, e.action, e.start + 50 + ahead, e.end + 50 + ahead) for e in true]
        late = 3.0 if rank == 2 else 0.0
        answers.append((host, 80 + ahead + late, [e for e in own if e.rank == rank % 2]))
    monkeypatch.setattr(module, "barrier", lambda _: None)
    monkeypatch.setattr(module, "gather_along", lambda *_: answers)
    found = record([], SCHEDULE, COSTS, BATCHES, CONTEXT)
    assert found is not None
    return found


@pytest.mark.parametrize("hosts", [["a"] * 4, ["a", "a", "a", "b"], ["a", "b", "a", "b"]])
def test_clocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hosts: list[str]) -> None:
    """Of one machine the clock is one, however late a rank is; another machine's is set by the barrier."""
    found = gathered(monkeypatch, hosts)
    assert list(found.measured) == ["dp0-pp0-tp0", "dp0-pp1-tp0", "dp1-pp0-tp0", "dp1-pp1-tp0"]
    for name, events in found.measured.items():
        wanted = [e for e in found.planned if f"pp{e.rank}" in name]
        assert [e.action for e in events] == [e.action for e in wanted]
        assert [e.start for e in events] == pytest.approx([e.start for e in wanted], abs=1e-9)
    assert found.bubbles[0] == pytest.approx(found.bubbles[1])
    found.save_trace(tmp_path / "trace.json")
    trace: list[dict[str, Any]] = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert len([r for r in trace if r["ph"] == "X"]) == 3 * len(found.planned)
    titles = [axes.get_title() for axes in found.figure().axes]
    share = 100 * found.bubbles[0]
    assert titles == [f"conservative, {word}: bubble {share:.1f} %" for word in ("planned", "measured")]


def test_only_the_main_rank_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "barrier", lambda _: None)
    monkeypatch.setattr(module, "gather_along", lambda *_: [])
    other = ParallelContext(dp_size=2, pp_size=2, pp_rank=1)
    assert record([], SCHEDULE, COSTS, BATCHES, other) is None
