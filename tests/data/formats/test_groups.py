"""Groups named by content: of structures, not of files or labels."""

import shutil

import numpy as np

from megagnn.data.formats import ReadOptions, read_structures
from tests.data.formats.frames import crystal, write


def groups(path, by):
    return [s.group for s in read_structures(path, ReadOptions(group_by=by))]


def test_files_of_one_name_in_two_folders_do_not_collide(tmp_path):
    one = write(tmp_path / "1/data.xyz", crystal(0), crystal(1))
    two = write(tmp_path / "2/data.xyz", crystal(2), crystal(3))
    for by in ("frame", "file"):
        assert not set(groups(one, by)) & set(groups(two, by))
    assert len(set(groups(one, "file"))) == 1
    assert len(set(groups(one, "frame"))) == 2


def test_one_structure_of_two_methods_is_one_group(tmp_path):
    pbe = write(tmp_path / "pbe.xyz", crystal(0), crystal(1))
    scan = write(tmp_path / "scan.xyz", crystal(0, energy=-20.0), crystal(1, energy=-21.0, forces=None))
    for by in ("frame", "file"):
        assert groups(pbe, by) == groups(scan, by)


def test_a_file_is_named_by_all_its_frames(tmp_path):
    short = write(tmp_path / "a.xyz", crystal(0))
    longer = write(tmp_path / "b.xyz", crystal(0), crystal(1))
    assert groups(short, "file")[0] != groups(longer, "file")[0]
    shutil.copy(longer, tmp_path / "c.xyz")
    assert groups(longer, "file") == groups(tmp_path / "c.xyz", "file")


def test_small_differences_of_digits_do_not_matter(tmp_path):
    text = crystal(0)
    (first,) = groups(write(tmp_path / "a.xyz", text), "frame")
    (structure,) = read_structures(tmp_path / "a.xyz")
    shorter = text.replace(f"{structure.positions[0, 0]:.10f}", f"{structure.positions[0, 0]:.7f}")
    assert shorter != text
    assert groups(write(tmp_path / "b.xyz", shorter), "frame") == [first]


def test_an_unreadable_frame_leaves_the_name_of_its_file_to_the_others(tmp_path):
    path = write(tmp_path / "a.xyz", crystal(0), crystal(1), "3\n")
    told = []
    options = ReadOptions(group_by="file", on_unreadable=told.append)
    read = list(read_structures(path, options))
    assert len(read) == 2
    assert len(told) == 1  # of the two readings only one tells
    assert np.all([s.group == read[0].group for s in read])
