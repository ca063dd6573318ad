"""Species that are no elements: named, with the way out, and read by a map."""

import pytest

from megagnn.data.formats import ReadOptions, parse_species, read_structures
from tests.data.formats.frames import crystal, write

WATER = {"OW": "O", "HW1": "H", "HW2": "H"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("O", "D", "D"), r"frame 0: unknown species D \(isotopes .*as in --species D=H"),
        (("O", "T", "H"), r"frame 0: unknown species T \(isotopes .*as in --species T=H"),
        (("OW", "HW1", "HW2"), "frame 0: unknown species OW, HW1, HW2; .* --species OW=O,HW1=H,HW2=H"),
        (("8", "1", "1"), r"unknown species 8, 1 \(numbers .*may be types.* --species 8=O,1=H"),
        (("Fe2+", "O", "O"), r"unknown species Fe2\+; .* --species Fe2\+=Fe"),
    ],
)
def test_unknown_species_are_named_with_the_way_out(tmp_path, names, message):
    path = write(tmp_path / "a.extxyz", crystal(species=names))
    with pytest.raises(ValueError, match=message) as told:
        list(read_structures(path))
    given = parse_species(str(told.value).rpartition("--species ")[2])  # the message's own example works
    (read,) = read_structures(path, ReadOptions(species=given))
    assert read.num_atoms == 3


def test_mapped_species_are_the_elements_they_stand_for(tmp_path):
    path = write(tmp_path / "a.xyz", crystal(species=("OW", "HW1", "HW2")))
    (read,) = read_structures(path, ReadOptions(species=WATER))
    (plain,) = read_structures(write(tmp_path / "b.xyz", crystal(species=("O", "H", "H"))))
    assert read.atomic_numbers.tolist() == [8, 1, 1]
    assert read.positions.tolist() == plain.positions.tolist()
    assert read.forces.tolist() == plain.forces.tolist()


def test_capitals_do_not_matter_and_a_map_comes_first(tmp_path):
    path = write(tmp_path / "a.xyz", crystal(species=("CU", "pt", "H")))
    (read,) = read_structures(path, ReadOptions(species={"H": "He"}))
    assert read.atomic_numbers.tolist() == [29, 78, 2]


def test_maps():
    assert parse_species("OW=O, HW=H") == {"OW": "O", "HW": "H"}
    assert parse_species("Si,O") == {"1": "Si", "2": "O"}  # types 1, 2
    for text, message in [
        ("Si,2=O", "takes NAME=ELEMENT,... or a list"),
        ("1=Xx", "'Xx' is not an element"),
        ("1=Si,1=O", "names a species twice"),
        ("D=", "'' is not an element"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_species(text)
