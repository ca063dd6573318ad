"""References from isolated atoms, files, or none: what a run makes of them, from files to the calculator."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms

from megagnn.calculator import MegaGNNCalculator
from megagnn.checkpoint.single_file import load_potential, open_checkpoint
from megagnn.cli import main
from megagnn.data.dataset import StructureDataset
from megagnn.models.egnn.config import EGNNConfig
from megagnn.models.potential import build_potential
from megagnn.models.statistics import ZERO_FORCES, Statistics, compute_statistics
from megagnn.parallel.context import ParallelContext
from megagnn.train.loader import BatchLoader
from tests.data.trajectories import FREE_ATOMS, isolated, labelled, molecules, write

CONFIG = """
[model]
width = 16
num_layers = 2
num_radial = 8
cutoff = 4.0
[data]
max_structures = 8
[optim]
learning_rate = 5e-3
warmup_steps = 2
[train]
threads = 1
num_steps = {steps}
validate_every = {steps}
checkpoint_every = {steps}
"""


def prepared(folder: Path, frames: list[Atoms], *arguments: str) -> Path:
    file = write(folder / "mols.xyz", frames)
    assert (
        main(["prepare", str(file), "--out", str(folder / "store"), "--group-by", "frame", *arguments]) == 0
    )
    return folder / "store"


def trained(folder: Path, store: Path, *overrides: str, steps: int = 4) -> Path:
    (folder / "c.toml").write_text(CONFIG.format(steps=steps))
    arguments = ["--data.paths", str(store), "--out_dir", str(folder / "run"), *overrides]
    assert main(["train", str(folder / "c.toml"), *arguments]) == 0
    return folder / "run" / "checkpoints" / "best.safetensors"


def some_molecules() -> list[Atoms]:
    return [f for name in ("CH4", "H2O", "CH3OH", "CO2", "C2H6", "H2CO") for f in molecules(name, 6)]


def atoms_alone() -> list[Atoms]:
    return [isolated(symbol, FREE_ATOMS[symbol]) for symbol in ("H", "C", "O")]


def test_isolated_atoms_fix_references_and_the_shift_takes_the_bonds(tmp_path: Path) -> None:
    store = prepared(tmp_path, some_molecules() + atoms_alone())
    dataset = StructureDataset([store], "train", 4.0)
    statistics = compute_statistics(dataset)
    assert statistics.references == ((FREE_ATOMS["H"], FREE_ATOMS["C"], FREE_ATOMS["O"]),)
    known = dict(zip(statistics.elements, statistics.references[0], strict=True))
    # the shift is the mean energy of bonds per atom, which EMT gives
    bonds = []
    for index in range(len(dataset)):
        record = dataset.record(index)
        if len(record["atomic_numbers"]) > 1:
            free = sum(known[z] for z in record["atomic_numbers"])
            bonds.append((record["energy"] - free) / len(record["atomic_numbers"]))
    assert statistics.shifts[0] == pytest.approx(np.mean(bonds), rel=1e-9)
    assert abs(statistics.shifts[0]) > 0.1
    # the model's constant part holds both
    model = build_potential(EGNNConfig(width=16, num_layers=1, cutoff=4.0), statistics).model
    batch = dataset.batch([0])
    first = dataset.record(0)["atomic_numbers"]
    expected = sum(known[z] + statistics.shifts[0] for z in first)
    assert float(model.reference_energy(batch)) == pytest.approx(expected, rel=1e-12)


def test_fitted_references_have_no_shift(tmp_path: Path) -> None:
    statistics = compute_statistics(StructureDataset([prepared(tmp_path, some_molecules())], "train", 4.0))
    assert statistics.shifts == (0.0,)
    assert statistics.unspanned == ((),)


def test_statistics_of_older_checkpoints_have_neither(tmp_path: Path) -> None:
    statistics = compute_statistics(StructureDataset([prepared(tmp_path, some_molecules())], "train", 4.0))
    values = statistics.to_dict()
    del values["shifts"], values["unspanned"]
    old = Statistics.from_dict(values)
    assert old.baseline() == statistics.references
    assert old.span_fault([1, 1], 0) == ""
    assert Statistics.from_dict(replace(statistics, shifts=(0.5,)).to_dict()).shifts == (0.5,)


def errors(checkpoint: Path, store: Path, split: str) -> tuple[float, float]:
    """Mean absolute energy error per atom, eV, of molecules and of isolated atoms."""
    opened = open_checkpoint(checkpoint)
    potential, config = load_potential(opened), opened.config
    dataset = StructureDataset([store], split, config.model.cutoff)
    loader = BatchLoader(dataset, config, ParallelContext(), shuffle=False)
    found: dict[bool, list[float]] = {True: [], False: []}
    with torch.no_grad():
        for batch in loader.batches():
            off = ((potential(batch)["energy"] - batch["energy"]) / batch["num_atoms"]).abs()
            for error, num_atoms in zip(off.tolist(), batch["num_atoms"].tolist(), strict=True):
                found[num_atoms == 1].append(error)
    return float(np.mean(found[False])), float(np.mean(found[True] or [np.nan]))


def test_fixed_references_train_as_well_as_fitted_ones(tmp_path: Path) -> None:
    """Isolated atoms in the training data: their energies are learnt, and molecules' as well as without."""
    result = {}
    for name, extra in (("fitted", []), ("fixed", atoms_alone())):
        folder = tmp_path / name
        folder.mkdir()
        store = prepared(folder, some_molecules() + extra)
        weight = ["--loss.energy_weight", "10"]
        result[name] = errors(trained(folder, store, *weight, steps=100), store, "train")
    assert result["fixed"][0] < 1.5 * result["fitted"][0] + 0.01
    assert result["fixed"][1] < 0.5 * abs(shift_of(tmp_path / "fixed"))


