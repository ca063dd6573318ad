"""The tool's tables at small sizes, against formulas."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import micro_batches
import numpy as np
import pipeline_table
import pytest


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def test_ordinary_and_forces() -> None:
    args = Namespace(stages=[4], per_stage=[2])
    (row,) = cells(pipeline_table.ordinary_table(args))
    assert row == ["4", "8", "27.3 / 27.3 / 15.8 / 11.1", "1.00 / 1.00 / 1.16 / 1.22", "8 / 4 / 5.5 / 4"]
    (row,) = cells(pipeline_table.forces_table(args))
    assert row[:8] == ["4", "8", "27.3", "19.0 (19.0)", "37.5", "1.11", "0.84", "8, 8"]
    assert row[-1] == "8, 8"


def test_small_tables() -> None:
    args = Namespace(stages=[2], per_stage=[2])
    assert cells(pipeline_table.recomputed_table(args))[0][:5] == ["2", "4", "1.08", "0.59", "36.4"]


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plot, trace = tmp_path / "a.png", tmp_path / "a.json"
    options = ["--tables", "--stages", "2", "--per-stage", "2", "--plot", str(plot), "--trace", str(trace)]
    monkeypatch.setattr(sys, "argv", ["pipeline_table.py", *options])
    pipeline_table.main()
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert json.loads(trace.read_text())["traceEvents"]


def test_micro_batches() -> None:
    """Uneven structures: dealt over a step's micro-batches they cost nearly what even ones cost."""
    rng = np.random.default_rng(0)
    atoms = rng.integers(2, 30, 600)
    data = SimpleNamespace(num_atoms=atoms, num_edges=atoms * rng.integers(5, 20, 600))
    rows = micro_batches.rows_of(data, [(4, 8, 2)], {"max_atoms": 200, "max_edges": 1500})  # type: ignore[arg-type]
    for row in rows:
        even, drawn, dealt, hill = (float(str(cell)) for cell in row[4:8])
        assert hill <= dealt < drawn
        assert hill < even + 1 < drawn, row[3]
