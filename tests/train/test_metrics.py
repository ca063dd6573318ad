"""Sums of errors and their table, in numbers."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megagnn.data import keys
from megagnn.parallel.context import ParallelContext
from megagnn.train.metrics import ErrorSums, format_table, grouping


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch() -> dict[str, torch.Tensor]:
    """Two structures of sources 1 and 0, of two atoms and one; the second has no stress."""
    return {
        keys.SOURCE: torch.tensor([1, 0]),
        keys.STRUCTURE: torch.tensor([0, 1]),
        keys.BATCH: torch.tensor([0, 0, 1]),
        keys.NUM_ATOMS: torch.tensor([2, 1]),
        keys.ENERGY: tensor([4.0, 1.0]),
        keys.HAS_ENERGY: torch.tensor([True, True]),
        keys.FORCES: tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 3.0]]),
        keys.HAS_FORCES: torch.tensor([True, True]),
        keys.FIXED: torch.tensor([False, True, False]),
        keys.STRESS: torch.full((2, 3, 3), 0.5, dtype=torch.float64),
        keys.HAS_STRESS: torch.tensor([True, False]),
    }


def sums() -> ErrorSums:
    statistics = SimpleNamespace(sources=("a", "b"), mean_energy=(0.5, 3.0))
    model = SimpleNamespace(reference_energy=lambda batch: tensor([5.0, 1.0]))
    potential: Any = SimpleNamespace(statistics=statistics, model=model)
    return ErrorSums(potential, ParallelContext(), {"files": grouping(np.array(["", "x"]))})


def test_errors_in_numbers() -> None:
    """Per atom, per component and per group, in thousandths."""
    found, given = sums(), batch()
    outputs = {
        keys.ENERGY: tensor([4.4, 0.9]),
        keys.FORCES: given[keys.FORCES] + tensor([[0.3, 0, 0], [9, 9, 9], [0.6, 0, 0]]),
        keys.STRESS: given[keys.STRESS] - 0.2,
    }
    found.add(outputs, given)
    found.reduce()
    assert found.per_source()["b"] == pytest.approx(
        {
            "num_test": 1,
            "energy_mae_mev_per_atom": 200,
            "energy_rmse_mev_per_atom": 200,
            "baseline_energy_mae_mev_per_atom": 500,
            "baseline_energy_rmse_mev_per_atom": 500,
            "mean_baseline_energy_mae_mev_per_atom": 1000,
            "mean_baseline_energy_rmse_mev_per_atom": 1000,
            "force_mae_mev_per_angstrom": 100,
            "force_rmse_mev_per_angstrom": 1e3 * (0.09 / 3) ** 0.5,
            "baseline_force_mae_mev_per_angstrom": 1e3 / 3,
            "baseline_force_rmse_mev_per_angstrom": 1e3 / 3**0.5,
            "stress_mae_mev_per_cubic_angstrom": 200,
            "stress_rmse_mev_per_cubic_angstrom": 200,
            "baseline_stress_mae_mev_per_cubic_angstrom": 500,
            "baseline_stress_rmse_mev_per_cubic_angstrom": 500,
        }
    )
    assert found.per_source()["a"]["force_mae_mev_per_angstrom"] == pytest.approx(200)
    assert "stress_mae_mev_per_cubic_angstrom" not in found.per_source()["a"]
    files = found.per_group("files")
    assert files["x"] == found.per_source()["a"]
    assert files["(none)"] == found.per_source()["b"]


def test_outputs_without_forces_and_stress() -> None:
    found = sums()
    found.add({keys.ENERGY: tensor([4.4, 0.9])}, batch())
    assert set(found.per_source()["b"]) == {
        "num_test",
        *(
            f"{kind}energy_{of}_mev_per_atom"
            for kind in ("", "baseline_", "mean_baseline_")
            for of in ("mae", "rmse")
        ),
    }


def test_table() -> None:
    groups = {
        "short": {"num_test": 7, "energy_mae_mev_per_atom": 1.25},
        "much longer": {"num_test": 12, "force_mae_mev_per_angstrom": 30.04},
    }
    assert format_table(groups).splitlines() == [
        "source        structures   energy MAE    force MAE",
        "                             meV/atom        meV/Å",
        "--------------------------------------------------",
        "short                  7          1.2            -",
        "much longer           12            -         30.0",
    ]
