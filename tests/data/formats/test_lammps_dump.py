"""LAMMPS dumps: no energy of ASE's making, elements from a column, masses or the user, units of a style."""

import gzip
from dataclasses import replace

import numpy as np
import pytest
from ase.units import Bohr, Hartree, kcal, mol

from megagnn.data.formats import ReadOptions, parse_units, read_structures

HEAD = "ITEM: TIMESTEP\n{step}\nITEM: NUMBER OF ATOMS\n3\nITEM: BOX BOUNDS pp pp pp\n0 4\n0 4\n0 4\n"
COLUMNS = "id type x y z fx fy fz"
ROWS = ["3 2 2.0 2.0 0.0 0.1 0.2 0.3", "1 1 0.0 0.0 0.0 -0.4 0.0 0.0", "2 2 2.0 0.0 2.0 0.3 -0.2 -0.3"]
TYPES = ReadOptions(species={"1": "Si", "2": "O"})


def dump(path, columns=COLUMNS, rows=ROWS, num_frames=2, head=HEAD):
    frames = [
        head.format(step=step) + f"ITEM: ATOMS {columns}\n" + "".join(f"{row}\n" for row in rows)
        for step in range(num_frames)
    ]
    data = "".join(frames).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["md.lammpstrj", "md.dump", "dump.md", "md.lammpstrj.gz"])
def test_types_without_elements_are_refused_with_the_way_out(tmp_path, name):
    path = dump(tmp_path / name)
    with pytest.raises(
        ValueError, match=r"without a column of elements \(it has id type .*--type-map 1=Si,2=O"
    ):
        list(read_structures(path))
    read = list(read_structures(path, TYPES))
    assert [s.atomic_numbers.tolist() for s in read] == [[14, 8, 8]] * 2  # in the order of id
    assert read[0].energy is None
    assert read[0].forces.tolist() == [[-0.4, 0, 0], [0.3, -0.2, -0.3], [0.1, 0.2, 0.3]]
    assert read[0].positions.tolist() == [[0, 0, 0], [2, 0, 2], [2, 2, 0]]
    assert any("units metal" in note for note in read[0].notes)


def test_a_map_that_lacks_a_type(tmp_path):
    with pytest.raises(ValueError, match=r"frame 0: unknown species 2 .*--type-map 2="):
        list(read_structures(dump(tmp_path / "a.dump"), ReadOptions(species={"1": "Si"})))


def test_a_column_of_elements_or_of_names_of_ones_own(tmp_path):
    rows = [row.replace(" 2 ", " OW ", 1).replace("1 1 ", "1 Si ", 1) for row in ROWS]
    path = dump(tmp_path / "a.dump", "id element x y z fx fy fz", rows)
    with pytest.raises(ValueError, match=r"unknown species OW; .*--species OW=O"):
        list(read_structures(path))
    read = next(read_structures(path, ReadOptions(species={"OW": "O"})))
    assert read.atomic_numbers.tolist() == [14, 8, 8]


def test_masses_tell_elements_if_they_are_of_elements(tmp_path):
    rows = [f"{row} {15.999 if row[2] == '2' else 28.0855}" for row in ROWS]
    read = next(read_structures(dump(tmp_path / "a.dump", f"{COLUMNS} mass", rows)))
    assert read.atomic_numbers.tolist() == [14, 8, 8]
    assert "elements told by masses" in read.notes
    reduced = [f"{row} 1.5" for row in ROWS]
    with pytest.raises(ValueError, match=r"a mass of 1.5 is that of no element; .*--type-map"):
        list(read_structures(dump(tmp_path / "b.dump", f"{COLUMNS} mass", reduced)))


def test_units_of_a_style_named_in_the_dump(tmp_path):
    path = dump(tmp_path / "a.dump", head="ITEM: UNITS\nreal\n" + HEAD)
    read = next(read_structures(path, TYPES))
    assert np.allclose(read.forces[0], [-0.4 * kcal / mol, 0, 0], rtol=1e-5)
    assert not any("units metal" in note for note in read.notes)


def test_units_of_the_user_come_before_those_of_the_dump_and_not_on_top(tmp_path):
    path = dump(tmp_path / "a.dump", head="ITEM: UNITS\nelectron\n" + HEAD)
    own = next(read_structures(path, TYPES))
    assert np.allclose(own.forces[0], [-0.4 * Hartree / Bohr, 0, 0], rtol=1e-5)
    assert np.allclose(own.positions[2], [2 * Bohr, 2 * Bohr, 0], rtol=1e-5)
    for units, force, length in (
        ("forces=kcal/mol/Å", kcal / mol, Bohr),
        ("length=nm", Hartree / Bohr, 10.0),
        ("forces=Ha/bohr,length=bohr", Hartree / Bohr, Bohr),
    ):
        read = next(read_structures(path, replace(TYPES, units=parse_units(units))))
        assert np.allclose(read.forces[0], [-0.4 * force, 0, 0], rtol=1e-5)
        assert np.allclose(read.positions[2], [2 * length, 2 * length, 0], rtol=1e-5)
        assert np.allclose(read.cell, 4 * length * np.eye(3), rtol=1e-5)


def test_a_dump_cut_short(tmp_path):
    path = dump(tmp_path / "a.dump")
    path.write_text(path.read_text()[:-30])
    with pytest.raises(ValueError, match=r"frame 1: 2 atoms are there of 3.*is the file whole"):
        list(read_structures(path, TYPES))
    told = []
    options = ReadOptions(species=TYPES.species, on_unreadable=told.append)
    assert len(list(read_structures(path, options))) == 1
    assert len(told) == 1
