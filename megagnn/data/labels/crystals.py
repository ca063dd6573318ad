"""Bulk crystals: a prototype -> elements whose charges balance -> the teacher's volume -> strain and noise.

The recipe stands for MPtrj (Deng et al., Nat. Mach. Intell. 5, 1031, 2023): inorganic crystals of many
elements, several frames of each, off equilibrium.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers, covalent_radii
from ase.spacegroup import crystal

from megagnn.data.formats.groups import empirical_formula
from megagnn.data.labels.teacher import Teacher
from megagnn.data.record import Structure

if TYPE_CHECKING:
    from megagnn.data.labels.sources import CrystalRecipe

CATIONS = {
    1: "Li Na K Rb Cs Ag Cu",
    2: "Mg Ca Sr Ba Mn Fe Co Ni Zn Cd Pb",
    3: "Al Ga In Sc Y La Cr Fe V Ti Nd Gd",
    4: "Ti Zr Hf Sn Si Ge Ce Mn V Ru",
}
ANIONS = {1: "F Cl Br I", 2: "O S Se Te", 3: "N P As"}
METALS = "Al Ti V Cr Mn Fe Co Ni Cu Zn Zr Nb Mo Ru Rh Pd Ag Hf Ta W Re Ir Pt Au Mg Li"
"""By charge: symbols; and of alloys."""

BINARIES = {
    # name: spacegroup, sites of cation and anion, a over their distance, c over a, charges (cation, anion)
    "rocksalt": (225, ((0, 0, 0), (0.5, 0.5, 0.5)), 2.0, 1.0, ((1, 1), (2, 2), (3, 3))),
    "zincblende": (216, ((0, 0, 0), (0.25, 0.25, 0.25)), 4 / 3**0.5, 1.0, ((1, 1), (2, 2), (3, 3))),
    "cesium chloride": (221, ((0, 0, 0), (0.5, 0.5, 0.5)), 2 / 3**0.5, 1.0, ((1, 1), (2, 2))),
    "fluorite": (225, ((0, 0, 0), (0.25, 0.25, 0.25)), 4 / 3**0.5, 1.0, ((4, 2), (2, 1))),
    "antifluorite": (225, ((0.25, 0.25, 0.25), (0, 0, 0)), 4 / 3**0.5, 1.0, ((1, 2),)),
    "rutile": (136, ((0, 0, 0), (0.305, 0.305, 0)), 1 / 0.424, 0.644, ((4, 2), (2, 1))),
    "corundum": (167, ((0, 0, 0.352), (0.306, 0, 0.25)), 2.5, 2.73, ((3, 2),)),
    "wurtzite": (186, ((1 / 3, 2 / 3, 0), (1 / 3, 2 / 3, 0.38)), 1.633, 1.62, ((1, 1), (2, 2), (3, 3))),
}
HEXAGONAL = (167, 186)
PEROVSKITES = ((2, 4, 2), (1, 2, 1), (3, 3, 2))
"""Charges of A, B and X."""
VOLUMES = np.array([0.94, 1.0, 1.06, 1.12])
"""Scales of the lattice, among which the teacher's minimum is sought."""


