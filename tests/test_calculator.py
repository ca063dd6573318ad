"""The ASE calculator: relaxation, dynamics that conserve energy, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
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


def test_errors(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"one of the model's sources \['clusters', 'crystals'\], none was"):
        MegaGNNCalculator(checkpoint)
    with pytest.raises(ValueError, match="got 'slabs'"):
        MegaGNNCalculator(checkpoint, source="slabs")
    with pytest.raises(ValueError, match=r"levels of theory \['EMT'\], got 'PBE'"):
        MegaGNNCalculator(checkpoint, source="clusters", level="PBE")
    with pytest.raises(ValueError, match="dtype must be 'float32' or 'float64', got 'float16'"):
        MegaGNNCalculator(checkpoint, source="clusters", dtype="float16")
    calculator = MegaGNNCalculator(checkpoint, source="clusters")
    with pytest.raises(
        ValueError, match="holds Au, which the model has never seen in the source 'clusters'; there"
    ):
        Atoms("Au", calculator=calculator).get_potential_energy()
    with pytest.raises(ValueError, match="no atoms"):
        Atoms(calculator=calculator).get_potential_energy()
    with pytest.raises(PropertyNotImplementedError, match="periodic in three directions"):
        Atoms("Cu", calculator=calculator).get_stress()
