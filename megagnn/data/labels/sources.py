"""The named sources of `megagnn label`: what is generated, and which engine labels it."""

from __future__ import annotations

from dataclasses import dataclass

from megagnn.data.labels.engines import EffectiveMedium, Engine, TBLite
from megagnn.data.labels.recipes import MoleculeRecipe, Recipe, SlabRecipe


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
