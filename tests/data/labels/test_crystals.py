from importlib.util import find_spec

import numpy as np
import pytest
from ase.formula import Formula

from megagnn.data.formats.groups import empirical_formula
from megagnn.data.labels import crystals
from megagnn.data.labels.sources import CrystalRecipe

RADII = {"O": 1.26, "F": 1.19}
"""Å; the radii of pymatgen are replaced, so that the test runs without it."""


@pytest.fixture(autouse=True)
def without_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    def energy(_: object, structure: object) -> float:
        """A parabola whose minimum lies at 60 Å^3 per cell."""
        return float((abs(np.linalg.det(structure.cell)) - 60.0) ** 2)  # type: ignore[attr-defined]

    monkeypatch.setattr(crystals.Teacher, "energy", energy)
    if find_spec("pymatgen") is None:
        monkeypatch.setattr(crystals, "_radius", lambda symbol, charge: RADII.get(symbol, 0.9))


def test_crystals_are_neutral_and_of_a_size() -> None:
    rng, recipe, groups = np.random.default_rng(0), CrystalRecipe(kinds=(0.7, 0.3, 0.0)), set()
    negative = {s: -c for c, row in crystals.ANIONS.items() for s in row.split()}
    for _ in range(60):
        atoms = crystals.random_crystal(recipe, rng)
        assert recipe.min_atoms <= len(atoms) <= recipe.max_atoms
        counts = Formula(empirical_formula(atoms.numbers)).count()
        anion_charge = sum(n * negative.get(s, 0) for s, n in counts.items())
        metals = {s: n for s, n in counts.items() if s not in negative}
        possible = {0}
        for symbol, count in metals.items():
            own = [c for c, row in crystals.CATIONS.items() if symbol in row.split()]
            assert own
            possible = {total + count * c for total in possible for c in own}
        assert -anion_charge in possible
        groups.add(empirical_formula(atoms.numbers))
    assert len(groups) > 40


def test_frames_of_one_crystal_stay_together() -> None:
    rng = np.random.default_rng(1)
    for _ in range(5):
        frames = list(crystals.random_crystals(CrystalRecipe(), 4, rng))
        assert {s.group for s in frames} == {f"crystal/{empirical_formula(frames[0].atomic_numbers)}"}
        assert all(s.pbc.all() for s in frames)
        cells = np.array([s.cell for s in frames])
        strain = cells @ np.linalg.inv(cells[0]) - np.eye(3)
        assert 0 < np.abs(strain[1:]).max() < 0.25


def test_the_volume_is_the_minimum_of_the_teacher() -> None:
    for volume, scale in ((60 / 1.03**3, 1.03), (60 / 0.98**3, 0.98), (600.0, 0.94), (6.0, 1.12)):
        atoms = crystals.bulk("Cu", "sc", a=volume ** (1 / 3))
        assert crystals.best_scale(atoms) == pytest.approx(scale, abs=4e-3)
