"""Tables and plots of recipes, from lines written by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import recipe_table

from megagnn.scaling.laws.record import RunRecord


def record(recipe: str, seed: int, force: float, energy: float) -> RunRecord:
    losses = {"force_mae": (force, "eV/Å"), "energy_mae": (energy, "eV/atom")}
    losses |= {f"valid/{name}": (value / 2, unit) for name, (value, unit) in losses.items()}
    name = f"{recipe}-s{seed}"
    return RunRecord(name, recipe, 8, 2, 100, 10, 50, seed, 1e-3, 1e9, 10, 1.0, losses)


def test_means_spread_and_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [record("a", 0, 0.1, 0.02), record("a", 1, 0.12, 0.02), record("b", 0, 0.055, 0.01)]
    path = tmp_path / "silicon.jsonl"
    path.write_text("".join(r.to_json() + "\n" for r in records))
    assert recipe_table.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "silicon"
    assert lines[4] == "| a | 2 | 55 ± 5 / 10.0 ± 0.0 | 110 ± 10 / 20.0 ± 0.0 | 1.00 |"
    assert lines[5] == "| b | 1 | 28 / 5.0 | 55 / 10.0 | 0.50 |"


def test_rates_where_they_differ() -> None:
    records = [record("a", 0, 0.1, 0.02), replace(record("a", 0, 0.1, 0.02), learning_rate=2e-3)]
    assert [row[:3] for row in recipe_table.rows(records)] == [
        ["recipe", "rate", "seeds"],
        ["a", "0.001", "1"],
        ["a", "0.002", "1"],
    ]


def test_curve_of_a_run(tmp_path: Path) -> None:
    lines = [{"step": 20 * k, "loss/train": 1.0 / k} for k in range(1, 21)]
    lines += [{"step": 20 * k, recipe_table.PROCESSOR_SECONDS: 3.0 * k} for k in (1, 10, 20)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = recipe_table.curve(path)
    assert found[0].tolist() == pytest.approx([120, 18.0, (1 / 3 + 1 / 4) / 2])
    assert found[-1].tolist() == pytest.approx([400, 60.0, (1 / 17 + 1 / 18) / 2])
