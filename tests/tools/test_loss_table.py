"""The table of losses, from lines written by hand."""

from pathlib import Path

import loss_table
import pytest

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
    assert loss_table.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "silicon"
    assert lines[4] == "| a | 2 | 55 ± 5 / 10.0 ± 0.0 | 110 ± 10 / 20.0 ± 0.0 | 1.00 |"
    assert lines[5] == "| b | 1 | 28 / 5.0 | 55 / 10.0 | 0.50 |"