def random_crystals(recipe: CrystalRecipe, num_frames: int, rng: np.random.Generator) -> Iterator[Structure]:
    """Yield `num_frames` strained and displaced frames of one random crystal.

    The group is the empirical formula: polymorphs and supercells stay on one side of a split.
    """
    atoms = random_crystal(recipe, rng)
    atoms.set_cell(atoms.cell.array * best_scale(atoms), scale_atoms=True)
    group = f"crystal/{empirical_formula(atoms.numbers)}"
    for _ in range(num_frames):
        strain = rng.normal(0.0, recipe.strain, (3, 3))
        frame = atoms.copy()
        frame.set_cell(atoms.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
        noise = float(rng.choice(recipe.noise))
        positions = frame.positions + rng.normal(0.0, noise, frame.positions.shape)
        yield _structure(frame, positions, group)


def random_crystal(recipe: CrystalRecipe, rng: np.random.Generator) -> Atoms:
    """A binary, a perovskite or an alloy, of at least `min_atoms` atoms."""
    while True:
        kind = rng.choice(["binary", "perovskite", "alloy"], p=recipe.kinds)
        make = {"binary": _binary, "perovskite": _perovskite, "alloy": _alloy}[str(kind)]
        atoms = make(rng)
        while len(atoms) < recipe.min_atoms:
            atoms = atoms.repeat([(2, 1, 1), (1, 2, 1), (1, 1, 2)][int(np.argmin(atoms.cell.lengths()))])
        if len(atoms) <= recipe.max_atoms:
            return atoms


def best_scale(atoms: Atoms) -> float:
    """The scale of the lattice at the minimum of a parabola through the teacher's lowest energies."""
    energies = []
    for scale in VOLUMES:
        scaled = atoms.copy()
        scaled.set_cell(atoms.cell.array * scale, scale_atoms=True)
        energies.append(Teacher().energy(_structure(scaled, scaled.positions, "")))
    k = int(np.argmin(energies))
    if not 0 < k < len(VOLUMES) - 1:
        return float(VOLUMES[k])
    curvature, slope, _ = np.polyfit(VOLUMES[k - 1 : k + 2], energies[k - 1 : k + 2], 2)
    return float(-slope / (2 * curvature))


def _structure(atoms: Atoms, positions: np.ndarray, group: str) -> Structure:
    pbc = np.ones(3, dtype=bool)
    return Structure(atoms.numbers.astype(np.uint8), positions, atoms.cell.array.copy(), pbc, group=group)


def _radius(symbol: str, charge: int) -> float:
    """Å, of the ion; the mean over its charges where this one is not tabulated."""
    from pymatgen.core import Element, Species  # type: ignore[import-not-found,unused-ignore]

    with warnings.catch_warnings():  # of ions of two spins pymatgen says which it takes
        warnings.simplefilter("ignore")
        found = Species(symbol, charge).ionic_radius or Element(symbol).average_ionic_radius
    return float(found) or float(covalent_radii[atomic_numbers[symbol]])


def _pick(symbols: str, rng: np.random.Generator) -> str:
    return str(rng.choice(symbols.split()))


def _binary(rng: np.random.Generator) -> Atoms:
    group, sites, a_over_d, c_over_a, charges = BINARIES[str(rng.choice(list(BINARIES)))]
    positive, negative = charges[int(rng.integers(len(charges)))]
    cation, anion = _pick(CATIONS[positive], rng), _pick(ANIONS[negative], rng)
    a = a_over_d * (_radius(cation, positive) + _radius(anion, -negative))
    cell = [a, a, a * c_over_a, 90, 90, 120 if group in HEXAGONAL else 90]
    return crystal([cation, anion], sites, spacegroup=group, cellpar=cell, primitive_cell=True)


def _perovskite(rng: np.random.Generator) -> Atoms:
    charges = PEROVSKITES[int(rng.integers(len(PEROVSKITES)))]
    first, second, anion = (_pick(CATIONS[charges[0]], rng), _pick(CATIONS[charges[1]], rng), "")
    anion = "O" if charges[2] == 2 else _pick(ANIONS[1], rng)
    a = 2 * (_radius(second, charges[1]) + _radius(anion, -charges[2]))
    sites = [(0.5, 0.5, 0.5), (0, 0, 0), (0.5, 0, 0)]
    return crystal([first, second, anion], sites, spacegroup=221, cellpar=[a, a, a, 90, 90, 90])


def _alloy(rng: np.random.Generator) -> Atoms:
    host, guest = (str(metal) for metal in rng.choice(METALS.split(), 2, replace=False))
    d = 0.98 * float(covalent_radii[atomic_numbers[host]] + covalent_radii[atomic_numbers[guest]])
    if rng.random() < 1 / 3:
        return bulk(host + guest, "cesiumchloride", a=2 * d / 3**0.5)
    atoms = bulk(host, "fcc", a=d * 2**0.5, cubic=True)
    if rng.random() < 0.5:
        atoms.symbols[0] = guest
        return atoms
    atoms = atoms.repeat((2, 1, 1) if rng.random() < 0.5 else (2, 2, 1))
    atoms.symbols[rng.random(len(atoms)) < rng.uniform(0.1, 0.5)] = guest
    return atoms
