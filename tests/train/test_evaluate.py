"""Errors per source against labels computed by hand, and what `megagnn evaluate` refuses."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

from megagnn.calculator import MegaGNNCalculator
from megagnn.cli import main
from megagnn.data.record import Structure
from megagnn.data.store import write_store
from megagnn.train.checkpoint import load_checkpoint
from tests import runs


def evaluate(checkpoint: Path, store: Path, out: Path, *arguments: str) -> dict:
    assert main(["evaluate", str(checkpoint), str(store), "--json", str(out), *arguments]) == 0
    return json.loads(out.read_text())["sources"]


def test_metrics_equal_a_loop_over_structures(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    """Through another door: the ASE calculator on every test structure of one source."""
    metrics = evaluate(checkpoint, store, tmp_path / "metrics.json")
    assert set(metrics) == {"clusters", "crystals"}
    statistics = load_checkpoint(checkpoint).statistics
    calculator = MegaGNNCalculator(checkpoint, source="clusters", dtype="float32")
    errors, baselines, means, forces, zero = [], [], [], [], []
    tests = [s for s in runs.structures() if s.source == "clusters" and int(s.group) // 2 in (5, 11)]
    for s in tests:
        atoms = Atoms(s.atomic_numbers, s.positions, calculator=calculator)
        n = len(atoms)
        references = dict(zip(statistics.elements, statistics.references[0], strict=True))
        errors.append((atoms.get_potential_energy() - s.energy) / n)
        baselines.append((sum(references[z] for z in s.atomic_numbers) - s.energy) / n)
        means.append(statistics.mean_energy[0] - s.energy / n)
        forces.append(atoms.get_forces() - s.forces)
        zero.append(s.forces)
    got = metrics["clusters"]
    assert got["num_test"] == len(tests) == 6
    for key, values in [
        ("energy_{}_mev_per_atom", errors),
        ("baseline_energy_{}_mev_per_atom", baselines),
        ("mean_baseline_energy_{}_mev_per_atom", means),
        ("force_{}_mev_per_angstrom", forces),
        ("baseline_force_{}_mev_per_angstrom", zero),
    ]:
        values = np.concatenate([np.ravel(v) for v in values])
        assert got[key.format("mae")] == pytest.approx(1e3 * np.abs(values).mean(), rel=1e-4)
        assert got[key.format("rmse")] == pytest.approx(1e3 * np.sqrt((values**2).mean()), rel=1e-4)


def test_parity_plot(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plots" / "parity.png"
    evaluate(checkpoint, store, tmp_path / "metrics.json", "--plot", str(plot))
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_other_split_and_weights(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    average = evaluate(checkpoint, store, tmp_path / "a.json", "--split", "valid")
    last = evaluate(checkpoint, store, tmp_path / "b.json", "--split", "valid", "--last-weights")
    key = "energy_mae_mev_per_atom"
    assert average["clusters"][key] != last["clusters"][key]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"atomic_numbers": np.array([79, 47], dtype=np.uint8)},
            "Au, which the model has never seen in the source .clusters.; there it knows Cu, Ag",
        ),
        ({"source": "rings"}, r"source\(s\) \['rings'\], the model knows \['clusters', 'crystals'\]"),
        ({"level": "PBE"}, r"level\(s\) \['PBE'\], the model knows \['EMT'\]"),
    ],
    ids=["element", "source", "level"],
)
def test_what_the_model_does_not_know(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict,
    message: str,
) -> None:
    fields = {
        "atomic_numbers": np.array([29, 47], dtype=np.uint8),
        "positions": np.array([[0, 0, 0], [0, 0, 2.5]]),
        "cell": np.zeros((3, 3)),
        "pbc": np.zeros(3, dtype=bool),
        "energy": 1.0,
        "source": "clusters",
        "level": "EMT",
    }
    write_store(tmp_path / "store", [Structure(**{**fields, **changes})], splits=np.array([2]))
    out = tmp_path / "metrics.json"
    assert main(["evaluate", str(checkpoint), str(tmp_path / "store"), "--json", str(out)]) == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))
    assert not out.exists()


def test_an_empty_split_and_an_unreadable_store(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = runs.structures()
    write_store(tmp_path / "train-only", records, splits=np.zeros(len(records), dtype=np.uint8))
    assert main(["evaluate", str(checkpoint), str(tmp_path / "train-only")]) == 2
    assert "the test split of" in capsys.readouterr().err
    assert main(["evaluate", str(checkpoint), str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
