"""The ASE calculator: relaxation, dynamics that conserve energy, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import PropertyNotImplementedError
from ase.cluster import Octahedron
from ase.md.velocitydistribution import Stationary
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

from megagnn.calculator import MegaGNNCalculator
from tests import runs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that binds: trained longer than elsewhere, on the same small data."""
    store = runs.write_data(tmp_path_factory.mktemp("data") / "store")
    out_dir = tmp_path_factory.mktemp("runs") / "binding"
    assert runs.train(store, out_dir, "--train.num_steps", "300", "--train.validate_every", "100") == 0
    return out_dir / "checkpoints" / "best.safetensors"


@pytest.fixture
def cluster(checkpoint: Path) -> Atoms:
    atoms = Octahedron("Cu", 2, 0)
    atoms.rattle(0.1, seed=5)
    atoms.calc = MegaGNNCalculator(checkpoint, source="clusters")
    return atoms


def test_a_cluster_relaxes(cluster: Atoms) -> None:
    before = cluster.get_potential_energy()
    assert BFGS(cluster, logfile=None).run(fmax=0.01, steps=200)
    assert cluster.get_potential_energy() < before - 0.01


def test_energy_is_conserved(cluster: Atoms) -> None:
    """NVE at 300 K, 2,000 steps of 0.5 fs, float64: the total energy drifts by less than 1 meV per atom."""
    BFGS(cluster, logfile=None).run(fmax=0.05, steps=200)
    spread = np.sqrt(cluster.get_masses() * units.kB * 2 * 300)[:, None]
    cluster.set_momenta(spread * np.random.default_rng(0).normal(size=(len(cluster), 3)))
    Stationary(cluster)
    dynamics = VelocityVerlet(cluster, timestep=0.5 * units.fs)
    energies: list[float] = []
    temperatures: list[float] = []
    dynamics.attach(lambda: energies.append(cluster.get_total_energy() / len(cluster)), interval=10)
    dynamics.attach(lambda: temperatures.append(cluster.get_temperature()), interval=10)
    dynamics.run(2000)
    assert len(energies) == 201
    assert np.ptp(energies) < 1e-3
    assert 50 < np.mean(temperatures) < 600, "the atoms should move"


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
    calculator = MegaGNNCalculator(checkpoint, source="clusters")
    with pytest.raises(ValueError, match="holds Au, which the model has never seen; it knows Cu, Ag"):
        Atoms("Au", calculator=calculator).get_potential_energy()
    with pytest.raises(ValueError, match="no atoms"):
        Atoms(calculator=calculator).get_potential_energy()
    with pytest.raises(PropertyNotImplementedError, match="periodic in three directions"):
        Atoms("Cu", calculator=calculator).get_stress()
