"""Oxide slabs with adsorbates: a facet of an oxide -> vacancies -> adsorbate -> thermal noise.

The recipe stands for OC22 (Tran et al., ACS Catal. 13, 3066, 2023): oxide surfaces, poses of small adsorbates
on each, off equilibrium.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms
from ase.build import molecule, surface
from ase.spacegroup import crystal

from megagnn.data.labels.slabs import placed
from megagnn.data.record import Structure

if TYPE_CHECKING:
    from megagnn.data.labels.sources import OxideRecipe

ADSORBATES = ("H", "O", "OH", "H2O", "H2", "O2", "CO", "CO2")  # names of ase.build.molecule
FACETS = ((0, 0, 1), (1, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1))
VACUUM = 8.0  # Å on either side; more together than the reach of the potentials, 10 to 12 Å
NARROWEST = 4.5  # Å, of the cell in the plane


def _corundum(metal: str, a: float, c: float) -> Atoms:
    sites = [(0, 0, 0.3553), (0.3059, 0, 0.25)]
    return crystal([metal, "O"], sites, spacegroup=167, cellpar=[a, a, c, 90, 90, 120])


def _cubic(symbols: list[str], sites: list[tuple[float, ...]], group: int, a: float) -> Atoms:
    return crystal(symbols, sites, spacegroup=group, cellpar=[a, a, a, 90, 90, 90])


def bulk_oxide(name: str) -> Atoms:
    """A crystal by its formula, at lattice constants of room temperature, Å."""
    sites: list[tuple[float, ...]]
    origin, quarter, half = (0.0, 0.0, 0.0), (0.25, 0.25, 0.25), (0.5, 0.5, 0.5)
    if name == "Fe2O3":
        return _corundum("Fe", 5.038, 13.772)
    if name == "FeO":
        return _cubic(["Fe", "O"], [origin, half], 225, 4.33)
    if name == "TiO2":
        sites = [(0, 0, 0), (0.305, 0.305, 0)]
        return crystal(["Ti", "O"], sites, spacegroup=136, cellpar=[4.594, 4.594, 2.959, 90, 90, 90])
    if name == "ZrO2":
        return _cubic(["Zr", "O"], [origin, quarter], 225, 5.09)
    if name == "ZnO":
        sites = [(1 / 3, 2 / 3, 0), (1 / 3, 2 / 3, 0.382)]
        return crystal(["Zn", "O"], sites, spacegroup=186, cellpar=[3.25, 3.25, 5.207, 90, 90, 120])
    if name == "Cu2O":
        return _cubic(["O", "Cu"], [origin, quarter], 224, 4.27)
    raise ValueError(f"unknown oxide {name!r}; known are Fe2O3, FeO, TiO2, ZrO2, ZnO, Cu2O")


def random_oxides(recipe: OxideRecipe, num_poses: int, rng: np.random.Generator) -> Iterator[Structure]:
    """Yield `num_poses` geometries of one random slab, each with an adsorbate, a site and noise of its own.

    The group is oxide, facet, size and composition, so that slabs which differ in their strain or in which
    oxygen atoms are missing stay on one side of a split.
    """
    slab, group = random_oxide(recipe, rng)
    for _ in range(num_poses):
        pose = slab.copy()
        if rng.random() >= recipe.bare_fraction:
            adsorbate = molecule(str(rng.choice(ADSORBATES)))
            pose += placed(adsorbate, slab, float(rng.uniform(*recipe.contact)), rng)
        positions = pose.positions + rng.normal(0.0, float(rng.choice(recipe.noise)), pose.positions.shape)
        pbc = np.array([True, True, False])
        yield Structure(pose.numbers.astype(np.uint8), positions, pose.cell.array.copy(), pbc, group=group)


def random_oxide(recipe: OxideRecipe, rng: np.random.Generator) -> tuple[Atoms, str]:
    """A random slab and its group key, for example `oxide/Fe2O3/001/1x1x2/Fe8O12`."""
    while True:
        name, facet = str(rng.choice(recipe.oxides)), FACETS[int(rng.integers(len(FACETS)))]
        layers, strain = int(rng.integers(1, 4)), 1 + rng.uniform(-recipe.max_strain, recipe.max_strain)
        slab = surface(bulk_oxide(name), facet, layers, vacuum=VACUUM)
        repeats = [int(np.ceil(NARROWEST / length)) for length in slab.cell.lengths()[:2]]
        slab = slab.repeat((*repeats, 1))
        slab.set_cell(slab.cell.array * [[strain], [strain], [1.0]], scale_atoms=True)
        oxygen = np.flatnonzero(slab.numbers == 8)
        missing = rng.permutation(oxygen)[: int(rng.integers(0, recipe.max_vacancies + 1))]
        del slab[missing.tolist()]
        if recipe.min_atoms <= len(slab) <= recipe.max_atoms - 3:  # the largest adsorbate has three
            break
    place = f"{''.join(map(str, facet))}/{repeats[0]}x{repeats[1]}x{layers}"
    return slab, f"oxide/{name}/{place}/{slab.get_chemical_formula('hill')}"
