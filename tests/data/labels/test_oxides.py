from itertools import product

import numpy as np
import pytest
from ase.data import chemical_symbols
from ase.formula import Formula
from ase.geometry import get_distances

from megagnn.data.labels.oxides import NARROWEST, VACUUM, bulk_oxide, random_oxide, random_oxides
from megagnn.data.labels.sources import OxideRecipe

OXIDES = ("Fe2O3", "FeO", "TiO2", "ZrO2", "ZnO", "Cu2O")


@pytest.mark.parametrize(
    ("name", "density", "bond"),
    [
        # g/cm^3 and the shortest distance of metal and oxygen, Å, as tabulated for the minerals
        ("Fe2O3", 5.27, 1.95),
        ("FeO", 5.88, 2.17),
        ("TiO2", 4.25, 1.95),
        ("ZrO2", 6.2, 2.20),
        ("ZnO", 5.67, 1.98),
        ("Cu2O", 6.1, 1.85),
    ],
)
def test_bulk_oxides_are_the_minerals(name: str, density: float, bond: float) -> None:
    atoms = bulk_oxide(name)
    assert Formula(name).reduce()[0] == atoms.symbols.formula.reduce()[0]
    assert atoms.get_masses().sum() / atoms.get_volume() * 1.66054 == pytest.approx(density, rel=0.03)
    metal, oxygen = atoms[atoms.numbers != 8], atoms[atoms.numbers == 8]
    _, lengths = get_distances(metal.positions, oxygen.positions, cell=atoms.cell, pbc=True)
    assert lengths.min() == pytest.approx(bond, abs=0.03)


def test_an_unknown_oxide_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown oxide 'MgO'; known are Fe2O3, FeO"):
        bulk_oxide("MgO")


def test_slabs_are_what_their_group_says() -> None:
    rng, recipe, groups = np.random.default_rng(0), OxideRecipe(OXIDES), set()
    for _ in range(25):
        structures = list(random_oxides(recipe, 2, rng))
        (group,) = {s.group for s in structures}
        _, name, _, _, composition = group.split("/")
        for s in structures:
            assert np.isfinite(s.positions).all()
            assert recipe.min_atoms <= s.num_atoms <= recipe.max_atoms
            symbols = [chemical_symbols[z] for z in s.atomic_numbers]
            (metal,) = {*Formula(name).count()} - {"O"}
            assert symbols.count(metal) == Formula(composition).count()[metal]
            assert symbols.count("O") >= Formula(composition).count().get("O", 0)
            assert s.pbc.tolist() == [True, True, False]
        groups.add(group)
    assert len(groups) > 20
    assert {group.split("/")[1] for group in groups} == set(OXIDES)


def test_slabs_do_not_see_their_images() -> None:
    rng = np.random.default_rng(1)
    for name, _ in product(OXIDES, range(3)):
        slab, _ = random_oxide(OxideRecipe((name,), max_vacancies=0), rng)
        lengths, height = slab.cell.lengths(), np.ptp(slab.positions @ _normal(slab.cell.array))
        assert lengths[:2].min() >= 0.97 * NARROWEST
        assert abs(slab.cell.array[2] @ _normal(slab.cell.array)) - height >= 2 * VACUUM - 1e-6


def _normal(cell: np.ndarray) -> np.ndarray:
    normal = np.cross(cell[0], cell[1])
    return normal / np.linalg.norm(normal)
