"""Databases of ASE: labels in data and key-value pairs, units declared as SchNetPack does."""

import json
import sqlite3

import ase.db
import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import Bohr, Hartree

from megagnn.data.formats import ReadOptions, read_structures

FORCES = np.arange(9.0).reshape(3, 3)


@pytest.mark.parametrize("ending", ["db", "json"])
def test_labels_in_data_and_pairs_are_reached_by_keys(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    with ase.db.connect(path) as db:
        db.write(molecule("H2O"), key_value_pairs={"dft_energy": -14.5}, data={"dft_forces": FORCES})
    with pytest.raises(ValueError, match=r"first frame has info: dft_forces, dft_energy; .*--energy-key"):
        list(read_structures(path))
    (read,) = read_structures(path, ReadOptions(energy_key="dft_energy", forces_key="dft_forces"))
    assert read.energy == -14.5
    assert read.forces.tolist() == FORCES.tolist()
    with pytest.raises(
        ValueError, match="no energy key 'E'; the first frame has info: dft_forces, dft_energy"
    ):
        list(read_structures(path, ReadOptions(energy_key="E", forces_key="dft_forces")))


def schnetpack(path, units, distance):
    with ase.db.connect(path) as db:
        db.metadata = {"_property_unit_dict": units, "_distance_unit": distance}
        db.write(molecule("H2O"), data={"energy": np.array([-0.5]), "forces": FORCES})
    return path


def test_declared_units_and_names(tmp_path):
    path = schnetpack(tmp_path / "s.db", {"energy": "Hartree", "forces": "Hartree/Bohr"}, "Bohr")
    (read,) = read_structures(path)
    assert read.energy == pytest.approx(-0.5 * Hartree)
    assert np.allclose(read.forces, FORCES * Hartree / Bohr)
    assert np.allclose(read.positions, molecule("H2O").positions * Bohr)
    (keyed,) = read_structures(path, ReadOptions(energy_key="energy", forces_key="forces"))
    assert keyed.energy == read.energy


def test_kcal_per_mol_and_units_that_are_not_known(tmp_path):
    path = schnetpack(tmp_path / "k.db", {"energy": "kcal/mol", "forces": "kcal/mol/Ang"}, "Ang")
    (read,) = read_structures(path)
    assert read.energy == pytest.approx(-0.5 * 0.0433641, rel=1e-5)
    path = schnetpack(tmp_path / "u.db", {"energy": "foe", "forces": "eV/Ang"}, "Ang")
    with pytest.raises(ValueError, match=r"u.db declares units that are not known here .*'foe'.*--units"):
        list(read_structures(path))


def test_results_of_calculators_are_read_as_ever(tmp_path):
    atoms = molecule("H2O")
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=FORCES)
    with ase.db.connect(tmp_path / "a.db") as db:
        db.write(atoms, data={"energy": -99.0}, name="w")
    (read,) = read_structures(tmp_path / "a.db")
    assert (read.energy, read.forces.tolist()) == (-1.0, FORCES.tolist())


@pytest.mark.parametrize("ending", ["db", "json"])
def test_a_row_that_cannot_be_read_costs_that_row(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    with ase.db.connect(path) as db:
        for k in range(4):
            atoms = molecule("H2O")
            atoms.calc = SinglePointCalculator(atoms, energy=-float(k), forces=FORCES)
            db.write(atoms)
    if ending == "db":
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE systems SET positions = x'0011' WHERE id = 2")
        connection.close()
    else:
        rows = json.loads(path.read_text())
        del rows["2"]["numbers"]
        path.write_text(json.dumps(rows))
    told = []
    read = list(read_structures(path, ReadOptions(on_unreadable=told.append)))
    assert [s.energy for s in read] == [0.0, -2.0, -3.0]
    assert ["frame 1: " in str(error) for error in told] == [True]
    with pytest.raises(ValueError, match=rf"cannot read .*a.{ending}, frame 1: "):
        list(read_structures(path))


def test_not_a_database(tmp_path):
    (tmp_path / "a.db").write_text("nothing of the kind")
    with pytest.raises(ValueError, match=r"cannot read .*a.db, frame 0"):
        list(read_structures(tmp_path / "a.db"))
