"""HDF5 of ANI-1x, SPICE, QM7-X and MACE: labels in eV and Å, levels of theory, and files that are refused.

The files of tests/data/files are written by tools/sample_files/hdf5.py.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from megagnn.data.formats import ReadOptions, detect_format, read_structures
from tests.data.formats.springs import FILES, spring

h5py = pytest.importorskip("h5py", reason="h5py is not installed")


def copied(name, tmp_path):
    return Path(shutil.copy(FILES / name, tmp_path / name))


@pytest.mark.parametrize(
    ("name", "count", "level", "groups"),
    [
        ("ani1x.h5", 12, "wB97X/6-31G(d)", {"H4C", "H2O"}),
        ("spice.h5", 8, "wB97M-D3BJ/def2-TZVPPD", {"SPICE methane", "SPICE water"}),
        ("qm7x.hdf5", 6, "PBE0+MBD", {"QM7-X 1", "QM7-X 10"}),
        ("mace.h5", 4, "unknown", {"H2O"}),
    ],
)
def test_labels_are_those_of_the_spring(name, count, level, groups):
    assert detect_format(FILES / name) == "hdf5"
    found = list(read_structures(FILES / name))
    assert len(found) == count
    for structure in found:
        energy, forces = spring(structure.positions)
        # float32 positions of bohr or Å; a wrong CODATA value (8e-7) would be 4e-4 eV of these energies
        assert structure.energy == pytest.approx(energy, abs=1e-5)
        assert structure.forces == pytest.approx(forces, abs=2e-5)  # a hartree per bohr is 1.89 times this
        assert structure.level == level
    assert {s.group for s in found} == groups
    assert max(np.abs(s.forces).max() for s in found) > 0.1


HA, BOHR = 27.211386245988, 0.529177210903  # eV and Å, CODATA 2018


@pytest.mark.parametrize(
    ("name", "x", "energy", "force"),
    [
        # first structure: coordinate of atom 1, energy and force, copied out of the file
        ("ani1x.h5", 1.002098, -18.37437663352111 * HA, 6.770026811864227e-05 * HA),
        ("spice.h5", 1.8936908 * BOHR, -18.37437663352111 * HA, 3.5825436e-05 * HA / BOHR),
        ("qm7x.hdf5", 1.0082326107, -499.99843462993124, -0.11682817707),
        ("mace.h5", 0.9821881632, -299.9981384871313, 0.088060449407),
    ],
)
def test_conventions_of_each_layout(name, x, energy, force):
    """Numbers of the files by hand: Ha and Ha/Å; bohr and a gradient in Ha/bohr; eV and eV/Å."""
    first = next(read_structures(FILES / name))
    assert first.positions[1, 0] == pytest.approx(x, rel=1e-6)
    assert first.energy == pytest.approx(energy, rel=1e-7)  # CODATA 2014 differs by 1e-8
    assert first.forces[1, 0] == pytest.approx(force, rel=1e-6)


def test_a_key_of_one_level_brings_its_forces():
    (first, *_), pbe0 = (
        list(read_structures(FILES / "qm7x.hdf5", o)) for o in (None, ReadOptions(energy_key="ePBE0"))
    )
    assert pbe0[0].energy == pytest.approx(first.energy + 0.5)
    assert pbe0[0].forces == pytest.approx(0.9 * first.forces)
    assert pbe0[0].level == "PBE0"
    alone = next(read_structures(FILES / "qm7x.hdf5", ReadOptions(energy_key="ePBE0", forces_key="none")))
    assert alone.forces is None


def test_what_was_not_computed_is_passed_over():
    found = list(read_structures(FILES / "ani1x.h5", ReadOptions(energy_key="ccsd(t)_cbs.energy")))
    assert len(found) == 4
    assert all(s.forces is None and s.level == "CCSD(T)*/CBS" for s in found)
    assert not list(read_structures(FILES / "ani1x.h5", ReadOptions(energy_key="wb97x_tz.energy")))


def test_labels_of_two_levels_are_refused():
    options = ReadOptions(energy_key="ePBE0", forces_key="totFOR")
    with pytest.raises(ValueError, match="ePBE0 and totFOR are of different levels of theory"):
        list(read_structures(FILES / "qm7x.hdf5", options))
    with pytest.raises(ValueError, match="--forces-key totFOR if they belong together"):
        list(read_structures(FILES / "qm7x.hdf5", ReadOptions(energy_key="eAT")))
    both = ReadOptions(energy_key="eAT", forces_key="totFOR")
    with pytest.raises(ValueError, match=r"no energy key 'eAT'; keys there are .*ePBE0\+MBD"):
        list(read_structures(FILES / "qm7x.hdf5", both))


def test_mace_says_nothing_by_a_word():
    found = list(read_structures(FILES / "mace.h5"))
    assert found[1].stress is None
    assert found[0].stress == pytest.approx(np.array([[0.01, 0.001, 0], [0.001, 0.02, 0], [0, 0, 0.03]]))
    assert [s.weights[0] for s in found] == [1.0, 2.0, 3.0, 4.0]
    assert found[0].pbc.all()
    assert found[0].cell[2, 2] == 8


@pytest.mark.parametrize("folder", ["properties/", ""])
def test_structures_of_a_batch_stay_in_order(folder, tmp_path):
    with h5py.File(tmp_path / "many.h5", "w") as file:
        for k in range(12):
            group = file.create_group(f"config_batch_0/config_{k}")
            group["atomic_numbers"], group["positions"] = [1], [[0.0, 0.0, 0.0]]
            group[f"{folder}energy"] = float(k)
    assert [s.energy for s in read_structures(tmp_path / "many.h5")] == list(range(12))


def test_mace_gives_no_weight_to_what_is_not_there(tmp_path):
    path = copied("mace.h5", tmp_path)
    with h5py.File(path, "r+") as file:
        first, second = (file[f"config_batch_0/config_{k}"] for k in range(2))
        first["property_weights/virials"][()] = 0.0  # it has a stress
        second["property_weights/stress"][()] = 0.0  # it gets virials
        second["property_weights/forces"][()] = 0.5
        del second["properties/virials"]
        second["properties/virials"] = -5.12 * np.eye(3)  # of 512 Å^3
    (one, two, *_) = read_structures(path)
    assert one.weights == (1.0, 1.0, 1.0)
    assert two.weights == (2.0, 1.0, 2.0)
    assert np.allclose(two.stress, 0.01 * np.eye(3))


def change_no_numbers(file):
    del file["H2O1/atomic_numbers"]


def change_shape(file):
    x = file["H2O1/coordinates"][()]
    del file["H2O1/coordinates"]
    file["H2O1/coordinates"] = x[:, :2]


def change_count(file):
    forces = file["H2O1/wb97x_dz.forces"][()]
    del file["H2O1/wb97x_dz.forces"]
    file["H2O1/wb97x_dz.forces"] = forces[:5]


def change_elements(file):
    file["H2O1/atomic_numbers"][0] = 200


def change_label(file):
    del file["H2O1/wb97x_dz.energy"]
    file["H2O1/wb97x_dz.energy"] = np.array([b"x"] * 6)


@pytest.mark.parametrize(
    ("change", "said", "left"),
    [
        (change_no_numbers, "group H2O1: there is no 'atomic_numbers'; keys there are", 6),
        (change_shape, r"coordinates must be \(N, 3\) or \(C, N, 3\).* got \(6, 2, 3\)", 6),
        (
            change_count,
            r"wb97x_dz.forces must have an entry for each of 6 conformations, got shape \(5, 3, 3\)",
            6,
        ),
        (change_elements, r"atomic numbers must be whole numbers up to 118 in one row, got \[200", 6),
        (change_label, r"ani1x.h5, frame \d+: could not convert string to float", 6),
    ],
)
def test_broken_groups_are_named_or_left_out(change, said, left, tmp_path):
    path = copied("ani1x.h5", tmp_path)
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(ValueError, match=said):
        list(read_structures(path))
    told = []
    assert len(list(read_structures(path, ReadOptions(on_unreadable=told.append)))) == left
    assert told


def test_other_and_truncated_files_are_refused(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["table/x"] = [1.0]
    with pytest.raises(ValueError, match=r"none of the known layouts .* its first group holds x; convert"):
        list(read_structures(tmp_path / "other.h5"))
    path = copied("spice.h5", tmp_path)
    path.write_bytes(path.read_bytes()[:6000])
    with pytest.raises(ValueError, match=r"cannot read .*spice.h5.*truncated file.*is the file whole\?"):
        list(read_structures(path))


def test_conformers_that_are_copies_are_left_out(tmp_path):
    path = copied("qm7x.hdf5", tmp_path)
    (note,) = {note for s in read_structures(path) for note in s.notes}
    assert note == "copies of other conformers are kept, for DupMols.dat is not beside the file"
    (tmp_path / "DupMols.dat").write_text("Geom-m10-i1-c1-opt\nGeom-m99-i1-c1-opt\n")
    left = list(read_structures(path))
    assert {s.group for s in left} == {"QM7-X 1"}  # displaced ones are gone, too
    assert len(left) == 3
    assert {note for s in left for note in s.notes} == {
        "what DupMols.dat names as copies of other conformers is left out"
    }
    (tmp_path / "DupMols.dat").write_text("<html>")
    with pytest.raises(ValueError, match=r"DupMols\.dat beside the file does not list conformers"):
        list(read_structures(path))
