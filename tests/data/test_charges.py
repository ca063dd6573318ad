"""Charge and spin in stores and checks: two states of one structure are neither copies nor outliers."""

from dataclasses import replace

import numpy as np
import pytest

from megagnn.data import keys
from megagnn.data.batch import build_graph, collate
from megagnn.data.copies import Copies
from megagnn.data.formats import read_structures
from megagnn.data.inspect import describe
from megagnn.data.near_frames import pair_of
from megagnn.data.plausibility import LabelCheck
from megagnn.data.record import StructureError, check_structure, is_isolated_atom
from megagnn.data.store import Store, write_store
from tests.data.conftest import make_crystal, make_structure

WATER = np.array([8, 1, 1], dtype=np.uint8)


def water(seed=0, **changes):
    return make_structure(3, seed, atomic_numbers=WATER, **changes)


def test_stores_keep_what_was_read(tmp_path):
    dipole = np.array([0.1, 0.2, 0.3])
    structures = [
        water(0, charge=1.0, multiplicity=2, others={"dipole": dipole}, group="a"),
        water(1, group="b"),
    ]
    write_store(tmp_path / "s", structures, splits=np.zeros(2, np.uint8))
    store = Store.open(tmp_path / "s")
    first, second = (store.structure(k) for k in range(2))
    assert (first[keys.CHARGE], first[keys.MULTIPLICITY]) == (1.0, 2)
    assert (second[keys.CHARGE], second[keys.MULTIPLICITY]) == (0.0, 0)
    assert first[keys.DIPOLE] == pytest.approx(dipole)
    assert keys.DIPOLE not in second
    again = list(read_structures(tmp_path / "s"))
    assert [s.electronic_state for s in again] == [(1.0, 2), (0.0, 1)]
    assert again[0].others["dipole"] == pytest.approx(dipole)
    text = describe(store)
    assert "A: charge 1 of 1, 0 of 1" in text
    assert "A: multiplicity 2 of 1, 0 of 1" in text
    geometry = (keys.ATOMIC_NUMBERS, keys.POSITIONS, keys.CELL, keys.PBC)
    batch = collate([{**s, **build_graph(*(s[k] for k in geometry), 3.0)} for s in (first, second)])
    assert batch[keys.CHARGE].tolist() == [1.0, 0.0]
    assert batch[keys.MULTIPLICITY].tolist() == [2, 0]
    assert batch[keys.has(keys.DIPOLE)].tolist() == [True, False]


def test_stores_without_charges_are_as_before(tmp_path):
    write_store(tmp_path / "s", [water(0)], splits=np.zeros(1, np.uint8))
    names = {file.name for file in (tmp_path / "s").iterdir()}
    assert not names & {"charge.npy", "multiplicity.npy", "dipole.npy"}
    assert ": charge " not in describe(Store.open(tmp_path / "s"))


def test_the_dipole_of_an_ion_follows_its_origin(tmp_path):
    """Far from the origin a molecule is moved there, and the dipole of an ion with it."""
    far, dipole = np.array([3e5, 0.0, -1e5]), np.array([0.1, 0.2, 0.3])
    near = water(0, charge=-1.0, others={"dipole": dipole})
    moved = replace(near, positions=near.positions + far, others={"dipole": dipole - far})
    neutral = replace(moved, charge=0.0, others={"dipole": dipole})
    write_store(tmp_path / "s", [near, moved, neutral], splits=np.zeros(3, np.uint8))
    store = Store.open(tmp_path / "s")
    about = [
        s[keys.DIPOLE] + s.get(keys.CHARGE, 0) * -s[keys.POSITIONS].mean(0)
        for s in map(store.structure, (0, 1))
    ]
    assert np.abs(about[0] - about[1]).max() < 1e-3
    assert store.structure(2)[keys.DIPOLE] == pytest.approx(dipole)


def test_states_that_a_store_cannot_hold_are_refused():
    for bad in ({"charge": float("nan")}, {"multiplicity": -1}):
        with pytest.raises(StructureError, match="charge and multiplicity must be a finite number of e"):
            check_structure(water(**bad))


def test_ions_are_no_isolated_atoms(tmp_path):
    one = make_structure(1, atomic_numbers=np.array([11], np.uint8))
    ion = replace(one, charge=1.0, energy=one.energy + 5.1)
    assert is_isolated_atom(one)
    assert not is_isolated_atom(ion)
    write_store(tmp_path / "s", [one, ion], splits=np.zeros(2, np.uint8))
    assert Store.open(tmp_path / "s").isolated_atoms().tolist() == [True, False]


def test_two_states_are_no_copies_and_no_near_frames():
    neutral = make_crystal(4)
    charged = replace(neutral, charge=1.0, energy=neutral.energy - 50.0)
    for other, count in ((charged, 0), (replace(neutral, energy=charged.energy), 1)):
        found = Copies()
        for frame, structure in enumerate((neutral, other)):
            found.add(structure, "a.xyz", frame)
        assert len(list(found.with_two_energies())) == count
    near = replace(neutral, positions=neutral.positions + np.eye(4, 3) * 0.05)
    assert pair_of(neutral, near) is not None
    assert pair_of(neutral, replace(near, charge=1.0)) is None
    said = 1 + int(neutral.atomic_numbers.sum()) % 2
    assert pair_of(neutral, replace(near, multiplicity=said)) is not None  # the lowest, as where none is said
    assert pair_of(neutral, replace(near, multiplicity=said + 2)) is None


def test_several_states_of_one_composition_are_told():
    def faults(charge):
        check = LabelCheck("A")
        for k in range(8):
            check.add(water(k, charge=charge if k % 2 else 0.0, energy=-10.0 - 0.01 * k), "a.xyz", k)
        return [fault for fault in check.faults() if "charges or multiplicities" in fault.text]

    (fault,) = faults(1.0)
    assert not fault.sure
    assert "1 of 1 compositions" in fault.text
    assert "such as H2O with charge 0, multiplicity 1 and charge 1, multiplicity 2" in fault.text
    assert faults(0.0) == []


def test_charges_of_parts_of_an_electron_are_one_state():
    """As sums of a model's charges of atoms, other in each frame: energies go with forces all the same."""
    first = water(0, charge=-0.508)
    second = replace(first, charge=-0.457, positions=first.positions + 0.01, energy=first.energy + 0.1)
    assert pair_of(first, second) is not None
    assert pair_of(first, replace(second, charge=-1.0)) is None
