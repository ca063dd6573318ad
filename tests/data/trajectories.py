"""Short trajectories with labels of EMT, right ones, for tests of what is found in wrong ones."""

from dataclasses import replace
from functools import cache

import ase.io
import numpy as np
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from megagnn.data.record import Structure

FREE_ATOMS = {"H": -13.6, "C": -1029.5, "N": -1485.0, "O": -2042.0}
"""eV, added to the energies of molecules: what programs with all electrons give."""


@cache
def molecules(name: str = "CH3CH2OH", num_frames: int = 24, seed: int = 0) -> tuple[Atoms, ...]:
    """Conformations near each other, total energies of all electrons."""
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(num_frames):
        atoms = molecule(name)
        atoms.positions += rng.normal(scale=0.05, size=atoms.positions.shape)
        atoms.calc = EMT()
        energy = atoms.get_potential_energy() + sum(FREE_ATOMS[s] for s in atoms.symbols)
        frames.append(labelled(atoms, energy=energy, forces=atoms.get_forces()))
    return tuple(frames)


@cache
def crystals(
    num_frames: int = 24, seed: int = 0, rattle: float = 0.03, strain: float = 0.02
) -> tuple[Atoms, ...]:
    """Strained and rattled cells of copper with a silver atom."""
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(num_frames):
        atoms = bulk("Cu", cubic=True)
        atoms.symbols[0] = "Ag"
        bend = rng.uniform(-strain, strain, (3, 3))
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + (bend + bend.T) / 2), scale_atoms=True)
        atoms.positions += rng.normal(scale=rattle, size=atoms.positions.shape)
        atoms.calc = EMT()
        frames.append(
            labelled(
                atoms,
                energy=atoms.get_potential_energy(),
                forces=atoms.get_forces(),
                stress=atoms.get_stress(voigt=False),
            )
        )
    return tuple(frames)


def labelled(atoms: Atoms, **labels: object) -> Atoms:
    """A copy with these labels and no others."""
    copy = atoms.copy()
    copy.calc = SinglePointCalculator(copy, **labels)
    return copy


def scaled(frames, energy=1.0, forces=1.0, stress=1.0):
    """The frames with their labels divided by units."""
    divisors = {"energy": energy, "forces": forces, "stress": stress}
    return [
        labelled(f, **{name: value / divisors[name] for name, value in f.calc.results.items()})
        for f in frames
    ]


def isolated(symbol: str, energy: float, **changes: object) -> Atoms:
    """An isolated atom with its energy."""
    atoms = Atoms(symbol, **changes)
    return labelled(atoms, energy=energy)


def write(path, frames):
    """An extended XYZ file of frames; returns its path."""
    ase.io.write(path, list(frames), format="extxyz")
    return path


def record(atoms: Atoms, **changes: object) -> Structure:
    """The canonical record of a frame."""
    results = atoms.calc.results
    structure = Structure(
        atomic_numbers=atoms.numbers.astype(np.uint8),
        positions=atoms.positions.astype(np.float64),
        cell=atoms.cell.array if atoms.pbc.any() else np.zeros((3, 3)),
        pbc=atoms.pbc,
        energy=results.get("energy"),
        forces=results.get("forces"),
        stress=results.get("stress"),
    )
    return replace(structure, **changes)
