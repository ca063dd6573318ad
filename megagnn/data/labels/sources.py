"""The named sources of `megagnn label`: what is generated, and which engine labels it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from megagnn.data.labels.engines import EffectiveMedium, Engine, TBLite
from megagnn.data.record import Structure

Generator = Callable[[int, np.random.Generator], Iterator[Structure]]


@dataclass(frozen=True)
class Source:
    """One named source.

    Attributes:
        name: as on the command line and in the store's source table.
        number: part of every chunk's random seed, so never reused for another source.
        summary: one line for the command's help.
        engine: labels the structures; its method is the level of theory.
        generate: (number of structures, random generator) -> structures of one group, not yet labelled.
        packages: PyPI packages needed to generate and label.
        max_force: eV/Å; a structure with a larger force on any atom is rejected.
        repeats: whether a later chunk may bring more structures of a group; where False they are dropped.
    """

    name: str
    number: int
    summary: str
    engine: Engine
    generate: Generator
    packages: tuple[str, ...]
    max_force: float
    repeats: bool


def _chno(count: int, rng: np.random.Generator) -> Iterator[Structure]:
    from megagnn.data.labels.molecules import MoleculeRecipe, random_molecules

    return random_molecules(MoleculeRecipe((6, 7, 8), (0.70, 0.15, 0.15), num_heavy=(1, 11)), count, rng)


def _chnoscl(count: int, rng: np.random.Generator) -> Iterator[Structure]:
    from megagnn.data.labels.molecules import MoleculeRecipe, random_molecules

    probabilities = (0.62, 0.14, 0.14, 0.06, 0.04)
    return random_molecules(MoleculeRecipe((6, 7, 8, 16, 17), probabilities, num_heavy=(2, 7)), count, rng)


def _slabs(count: int, rng: np.random.Generator) -> Iterator[Structure]:
    from megagnn.data.labels.slabs import SlabRecipe, random_slabs

    return random_slabs(SlabRecipe(), count, rng)


CHNO = "CHNO molecules of 1-11 heavy atoms, labelled by GFN2-xTB"
CHNOSCL = "CHNOSCl molecules of 2-7 heavy atoms, labelled by GFN1-xTB"
SLABS = "fcc metal and alloy slabs with adsorbates, at most 40 atoms, labelled by EMT"
XTB = ("rdkit", "tblite")
SOURCES = {
    source.name: source
    for source in (
        Source("molecules-gfn2", 1, CHNO, TBLite("GFN2-xTB"), _chno, XTB, 40.0, False),
        Source("molecules-gfn1", 2, CHNOSCL, TBLite("GFN1-xTB"), _chnoscl, XTB, 40.0, False),
        Source("slabs-emt", 3, SLABS, EffectiveMedium(), _slabs, ("ase",), 40.0, True),
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