def shift_of(folder: Path) -> float:
    return open_checkpoint(folder / "run" / "checkpoints" / "best.safetensors").statistics.shifts[0]


def test_a_run_on_energies_goes_on_with_other_references(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its output scale follows from the references, and is no sign of other data."""
    frames = [labelled(a, energy=a.calc.results["energy"]) for a in some_molecules()]
    store = prepared(tmp_path, frames)
    only = ("--model.forces", "none", "--loss.force_weight", "0")
    trained(tmp_path, store, *only)
    (tmp_path / "r.txt").write_text("H -3.0")
    given = ("--data.reference_energies", str(tmp_path / "r.txt"))
    trained(tmp_path, store, *only, *given, "--resume", steps=5)
    prepared(tmp_path, frames[1:], "--overwrite")
    arguments = ["--data.paths", str(store), "--out_dir", str(tmp_path / "run"), *only, "--resume"]
    assert main(["train", str(tmp_path / "c.toml"), *arguments]) == 2
    assert "the training data are not those of the run" in capsys.readouterr().err


def test_references_of_a_file_in_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = prepared(tmp_path, some_molecules())
    (tmp_path / "e.toml").write_text("[mols]\nH = -13.6\nC = -1029.5\n")
    checkpoint = trained(tmp_path, store, "--data.reference_energies", str(tmp_path / "e.toml"))
    assert open_checkpoint(checkpoint).statistics.references[0][:2] == (-13.6, -1029.5)
    assert "none for O, which are fitted" in capsys.readouterr().err
    arguments = ["--data.reference_energies", str(tmp_path / "none"), "--overwrite"]
    assert main(["train", str(tmp_path / "c.toml"), "--data.paths", str(store), *arguments]) == 2
    assert "cannot read the reference energies" in capsys.readouterr().err


def test_compositions_beyond_the_data_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained on water alone, hydrogen was -1660 eV without a word."""
    store = prepared(tmp_path, list(molecules("H2O", 12)))
    capsys.readouterr()
    checkpoint = trained(tmp_path, store)
    assert capsys.readouterr().err.count("do not determine the reference energies of H, O") == 1
    calculator = MegaGNNCalculator(checkpoint)
    water, hydrogen = Atoms("H2O", positions=np.eye(3)), Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.74]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        water.calc = calculator
        water.get_potential_energy()
    hydrogen.calc = calculator
    with pytest.warns(UserWarning, match=r"H2: the training energies .* do not determine"):
        energy = hydrogen.get_potential_energy()
    assert -40 < energy < -20  # of usual size: 2 x -13.6 and a bond
    hydrogen.positions[1, 2] = 0.8
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once for each composition
        hydrogen.get_potential_energy()


