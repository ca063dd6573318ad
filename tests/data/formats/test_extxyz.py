"""Extended XYZ: tensors of six numbers, what is skipped, broken frames, blank lines."""

import numpy as np
import pytest

from megagnn.data.formats import ReadOptions, read_structures
from tests.data.formats.frames import STRESS, VOLUME, crystal, text_of, write

VOIGT = STRESS[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]  # xx yy zz yz xz xy
NO_STRESS = ReadOptions(stress_key="none")


def test_six_numbers_are_read_in_the_order_of_ase(tmp_path):
    (six,) = read_structures(write(tmp_path / "6.xyz", crystal(stress=text_of(VOIGT))))
    (nine,) = read_structures(write(tmp_path / "9.xyz", crystal(stress=text_of(STRESS))))
    assert np.allclose(six.stress, STRESS)
    assert np.allclose(nine.stress, STRESS)


def test_six_numbers_of_a_virial_and_of_a_key(tmp_path):
    path = write(tmp_path / "v.xyz", crystal(virial=text_of(-VOLUME * VOIGT), REF_stress=text_of(VOIGT)))
    (read,) = read_structures(path)
    assert np.allclose(read.stress, STRESS)
    (keyed,) = read_structures(
        path,
        ReadOptions(energy_key="energy", forces_key="forces", stress_key="REF_stress", virial_key="none"),
    )
    assert np.allclose(keyed.stress, STRESS)


@pytest.mark.parametrize("value", ["nan", "none", "1 2 3", "1 2 3 4 5 six"])
def test_a_stress_that_is_none_matters_only_if_wanted(tmp_path, value):
    path = write(tmp_path / "a.xyz", crystal(stress=value))
    with pytest.raises(ValueError, match=r"frame 0: stress must have 6 or 9 components.*--stress-key none"):
        list(read_structures(path))
    (read,) = read_structures(path, NO_STRESS)
    assert read.stress is None
    assert read.energy == -10.0


def test_stress_is_skipped_alone(tmp_path):
    path = write(tmp_path / "a.xyz", crystal(stress=text_of(STRESS)))
    (read,) = read_structures(path, NO_STRESS)
    assert (read.stress, read.energy) == (None, -10.0)
    assert read.forces is not None


def test_blank_lines_end_nothing(tmp_path):
    path = write(tmp_path / "a.xyz", "\n", crystal(0), "\n", crystal(1), "\n\n")
    assert [s.energy for s in read_structures(path)] == [-10.0, -9.9]


def test_frames_after_a_bad_one_are_read_where_its_end_is_known(tmp_path):
    told = []
    frames = [crystal(0), crystal(1, species=("Cu", "Qq", "Ni")), crystal(2), crystal(3)[:-30]]
    path = write(tmp_path / "a.xyz", *frames)
    read = list(read_structures(path, ReadOptions(on_unreadable=told.append)))
    assert [s.energy for s in read] == [-10.0, -9.8]
    assert "frame 1: unknown species Qq" in str(told[0])
    assert "frame 3" in str(told[1])
    assert len(told) == 2


def lines_of(seed):
    return crystal(seed).splitlines(keepends=True)


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (lambda lines: lines[:-1], [1]),  # an atom too few
        (lambda lines: [*lines, lines[-1]], [1]),  # an atom too many
        (lambda lines: ["30\n", *lines[1:]], [1]),
        (lambda lines: lines[1:], [1]),  # no number of atoms
        (lambda lines: ["x3\n", *lines[1:]], [1]),
        (lambda lines: [lines[0], *lines[2:]], [1]),  # no comment
        (lambda lines: [*lines[:-1], *lines_of(7)[1:]], [1, 2]),  # a number of atoms lost after an atom
    ],
)
def test_a_frame_of_a_wrong_number_of_lines_costs_that_frame(tmp_path, change, lost):
    path = write(tmp_path / "a.xyz", crystal(0), *change(lines_of(1)), *(crystal(k) for k in range(2, 6)))
    told = []
    read = list(read_structures(path, ReadOptions(on_unreadable=told.append)))
    assert [s.energy for s in read] == [-10.0, -9.8, -9.7, -9.6, -9.5]
    assert [f"frame {k}:" in str(error) for k, error in zip(lost, told, strict=True)] == [True] * len(lost)
    assert [error.last for error in told] == [None] * len(lost)
    with pytest.raises(ValueError, match="frame 1: "):
        list(read_structures(path))


def test_frames_without_known_beginnings_are_said_to_be_lost(tmp_path):
    plain = "2\nenergy=-1\nCu 0 0 0\nCu 0 0 2\n"
    for name, bad in (
        ("few", plain[:-9]),
        ("many", plain + "Cu 0 0 4\n"),
        ("far", plain.replace("2", "99", 1)),
    ):
        told = []
        path = write(tmp_path / f"{name}.xyz", plain, bad, *[plain] * 5)
        list(read_structures(path, ReadOptions(forces_key="none", on_unreadable=told.append)))
        assert told[-1].last == 1, name


def test_file_cut_within_a_frame(tmp_path):
    path = write(tmp_path / "a.xyz", crystal(0), *(line + "\n" for line in crystal(1).split("\n")[:3]))
    with pytest.raises(ValueError, match="frame 1: the file ends within a frame of 3 atoms"):
        list(read_structures(path))


def test_weights_kinds_and_charges(tmp_path):
    keys = {"config_weight": 2.0, "config_forces_weight": 0.5, "config_type": "slab", "charge": -1, "spin": 0}
    (read,) = read_structures(write(tmp_path / "a.xyz", crystal(**keys)))
    assert read.weights == (2.0, 1.0, 2.0)
    assert read.config_type == "slab"
    assert (read.notes, read.charge, read.multiplicity) == ((), -1.0, 0)
    (plain,) = read_structures(write(tmp_path / "c.xyz", crystal()))
    assert (plain.charge, plain.weights, plain.config_type) == (0.0, (1.0, 1.0, 1.0), "")
    with pytest.raises(ValueError, match=r"frame 0: weights .* must be 0 or positive"):
        list(read_structures(write(tmp_path / "d.xyz", crystal(config_weight=-1))))
