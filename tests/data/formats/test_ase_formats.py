"""Which of ASE's formats a file has, and what is said where that cannot be told."""

from pathlib import Path

import ase.test
import pytest

from megagnn.data.formats import ReadOptions, read_structures
from tests.data.formats.frames import crystal, write

AIMS = Path(ase.test.__file__).parent / "testdata/aims/md.out"


@pytest.mark.parametrize(
    "name", ["frames.exyz", "run@300K.extxyz", "run@2.xyz", "data", ".frames.xyz", "a.train"]
)
def test_names_that_mislead_ase(tmp_path, name):
    read = list(read_structures(write(tmp_path / name, crystal(0), crystal(1))))
    assert [s.energy for s in read] == [-10.0, -9.9]
    assert read[0].source == name.lstrip(".").split(".")[0]


def test_an_ending_taken_for_another_program():
    with pytest.raises(
        ValueError, match=r"no structure found, read as ASE's format espresso-out.*perhaps aims-output"
    ):
        list(read_structures(AIMS))
    read = list(read_structures(AIMS, ReadOptions(ase_format="aims-output")))
    assert len(read) == 5
    assert read[0].energy == pytest.approx(-2067.77440862, abs=1e-6)


def test_a_format_by_name_goes_before_the_ending(tmp_path):
    path = write(tmp_path / "a.json", crystal(0))
    assert len(list(read_structures(path, ReadOptions(ase_format="extxyz")))) == 1
    with pytest.raises(ValueError, match="ASE reads no format 'aims-out'; near are aims-output"):
        list(read_structures(path, ReadOptions(ase_format="aims-out")))


def test_unknown_files(tmp_path):
    (tmp_path / "a.thing").write_text("some words\n")
    with pytest.raises(ValueError, match=r"ASE knows no such file by its name or content; .*--ase-format"):
        list(read_structures(tmp_path / "a.thing"))
    (tmp_path / "b.out").write_text("LAMMPS data file\n\n0.0 1.0 xlo xhi\n")
    with pytest.raises(ValueError, match=r"read as ASE's format espresso-out.*perhaps lammps-data"):
        list(read_structures(tmp_path / "b.out"))