def test_training_on_forces_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = [labelled(f, forces=f.calc.results["forces"]) for f in some_molecules()]
    store = prepared(tmp_path, frames)
    capsys.readouterr()
    (tmp_path / "c.toml").write_text(CONFIG.format(steps=4))
    refused = [
        "train",
        str(tmp_path / "c.toml"),
        "--data.paths",
        str(store),
        "--out_dir",
        str(tmp_path / "no"),
    ]
    assert main(refused) == 2
    assert "set loss.energy_weight = 0" in capsys.readouterr().err
    options = ["--loss.energy_weight", "0", "--data.num_structures", "20"]
    checkpoint = trained(tmp_path, store, *options)
    assert "no training structure has an energy" in capsys.readouterr().err
    assert main(["evaluate", str(checkpoint), str(store)]) == 0
    printed = capsys.readouterr().out
    assert "force MAE" in printed
    assert "energy MAE" not in printed
    atoms = Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.74]], calculator=MegaGNNCalculator(checkpoint))
    with pytest.warns(UserWarning, match="was trained without energies"):
        assert np.isfinite(atoms.get_forces()).all()


def test_forces_that_are_all_zero_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They give no scale of the output; one force that is not zero does."""
    frames = [
        labelled(f, energy=f.get_potential_energy(), forces=np.zeros((len(f), 3))) for f in some_molecules()
    ]
    store = prepared(tmp_path, frames)
    told: list[str] = []
    assert compute_statistics(StructureDataset([store], "train", 4.0), told=told).output_scale == 1.0
    assert told == [ZERO_FORCES]
    capsys.readouterr()
    trained(tmp_path, store, steps=3)
    assert capsys.readouterr().err.count("all forces of the training structures are exactly 0") == 1


def test_forces_that_are_not_all_zero_are_not_told(tmp_path: Path) -> None:
    told: list[str] = []
    compute_statistics(StructureDataset([prepared(tmp_path, some_molecules())], "train", 4.0), told=told)
    assert told == []


def test_training_repeats_what_prepare_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = list(molecules("CH3CH2OH", 12))
    frames[5] = labelled(frames[5], **{**frames[5].calc.results, "energy": -9000.0})
    store = prepared(tmp_path, frames)
    assert "energies are far off the others" in capsys.readouterr().out
    trained(tmp_path, store, steps=3)
    assert capsys.readouterr().err.count("energies are far off the others") == 1


def test_scales_in_numbers(tmp_path: Path) -> None:
    """Without forces the unit is the root mean square energy per atom that the references leave over."""
    frames = [Atoms("H2", [[0, 0, 0], [0, 0, 0.7 + 0.01 * k]]) for k in range(12)]
    energies = [-4.0 + 2 * (k % 2) for k in range(12)]
    store = prepared(tmp_path, [labelled(f, energy=e) for f, e in zip(frames, energies, strict=True)])
    dataset = StructureDataset([store], "train", 4.0)
    statistics = compute_statistics(dataset)
    kept = np.array([dataset.record(k)["energy"] / 2 for k in range(len(dataset))])
    assert statistics.references[0][0] == pytest.approx(kept.mean(), rel=1e-6)
    assert statistics.output_scale == pytest.approx(kept.std(), rel=1e-6)
    assert statistics.mean_energy[0] == pytest.approx(kept.mean(), rel=1e-6)
    assert statistics.mean_neighbours == 1.0
