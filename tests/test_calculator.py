"""The ASE calculator: relaxation, dynamics that conserve energy, and what it refuses."""

import dataclasses
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter
from ase.md.velocitydistribution import Stationary
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

from megagnn.calculator import MegaGNNCalculator
from megagnn.cli import main
from tests import runs

SAMPLE = Path(__file__).resolve().parent.parent / "examples" / "data" / "three-sources.tar.xz"
MOLECULES = """
[model]
width = 32
num_layers = 2
num_radial = 8
cutoff = 4.0
[data]
max_atoms = 512
max_edges = 5000
[loss]
energy = "mae"
energy_weight = 1.0
final_energy_factor = 1.0
forces = "huber"
[optim]
learning_rate = 8e-3
warmup_steps = 20
[train]
num_steps = 200
validate_every = 200
threads = 1
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the small metallic data set."""
    store = runs.write_data(tmp_path_factory.mktemp("data") / "store")
    out_dir = tmp_path_factory.mktemp("runs") / "metals"
    assert runs.train(store, out_dir) == 0
    return out_dir / "checkpoints" / "best.safetensors"


@pytest.fixture(scope="module")
def molecular_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of the embedded data, trained until it binds molecules."""
    folder = tmp_path_factory.mktemp("molecules")
    assert main(["prepare", str(SAMPLE), "--out", str(folder / "store")]) == 0
    (folder / "config.toml").write_text(MOLECULES)
    arguments = ["--data.paths", str(folder / "store"), "--out_dir", str(folder / "run")]
    assert main(["train", str(folder / "config.toml"), *arguments]) == 0
    return folder / "run" / "checkpoints" / "best.safetensors"


@pytest.fixture
def ethanol(molecular_checkpoint: Path) -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.03, seed=5)
    atoms.calc = MegaGNNCalculator(molecular_checkpoint, source="molecules-gfn2")
    return atoms


def test_a_molecule_relaxes(ethanol: Atoms) -> None:
    before = ethanol.get_potential_energy()
    assert BFGS(ethanol, logfile=None).run(fmax=0.01, steps=300)
    assert ethanol.get_potential_energy() < before - 0.05
    assert 1.2 < ethanol.get_distance(0, 1) < 1.9, "the carbon atoms should stay bound"


def test_energy_is_conserved(ethanol: Atoms) -> None:
    """NVE at 300 K, 2,000 steps of 0.5 fs, float64: the total energy drifts by less than 1 meV per atom."""
    BFGS(ethanol, logfile=None).run(fmax=0.02, steps=300)
    # in a relaxed molecule half of the kinetic energy goes into the bonds
    spread = np.sqrt(ethanol.get_masses() * units.kB * 2 * 300)[:, None]
    ethanol.set_momenta(spread * np.random.default_rng(0).normal(size=(len(ethanol), 3)))
    Stationary(ethanol)
    dynamics = VelocityVerlet(ethanol, timestep=0.5 * units.fs)
    energies: list[float] = []
    temperatures: list[float] = []
    dynamics.attach(lambda: energies.append(ethanol.get_total_energy() / len(ethanol)), interval=10)
    dynamics.attach(lambda: temperatures.append(ethanol.get_temperature()), interval=10)
    dynamics.run(2000)
    assert len(energies) == 201
    assert abs(np.polyfit(np.linspace(0, 1, len(energies)), energies, 1)[0]) < 1e-3
    assert np.ptp(energies) < 2e-3, "the fluctuation of the integrator itself"
    assert 150 < np.mean(temperatures) < 600, "the atoms should move"


def test_stress(checkpoint: Path) -> None:
    """Stress by strain derivative on a crystal, against a central difference of the energy."""
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    atoms.calc = MegaGNNCalculator(checkpoint, source="crystals")
    stress = atoms.get_stress(voigt=False)
    h = 1e-5
    energies = []
    for sign in (-1, 1):
        strained = atoms.copy()
        strain = np.eye(3)
        strain[0, 0] += sign * h
        strained.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        strained.calc = atoms.calc
        energies.append(strained.get_potential_energy())
    assert stress[0, 0] == pytest.approx((energies[1] - energies[0]) / (2 * h * atoms.get_volume()), rel=1e-5)


def rattled(checkpoint: Path, source: str = "crystals") -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.symbols[0] = "Ag"
    atoms.rattle(0.1, seed=1)
    atoms.calc = MegaGNNCalculator(checkpoint, source=source)
    return atoms


@pytest.mark.parametrize("source", ["crystals", "clusters"])
def test_atomic_energies(checkpoint: Path, source: str) -> None:
    atoms = rattled(checkpoint, source)
    energies = atoms.get_potential_energies()
    assert energies.shape == (4,)
    assert energies.sum() == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
    assert np.ptp(energies[1:]) > 1e-6, "atoms of one element differ by their neighbours"
    swapped = atoms[[3, 2, 1, 0]]
    swapped.calc = atoms.calc
    assert swapped.get_potential_energies() == pytest.approx(energies[::-1], abs=1e-10)
    single = Atoms("Cu", calculator=atoms.calc)
    assert single.get_potential_energies() == pytest.approx([single.get_potential_energy()], abs=1e-12)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_within_a_mode_without_gradients(checkpoint: Path, mode: type[torch.no_grad]) -> None:
    """A program that keeps all of its inference in such a block gets the same forces and stress."""
    expected = rattled(checkpoint)
    outside = rattled(checkpoint)
    with mode():
        inside = rattled(checkpoint)  # loaded there, too
        for atoms in (inside, outside):
            assert np.abs(atoms.get_forces() - expected.get_forces()).max() < 1e-12
            assert np.abs(atoms.get_stress() - expected.get_stress()).max() < 1e-12
            VelocityVerlet(atoms, timestep=units.fs).run(5)
    assert np.abs(inside.positions - outside.positions).max() < 1e-12
    assert np.abs(inside.positions - expected.positions).max() > 1e-4
    assert np.isfinite(inside.get_forces()).all(), "and after the block"


def test_a_cell_relaxes(checkpoint: Path) -> None:
    """Positions and cell together, one atom held fixed: its force is there, but does not move it."""
    atoms = rattled(checkpoint)
    atoms.set_constraint(FixAtoms([0]))
    before = atoms.get_potential_energy(), atoms.get_volume()
    BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-3, steps=5)
    assert atoms.get_potential_energy() < before[0]
    assert atoms.get_volume() != pytest.approx(before[1], rel=1e-6)
    assert np.abs(atoms.calc.results["forces"][0]).max() > 0
    assert np.abs(atoms.get_forces()[0]).max() == 0


def test_errors(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"one of the model's sources \['clusters', 'crystals'\], none was"):
        MegaGNNCalculator(checkpoint)
    with pytest.raises(ValueError, match="got 'slabs'"):
        MegaGNNCalculator(checkpoint, source="slabs")
    with pytest.raises(ValueError, match=r"levels of theory \['EMT'\], got 'PBE'"):
        MegaGNNCalculator(checkpoint, source="clusters", level="PBE")
    with pytest.raises(ValueError, match="dtype must be 'float32' or 'float64', got 'float16'"):
        MegaGNNCalculator(checkpoint, source="clusters", dtype="float16")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device is 'cuda' but PyTorch sees no GPU here; use 'cpu'"):
            MegaGNNCalculator(checkpoint, source="clusters", device="cuda")
    calculator = MegaGNNCalculator(checkpoint, source="clusters")
    with pytest.raises(
        ValueError, match="holds Au, which the model has never seen in the source 'clusters'; there"
    ):
        Atoms("Au", calculator=calculator).get_potential_energy()
    with pytest.raises(ValueError, match="no atoms"):
        Atoms(calculator=calculator).get_potential_energy()
    with pytest.raises(PropertyNotImplementedError, match="periodic in three directions"):
        Atoms("Cu", calculator=calculator).get_stress()


def test_the_example_relaxes_and_conserves(
    molecular_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = runpy.run_path(str(SAMPLE.parents[1] / "relax_and_run.py"))
    example["main"]([str(molecular_checkpoint), "--picoseconds", "0.1"])
    told = capsys.readouterr().out
    assert re.search(r"relaxed: \d+ steps, converged True, energy -", told)
    found = re.search(r"200 steps of 0.5 fs at (\d+) K.* drifts by ([-+.\d]+) meV/atom", told)
    assert found
    assert 100 < float(found[1]) < 700
    assert abs(float(found[2])) < 1.0


def test_the_example_of_silicon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a model of one source, which need not be named; weak forces end the relaxation soon."""
    silicon = runs.gold(source="silicon")
    records = [
        dataclasses.replace(
            s, atomic_numbers=np.full_like(s.atomic_numbers, 14), forces=1e-3 * s.forces, stress=None
        )
        for s in silicon
    ]
    store = runs.write_gold(tmp_path / "store", records)
    short = ("--train.num_steps", "2", "--train.validate_every", "2", "--optim.warmup_steps", "1")
    assert (
        runs.train(store, tmp_path / "run", *short, "--model.stress", "false", "--loss.stress_weight", "0")
        == 0
    )
    example = runpy.run_path(str(SAMPLE.parents[1] / "relax_and_run.py"))
    checkpoint = tmp_path / "run" / "checkpoints" / "best.safetensors"
    capsys.readouterr()
    example["main"]([str(checkpoint), "--structure", "silicon", "--picoseconds", "0.01"])
    told = capsys.readouterr().out
    assert re.search(r"relaxed: \d+ steps, converged \w+, energy [-+]", told)
    found = re.search(r"10 steps of 1.0 fs at (\d+) K.* drifts by ([-+.\d]+) meV/atom", told)
    assert found
    assert float(found[1]) > 100
    assert abs(float(found[2])) < 1.0
