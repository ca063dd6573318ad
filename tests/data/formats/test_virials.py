"""Virials: stress = -virial / V, beside a stress compared with it, and never taken for a stress."""

import numpy as np
import pytest

from megagnn.data.formats import ReadOptions, parse_units, read_structures
from tests.data.formats.frames import STRESS, VOLUME, crystal, text_of, write

VIRIAL = text_of(-VOLUME * STRESS)


@pytest.mark.parametrize("name", ["virial", "virials"])
def test_found_under_its_usual_name(tmp_path, name):
    (read,) = read_structures(write(tmp_path / "a.xyz", crystal(**{name: VIRIAL})))
    assert np.allclose(read.stress, STRESS)
    assert read.notes == ("stress made from the virial, as -virial/V",)


def test_by_its_key(tmp_path):
    path = write(tmp_path / "a.xyz", crystal(REF_virial=VIRIAL))
    (read,) = read_structures(
        path, ReadOptions(energy_key="energy", forces_key="forces", virial_key="REF_virial")
    )
    assert np.allclose(read.stress, STRESS)
    with pytest.raises(ValueError, match=r"there is no virial key 'W'; the first frame has .*REF_virial"):
        list(read_structures(path, ReadOptions(energy_key="energy", forces_key="forces", virial_key="W")))


def test_in_units_of_the_energy(tmp_path):
    path = write(tmp_path / "a.xyz", crystal(virials=text_of(-VOLUME * STRESS / 27.211386)))
    (read,) = read_structures(path, ReadOptions(units=parse_units("energy=Ha")))
    assert np.allclose(read.stress, STRESS, rtol=1e-5)


def test_named_as_a_stress_is_refused_unless_told_otherwise(tmp_path):
    with pytest.raises(ValueError, match=r"--stress-key virial names a virial.*--virial-key virial.*none"):
        ReadOptions(stress_key="virial")
    path = write(tmp_path / "a.xyz", crystal(virial_stress=text_of(STRESS)))
    options = ReadOptions("a", None, "auto", "energy", "forces", "virial_stress", "none")
    assert np.allclose(next(read_structures(path, options)).stress, STRESS)


@pytest.mark.parametrize(("factor", "told"), [(-VOLUME, False), (VOLUME, True), (-1.0, True)])
def test_beside_a_stress_it_is_compared(tmp_path, factor, told):
    path = write(tmp_path / "a.xyz", crystal(stress=text_of(STRESS), virial=text_of(factor * STRESS)))
    (read,) = read_structures(path)
    assert np.allclose(read.stress, STRESS)
    assert any("contradict" in note for note in read.notes) is told


def test_left_out_with_a_word_beside_labels_of_other_names(tmp_path):
    path = write(tmp_path / "a.xyz", crystal(REF_energy=-1.0, virial=VIRIAL))
    (read,) = read_structures(path, ReadOptions(energy_key="REF_energy", forces_key="forces"))
    assert read.stress is None
    assert any("--virial-key reads it" in note for note in read.notes)
    (none,) = read_structures(path, ReadOptions(stress_key="none"))
    assert none.stress is None


def test_of_a_slab_it_is_left_out_as_a_stress_is(tmp_path):
    text = crystal(virial=VIRIAL).replace('pbc="T T T"', 'pbc="T T F"')
    (read,) = read_structures(write(tmp_path / "a.xyz", text))
    assert read.stress is None
    assert read.notes == ("stress left out: not periodic in three directions",)
