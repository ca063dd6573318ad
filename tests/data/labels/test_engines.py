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
SOURCE_NAMES = [pytest.param(name, marks=needs_xtb if "gfn" in name else ()) for name in SOURCES]
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
    step, worst = 1e-3, 0.0
    for atom in {0, structure.num_atoms // 2, structure.num_atoms - 1}:
        for axis in range(3):
            energies = []
            for sign in (1, -1):
                positions = structure.positions.copy()
                positions[atom, axis] += sign * step
                energies.append(source.engine.label(replace(structure, positions=positions)).energy)
            numeric = -(energies[0] - energies[1]) / (2 * step)
            worst = max(worst, abs(numeric - labels.forces[atom, axis]))
    assert worst < 5e-4
    assert np.abs(labels.forces).max() > 0.1, "a structure at rest would not show a wrong unit"
    np.testing.assert_allclose(labels.forces.sum(axis=0), 0.0, atol=1e-6)


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


@needs_xtb
def test_unconverged_is_a_failure_with_its_reason() -> None:
    with pytest.raises(LabelError, match=r"^not_converged$"):
        TBLite("GFN2-xTB", max_iterations=2).label(WATER)


def test_slabs_and_molecules_carry_no_stress() -> None:
    structure = next(iter(SOURCES["slabs-emt"].recipe.generate(1, np.random.default_rng(0))))
    assert EffectiveMedium().label(structure).stress is None


def test_missing_engine_names_the_way_out() -> None:
    with pytest.raises(
        ValueError, match=r"no-such-engine, which is not installed; `source tools/setup_env\.sh labels`"
    ):
        require("no-such-engine")
