"""The named sources of `megagnn label`: what is generated, by which recipe, and which engine labels it.

A recipe is the numbers behind a generator, recorded with the data it makes. The generators' own libraries
(RDKit, ASE) load when a recipe is first used, not when it is named.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megagnn.data.labels.engines import EffectiveMedium, Engine, TBLite
from megagnn.data.labels.lammps_engine import COMB3, REAXFF_IRON
from megagnn.data.labels.teacher import Teacher
from megagnn.data.record import Structure


class Recipe(Protocol):
    """A dataclass of plain numbers that can generate structures."""

    def generate(self, count: int, rng: np.random.Generator) -> Iterator[Structure]:
        """Yield `count` structures, not yet labelled, of one new group."""


@dataclass(frozen=True)
class MoleculeRecipe:
    """Organic molecules.

    Attributes:
        elements: atomic numbers of the heavy atoms, drawn with `probabilities`.
        num_heavy: fewest and most heavy atoms.
        max_temperature: K; the temperature of a geometry is uniform between 0 and this. It sets the width of
            the displacements; no ensemble is claimed.
        mode_cap: Å, largest standard deviation along one normal mode; beyond it the harmonic picture of a
            soft mode ends.
        atom_cap: Å, largest displacement of one atom along one axis.
        ring_fraction: share of molecules that start from a ring, where the ring is not too large.
        conformers: how many conformers of a molecule its geometries are spread over.
    """

    elements: tuple[int, ...]
    probabilities: tuple[float, ...]
    num_heavy: tuple[int, int]
    max_temperature: float = 2000.0
    mode_cap: float = 0.25
    atom_cap: float = 0.5
    ring_fraction: float = 0.5
    conformers: int = 2

    def generate(self, count: int, rng: np.random.Generator) -> Iterator[Structure]:
        from megagnn.data.labels.molecules import random_molecules

        return random_molecules(self, count, rng)


@dataclass(frozen=True)
class SlabRecipe:
    """Metal slabs with adsorbates.

    Attributes:
        bare_fraction: share of poses without an adsorbate.
        noise: Å, standard deviations of thermal noise; one is drawn for each pose.
        contact: range of the shortest distance of an adsorbate, in sums of covalent radii.
        max_minority: largest share of the second metal's atoms.
        pure_fraction: share of slabs of one metal.
        max_atoms: of slab and adsorbate together.
    """

    bare_fraction: float = 0.1
    noise: tuple[float, ...] = (0.02, 0.06, 0.12)
    contact: tuple[float, float] = (0.9, 1.6)
    max_minority: float = 0.5
    pure_fraction: float = 0.1
    max_atoms: int = 40

    def generate(self, count: int, rng: np.random.Generator) -> Iterator[Structure]:
        from megagnn.data.labels.slabs import random_slabs

        return random_slabs(self, count, rng)


@dataclass(frozen=True)
class OxideRecipe:
    """Oxide slabs with adsorbates.

    Attributes:
        oxides: formulas.
        bare_fraction, noise, contact: see `SlabRecipe`.
        max_strain: largest change of the lengths in the plane, as a share.
        max_vacancies: oxygen atoms taken out, at most.
        min_atoms: of a slab; max_atoms: of slab and adsorbate together.
    """

    oxides: tuple[str, ...]
    bare_fraction: float = 0.2
    noise: tuple[float, ...] = (0.02, 0.06, 0.12)
    contact: tuple[float, float] = (0.9, 1.6)
    max_strain: float = 0.03
    max_vacancies: int = 2
    min_atoms: int = 8
    max_atoms: int = 72

    def generate(self, count: int, rng: np.random.Generator) -> Iterator[Structure]:
        from megagnn.data.labels.oxides import random_oxides

        return random_oxides(self, count, rng)


@dataclass(frozen=True)
class CrystalRecipe:
    """Bulk crystals.

    Attributes:
        kinds: shares of binaries, perovskites and alloys.
        strain: standard deviation of each component.
        noise: Å, standard deviations of displacements; one is drawn for each frame.
        min_atoms, max_atoms: of a cell; small ones are repeated.
    """

    kinds: tuple[float, float, float] = (0.6, 0.2, 0.2)
    strain: float = 0.025
    noise: tuple[float, ...] = (0.0, 0.02, 0.05, 0.08, 0.12, 0.18)
    min_atoms: int = 6
    max_atoms: int = 32

    def generate(self, count: int, rng: np.random.Generator) -> Iterator[Structure]:
        from megagnn.data.labels.crystals import random_crystals

        return random_crystals(self, count, rng)


@dataclass(frozen=True)
class Source:
    """One named source.

    Attributes:
        name: as on the command line and in the store's source table.
        number: part of every chunk's random seed, so never reused for another source.
        summary: one line for the command's help.
        engine: labels the structures; its method is the level of theory.
        recipe: generates the structures.
        packages: packages needed to generate and label.
        repeats: whether a later chunk may bring more structures of a group; where False they are dropped.
        max_force: eV/Å; a structure with a larger force on any atom is rejected.
    """

    name: str
    number: int
    summary: str
    engine: Engine
    recipe: Recipe
    packages: tuple[str, ...]
    repeats: bool
    max_force: float = 40.0


SOURCES = {
    source.name: source
    for source in (
        Source(
            name="molecules-gfn2",
            number=1,
            summary="CHNO molecules of 1-11 heavy atoms, labelled by GFN2-xTB",
            engine=TBLite("GFN2-xTB"),
            recipe=MoleculeRecipe((6, 7, 8), (0.70, 0.15, 0.15), num_heavy=(1, 11)),
            packages=("rdkit", "tblite"),
            repeats=False,
        ),
        Source(
            name="molecules-gfn1",
            number=2,
            summary="CHNOSCl molecules of 2-7 heavy atoms, labelled by GFN1-xTB",
            engine=TBLite("GFN1-xTB"),
            recipe=MoleculeRecipe((6, 7, 8, 16, 17), (0.62, 0.14, 0.14, 0.06, 0.04), num_heavy=(2, 7)),
            packages=("rdkit", "tblite"),
            repeats=False,
        ),
        Source(
            name="slabs-emt",
            number=3,
            summary="fcc metal and alloy slabs with adsorbates, at most 40 atoms, labelled by EMT",
            engine=EffectiveMedium(),
            recipe=SlabRecipe(),
            packages=("ase",),
            repeats=True,
        ),
        Source(
            name="oxides-reaxff",
            number=4,
            summary="slabs of iron oxides with adsorbates, at most 72 atoms, labelled by ReaxFF (LAMMPS)",
            engine=REAXFF_IRON,
            recipe=OxideRecipe(("Fe2O3", "FeO")),
            packages=("ase", "lammps", "mpich"),
            repeats=True,
        ),
        Source(
            name="oxides-comb3",
            number=5,
            summary="slabs of TiO2, ZrO2, ZnO, Cu2O with adsorbates, at most 72 atoms, labelled by COMB3",
            engine=COMB3,
            recipe=OxideRecipe(("TiO2", "ZrO2", "ZnO", "Cu2O")),
            packages=("ase", "lammps", "mpich"),
            repeats=True,
        ),
        Source(
            name="crystals-chgnet",
            number=6,
            summary="bulk crystals of 57 elements, at most 32 atoms, labelled by a neural teacher (CHGNet)",
            engine=Teacher(),
            recipe=CrystalRecipe(),
            packages=("ase", "chgnet", "pymatgen"),
            repeats=True,
        ),
    )
}


def find_sources(names: list[str]) -> list[Source]:
    """Sources by name, in the order given.

    Raises:
        ValueError: an unknown or repeated name.
    """
    for name in names:
        if name not in SOURCES:
            raise ValueError(f"unknown label source {name!r}; known: {', '.join(SOURCES)}")
        if names.count(name) > 1:
            raise ValueError(
                f"label source {name!r} is given {names.count(name)} times; name it once and raise --num"
            )
    return [SOURCES[name] for name in names]
