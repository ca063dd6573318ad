"""Writes the HDF5 test files of published layouts with h5py: `python tools/sample_files/hdf5.py DIR`.

Labels are of a harmonic spring, so that forces are minus the gradient of the energy.
"""

import sys
from pathlib import Path

import h5py
import numpy as np

HA, BOHR = 27.211386245988, 0.529177210903  # CODATA 2018, eV and Å
STIFFNESS = 5.0  # eV/Å^2


def spring(positions: np.ndarray) -> tuple[float, np.ndarray]:
    """Energy, eV, and forces, eV/Å, of bonds of 1 Å from the first atom to the others."""
    bonds = positions[1:] - positions[0]
    lengths = np.linalg.norm(bonds, axis=1, keepdims=True)
    pulls = STIFFNESS * (lengths - 1) * bonds / lengths
    return 0.5 * STIFFNESS * float(((lengths - 1) ** 2).sum()), np.vstack([pulls.sum(0), -pulls])


def conformations(num_atoms: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions (C, N, 3), energies (C,) below -100 eV per atom, and forces (C, N, 3)."""
    rng = np.random.default_rng(seed)
    corners = np.vstack([np.zeros(3), np.eye(3), -np.eye(3)])[:num_atoms]
    positions = corners + rng.normal(0, 0.02, (count, num_atoms, 3))
    labels = [spring(x) for x in positions]
    return positions, np.array([e for e, _ in labels]) - 100.0 * num_atoms, np.array([f for _, f in labels])


def ani1x(path: Path) -> None:
    """Two groups; the best level is computed for every third conformation."""
    with h5py.File(path, "w") as file:
        for seed, (name, numbers) in enumerate({"C1H4": [6, 1, 1, 1, 1], "H2O1": [8, 1, 1]}.items()):
            x, e, f = conformations(len(numbers), 6, seed)
            group = file.create_group(name)
            group["atomic_numbers"] = np.array(numbers, dtype=np.uint8)
            group["coordinates"] = x.astype(np.float32)
            group["wb97x_dz.energy"], group["wb97x_dz.forces"] = e / HA, (f / HA).astype(np.float32)
            group["ccsd(t)_cbs.energy"] = np.where(np.arange(6) % 3 == 0, e / HA - 0.1, np.nan)
            group["wb97x_tz.energy"] = np.full(6, np.nan)
            group["wb97x_tz.forces"] = np.full(x.shape, np.nan, dtype=np.float32)


def spice(path: Path) -> None:
    """Two molecules, in atomic units, with gradients."""
    with h5py.File(path, "w") as file:
        for seed, (name, numbers) in enumerate({"methane": [6, 1, 1, 1, 1], "water": [8, 1, 1]}.items()):
            x, e, f = conformations(len(numbers), 4, seed)
            group = file.create_group(name)
            group["smiles"] = [name.encode()]
            group["subset"] = [b"SPICE Test"]
            group["atomic_numbers"] = np.array(numbers, dtype=np.int16)
            group["conformations"] = (x / BOHR).astype(np.float32)
            group["dft_total_energy"] = e / HA
            group["dft_total_gradient"] = (-f * BOHR / HA).astype(np.float32)
            group["formation_energy"] = e / HA + 3


def qm7x(path: Path) -> None:
    """Two molecules of three conformations."""
    with h5py.File(path, "w") as file:
        for seed, molecule in enumerate(("1", "10")):
            numbers = [8, 1, 1] if seed else [6, 1, 1, 1, 1]
            x, e, f = conformations(len(numbers), 3, seed)
            for k in range(3):
                conformation = f"Geom-m{molecule}-i1-c1-{'opt' if k == 0 else f'd{k}'}"
                group = file.create_group(f"{molecule}/{conformation}")
                group["atNUM"], group["atXYZ"] = np.array(numbers), x[k]
                group["ePBE0+MBD"], group["ePBE0"] = e[k : k + 1], e[k : k + 1] + 0.5
                group["totFOR"], group["pbe0FOR"] = f[k], 0.9 * f[k]


def mace(path: Path) -> None:
    """As `save_configurations_as_HDF5` of mace/data/utils.py writes it: None is the text "None"."""
    with h5py.File(path, "w") as file:
        batch = file.create_group("config_batch_0")
        x, e, f = conformations(3, 4, 7)
        for k in range(4):
            group = batch.create_group(f"config_{k}")
            group["atomic_numbers"], group["positions"] = np.array([8, 1, 1]), x[k]
            stress = np.array([0.01, 0.02, 0.03, 0.0, 0.0, 0.001]) if k != 1 else "None"
            values = {"energy": e[k], "forces": f[k], "stress": stress, "virials": "None", "charges": "None"}
            for name, value in values.items():
                group[f"properties/{name}"] = value
                group[f"property_weights/{name}"] = 1.0
            group["cell"], group["pbc"] = 8.0 * np.eye(3), (True, True, True)
            group["weight"], group["config_type"] = 1.0 + k, "Default"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    ani1x(folder / "ani1x.h5")
    spice(folder / "spice.h5")
    qm7x(folder / "qm7x.hdf5")
    mace(folder / "mace.h5")
