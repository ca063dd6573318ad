"""Arrays of NumPy: rMD17 and sGDML archives, and folders of DeePMD-kit; what is refused in them.

The files of tests/data/files are written by tools/sample_files/arrays.py.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest

from megagnn.data.formats import ReadOptions, Units, detect_format, read_structures
from tests.data.formats.springs import FILES, spring


@pytest.mark.parametrize(
    ("name", "format", "level"),
    [
        ("rmd17_water.npz", "npz", "PBE/def2-SVP"),
        ("sgdml_water.npz", "npz", "CCSD"),
        ("deepmd", "deepmd", "unknown"),
    ],
)
def test_labels_are_those_of_the_spring(name, format, level):
    assert detect_format(FILES / name) == format
    found = list(read_structures(FILES / name))
    assert len(found) == 5
    for structure in found:
        energy, forces = spring(structure.positions)
        assert structure.atomic_numbers.tolist() == [8, 1, 1]
        assert structure.energy == pytest.approx(energy, abs=1e-5)
        assert structure.forces == pytest.approx(forces, abs=1e-7)
        assert (structure.level, structure.group) == (level, "H2O")
    assert np.abs(found[0].forces).max() > 0.01
    # compression is positive in a virial, tension in a stress; the cell has 512 Å^3
    stress = np.diag([-0.01, -0.02, 0]) if format == "deepmd" else None
    assert stress is found[0].stress is None or found[0].stress == pytest.approx(stress)


def test_the_older_labels_come_together():
    new, old = (
        next(read_structures(FILES / "rmd17_water.npz", ReadOptions(energy_key=k)))
        for k in (None, "old_energies")
    )
    assert old.forces == pytest.approx(0.9 * new.forces)
    assert old.energy == pytest.approx(new.energy + 0.0433641042, abs=1e-5)


def npz(path, **changes):
    with np.load(FILES / "sgdml_water.npz") as file:
        arrays = {**file, **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"e_unit": "furlong"},
            r"declares units that are not known here .*'furlong'.*; give them with --units",
        ),
        (
            {"z": None},
            r"has neither nuclear_charges, coords \(rMD17\) nor z, R \(sGDML\); arrays there are type",
        ),
        ({"R": np.zeros((5, 4, 3))}, r"array R must be \(C, N, 3\) .* got \(5, 4, 3\) and \(3,\)"),
        ({"F": np.zeros((4, 3, 3))}, r"array F must have a row for each of 5 .* got shape \(4, 3, 3\)"),
        ({"F": np.array([None] * 5)}, "array F holds Python objects, which are not run"),
        ({"z": np.array([8.5, 1, 1])}, r"must be whole numbers up to 118 in one row, got \[8.5"),
        ({"E": None}, "there is no energy key 'E'; keys there are "),
    ],
)
def test_broken_archives_are_refused(changes, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        list(read_structures(npz(tmp_path / "a.npz", **changes), ReadOptions(energy_key="E", forces_key="F")))


def test_a_truncated_archive_and_a_damaged_one(tmp_path):
    content = (FILES / "sgdml_water.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[:-40])
    with pytest.raises(
        ValueError, match=r"cannot read .*a.npz, frame 0: File is not a zip file; is the file whole\?"
    ):
        list(read_structures(tmp_path / "a.npz"))
    long = npz(tmp_path / "b.npz")
    with np.load(long) as file:
        at = long.read_bytes().index(file["R"].tobytes()[:64])
    changed = bytearray(long.read_bytes())
    changed[at + 8] ^= 255
    long.write_bytes(changed)
    with pytest.raises(ValueError, match=r"Bad CRC-32 for file 'R.npy'; is the file whole\?"):
        list(read_structures(long))


def test_units_and_cells_of_archives(tmp_path):
    changes = {"e_unit": "furlong", "lattice": 9.0 * np.eye(3) + np.eye(3, k=1)}
    options = ReadOptions(units=Units({"energy": "Ha", "forces": "Ha/bohr", "length": "Å"}))
    first = next(read_structures(npz(tmp_path / "a.npz", **changes), options))
    assert first.energy == pytest.approx(27.211386 * next(read_structures(FILES / "sgdml_water.npz")).energy)
    assert first.pbc.all()
    assert first.cell[1].tolist() == [1.0, 9.0, 0.0]  # a column of the file


def changed_folder(tmp_path, change):
    folder = tmp_path / "deepmd"
    shutil.copytree(FILES / "deepmd", folder)
    change(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda d: np.save(d / "set.000/force.npy", np.zeros((3, 8))),
            r"set.000/force.npy must be \(3, 9\) for 3",
        ),
        (
            lambda d: (d / "set.001/box.npy").unlink(),
            "set.001 has no coord.npy or, without a file nopbc, no box",
        ),
        (
            lambda d: (d / "set.000/energy.npy").write_bytes(b"\x93NUMPY"),
            r"energy.npy is no array: .* whole\?",
        ),
        (
            lambda d: np.save(d / "set.000/fparam.npy", np.float64(3.0)),
            r"fparam.npy holds no row for each frame but a single value; remove it",
        ),
        (lambda d: (d / "type.raw").write_text("0 x 1"), "type.raw must hold whole numbers"),
        (lambda d: (d / "type_map.raw").unlink(), r"unknown species 1, 2 .* say .* --type-map 1="),
    ],
)
def test_broken_folders_are_refused(change, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        list(read_structures(changed_folder(tmp_path, change)))


def test_folders_of_mixed_types_and_of_molecules(tmp_path):
    def mix(folder: Path) -> None:
        (folder / "nopbc").touch()
        for k, count in enumerate((3, 2)):
            np.save(folder / f"set.00{k}/real_atom_types.npy", np.array([[1, 0, -1]] * count))
            (folder / f"set.00{k}/box.npy").unlink()

    found = list(read_structures(changed_folder(tmp_path, mix)))
    assert [s.atomic_numbers.tolist() for s in found] == [[1, 8]] * 5
    assert found[0].forces.shape == (2, 3)
    assert not found[0].pbc.any()
    (tmp_path / "deepmd/type_map.raw").unlink()
    named = ReadOptions(species={"1": "C", "2": "N"})
    assert next(read_structures(tmp_path / "deepmd", named)).atomic_numbers.tolist() == [7, 6]
