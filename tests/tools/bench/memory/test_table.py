"""The memory table: what its categories add up to, its rows, its report, and a small run of the command."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megagnn.optim.zero.offload import DiskStorage
from megagnn.parallel.context import ParallelContext
from tools.bench.memory import events as memory
from tools.bench.memory import rows as memory_rows
from tools.bench.memory import table as memory_table
from tools.bench.memory.rows import Row, Size, events_of_step, table_rows

TOOL = memory_table.__name__
SMALL = Size(width=32, layers=2, edges=400, forces="conservative", ranks=1, steps=1)
PHASES = [(memory.MADE, 0, 10), (memory.STEP, 20, 100), ("forward", 30, 50)]
EVENTS = [
    memory.Event(1, 0xA, 100, memory.ACTIVATIONS),  # kept: parameters
    memory.Event(2, 0xB, 7, memory.ACTIVATIONS),
    memory.Event(25, 0xC, 40, memory.GRADIENTS),
    memory.Event(35, 0xD, 1000, memory.ACTIVATIONS),
    memory.Event(45, 0xD, -1000, memory.ACTIVATIONS),
    memory.Event(55, 0xE, 60, memory.MESSAGES),
    memory.Event(65, 0xE, 30, memory.MESSAGES),  # the first release was not seen
    memory.Event(75, 0xC, -40, memory.ACTIVATIONS),  # of gradients, whoever releases it
    memory.Event(150, 0xF, 5000, memory.ACTIVATIONS),
]


def test_categories_add_up() -> None:
    course = memory.timeline(EVENTS, PHASES, {0xA: memory.PARAMETERS})
    assert course.total.tolist() == [107, 147, 1147, 147, 207, 177, 137, 137]
    held = sum(event.num_bytes for event in EVENTS if event.nanoseconds <= 100)
    assert held == course.total[-1] + course.unseen
    assert course.unseen == 60
    assert course.at_peak() == {
        memory.PARAMETERS: 100,
        memory.GRADIENTS: 40,
        memory.STATE: 0,
        memory.FILES: 0,
        memory.MESSAGES: 0,
        memory.ACTIVATIONS: 1007,
    }
    assert course.phases == [("forward", pytest.approx(1e-8), pytest.approx(3e-8))]


def test_a_profile_needs_its_phases() -> None:
    with pytest.raises(ValueError, match="needs a phase 'whole step', got \\['construct'\\]"):
        memory.timeline(EVENTS, PHASES[:1], {})


def test_thinned_course_keeps_its_peak_and_files_join() -> None:
    course = memory.timeline(EVENTS, PHASES, {})
    thin = course.thinned(3)
    assert thin.seconds.tolist() == pytest.approx([0, 8e-8 / 3, 16e-8 / 3, 8e-8])
    assert thin.total.tolist() == [1147, 207, 177, 137]
    joined = course.with_files([(0.0, 0.0), (2e-8, 500.0), (6e-8, 0.0)])
    assert joined.total.max() == course.total.max() + 500
    assert joined.num_bytes[memory.FILES].tolist() == [0] * 3 + [500] * 5 + [0] * 2
    assert set(course.seconds) < set(joined.seconds)


@pytest.mark.parametrize("stage", [None, 2, 3])
def test_step_by_the_allocators_events(stage: int | None) -> None:
    """It raises where the sum of the categories is not the allocator's; what stays, what arithmetic says."""
    row = Row("row", unfused=False, method="one_backward", stage=stage)
    course, losses = events_of_step(row, SMALL, ParallelContext())
    count = 4 * memory_rows.Work(row, SMALL, ParallelContext()).num_parameters
    begin = {category: values[0] for category, values in course.num_bytes.items()}
    for category, copies in ((memory.PARAMETERS, 1), (memory.GRADIENTS, 1), (memory.STATE, 2)):
        assert copies * count <= begin[category] < copies * (1.1 * count)
    assert course.at_peak()[memory.ACTIVATIONS] > 10 * begin[memory.ACTIVATIONS]
    assert {name for name, _, _ in course.phases} >= {"forward", "forward of pairs", "backward", "optimizer"}
    assert len(losses) == 2
    whole = course.num_bytes[memory.PARAMETERS].max() - begin[memory.PARAMETERS]
    assert (whole > 0) == (stage == 3)


def test_without_ranges_whole_parameters_would_be_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MADE_FOR", [])
    row = Row("row", unfused=False, method="one_backward", stage=3)
    course, _ = events_of_step(row, SMALL, ParallelContext())
    parameters = course.num_bytes[memory.PARAMETERS]
    assert parameters.max() == parameters[0]


def test_a_wrong_sum_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(*arguments: Any) -> Any:
        found, phases = read(*arguments)
        largest = max(found, key=lambda event: event.num_bytes)
        return [event for event in found if event is not largest], phases

    read = memory.events
    monkeypatch.setattr(memory, "events", forgets)
    with pytest.raises(ValueError, match="the allocator holds"):
        events_of_step(Row("row", unfused=False, stage=2), SMALL, ParallelContext())


def test_pages_of_files(tmp_path: Path) -> None:
    """What is touched is resident, what is released is not."""
    folder = str(tmp_path.resolve())
    storage = DiskStorage(tmp_path)
    with memory.FilePages(folder, interval=0.0) as pages:
        buffer = storage.zeros("x", 2**20, torch.float32, torch.device("cpu"))
        buffer.fill_(1.0)
        touched = memory.resident_of(folder)
        while len(pages.samples) < 3:
            pass
    assert touched == 4 * 2**20
    assert max(held for _, held in pages.samples) >= 0.9 * touched
    storage.release([buffer])
    assert memory.resident_of(folder) == 0
    assert buffer[5] == 1.0


@pytest.mark.parametrize("forces", ["direct", "conservative"])
def test_rows_change_one_thing_at_a_time(forces: str) -> None:
    """From plain on; and a graph of gradients ends at stage 2, as the configuration has it."""
    plain, again, zero, *ours = table_rows(forces)
    for before, after in [(plain, again), (again, zero), *zip([plain, *ours], ours, strict=False)]:
        changed = [f.name for f in fields(Row) if getattr(before, f.name) != getattr(after, f.name)]
        assert len(changed) == 2
        assert changed[0] == "name"
    assert ours[-1].offload == "disk"
    for row in table_rows("conservative"):
        assert row.stage != 3 or row.method == "one_backward"


def test_names_of_rows() -> None:
    rows = table_rows("direct")
    assert memory_table.chosen(rows, None) == rows
    assert [row.name for row in memory_table.chosen(rows, ["+ ZeRO 3"])] == ["plain", "+ ZeRO 3"]
    with pytest.raises(ValueError, match="there is no row 'ZeRO 9'; the rows are plain, "):
        memory_table.chosen(rows, ["ZeRO 9"])


def test_losses_must_be_plains() -> None:
    plain = {"row": "plain", "losses": [2.0, 1.0]}
    good, bad = {"row": "a", "losses": [2.0, 1.000005]}, {"row": "b", "losses": [2.0, 1.00002]}
    memory_table.check(good, plain)
    assert good["loss_error"] == pytest.approx(5e-6)
    for wrong in (bad, {"row": "c", "losses": [2.0, float("nan")]}):
        with pytest.raises(ValueError, match="the losses must equal plain's to 1e-05"):
            memory_table.check(wrong, plain)


def test_report_keeps_what_is_around(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    path.write_text(f"before\n{memory_table.BEGIN}\nold\n{memory_table.END}\nafter\n")
    for _ in range(2):
        memory_table.put(path, "new")
    assert path.read_text() == f"before\n{memory_table.BEGIN}\n\nnew\n{memory_table.END}\nafter\n"
    path.write_text("no markers")
    with pytest.raises(ValueError, match="must have one line '<!-- written by"):
        memory_table.put(path, "new")


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small table on two ranks; drawn again from its records it is the same."""
    rows = ["+ blocks recomputed", "+ offload to disk"]
    size = ["--ranks", "2", "--width", "32", "--layers", "2", "--edges", "600", "--steps", "1"]
    command = [sys.executable, "-m", TOOL, "--forces", "conservative", *size, "--only", *rows]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, capture_output=True)
    records = memory_table.load(tmp_path / "records.json")
    assert [record["row"] for record in records] == ["plain", *rows]
    for record in records:
        assert record["loss_error"] <= memory_table.TOLERANCE
        assert record["peak_bytes"] == sum(record["at_peak"].values())
        assert np.isclose(record["timeline"].total.max(), record["peak_bytes"])
    plain, blocks, files = records
    assert blocks["peak_bytes"] < 0.7 * plain["peak_bytes"]
    assert files["at_peak"][memory.STATE] == 0
    assert files["timeline"].num_bytes[memory.FILES].max() > 0
    first = (tmp_path / "table.md").read_text()
    assert first == memory_table.table(records)
    assert "| + offload to disk | dp 1 x tp 2 |" in first
    assert (tmp_path / "memory-table-conservative.png").stat().st_size > 10000

    report, again = tmp_path / "report.md", tmp_path / "again"
    report.write_text(f"{memory_table.BEGIN}\n{memory_table.END}\n")
    options = ["--from", str(tmp_path / "records.json"), "--out", str(again), "--report", str(report)]
    monkeypatch.setattr(sys, "argv", [TOOL, *options])
    memory_table.main()
    assert (again / "table.md").read_text() == first
    assert first in report.read_text()
    assert [path.name for path in again.iterdir()] == ["table.md"]  # the picture lies beside the report
