"""Every rule refuses what it is for, with its words, and lets sound structures pass."""

import numpy as np
import pytest

from megagnn.data.record import Rules, StructureError, check_structure
from tests.data.conftest import make_crystal, make_structure

NAN = float("nan")


def with_one(value, shape=(5, 3)):
    array = np.zeros(shape)
    array.flat[1] = value
    return array


@pytest.mark.parametrize(
    "structure", [make_structure(n, n) for n in (1, 2, 9)] + [make_crystal(n, n) for n in (1, 8)]
)
def test_sound_structures_pass(structure):
    check_structure(structure, Rules())


def test_energy_or_forces_alone_are_enough():
    check_structure(make_structure(forces=None), Rules())
    check_structure(make_structure(energy=None), Rules())


@pytest.mark.parametrize(
    ("changes", "rule", "message"),
    [
        ({"num_atoms": 0, "forces": None}, "empty", "the structure is empty"),
        (
            {"positions": np.zeros((4, 3))},
            "shape",
            r"positions must have shape \(5, 3\) for 5 atoms, got \(4, 3\)",
        ),
        ({"forces": np.zeros((5, 2))}, "shape", "forces must have shape"),
        ({"stress": np.zeros(6)}, "shape", "stress must have shape"),
        ({"fixed": np.zeros(1, bool)}, "shape", "fixed must have shape"),
        ({"atomic_numbers": np.array([1, 0, 1, 1, 1])}, "element", "unknown element with atomic number 0"),
        (
            {"atomic_numbers": np.array([1, 119, 1, 1, 1])},
            "element",
            "unknown element with atomic number 119",
        ),
        ({"positions": with_one(NAN)}, "finite_positions", "positions hold NaN"),
        ({"energy": NAN}, "finite_labels", "energy holds NaN"),
        ({"energy": float("inf")}, "finite_labels", "energy holds NaN or infinity"),
        ({"forces": with_one(NAN)}, "finite_labels", "forces holds NaN"),
        ({"energy": None, "forces": None}, "unlabelled", "neither energy nor forces"),
        ({"pbc": np.ones(3, bool)}, "lattice", "linearly independent"),
        ({"stress": np.eye(3)}, "lattice", "no cell volume"),
        ({"forces": with_one(101.0)}, "max_force", r"101 eV/Å, above the limit of 100 eV/Å"),
    ],
)
def test_refuses(changes, rule, message):
    with pytest.raises(StructureError, match=f"data.xyz, frame 12: .*{message}") as caught:
        check_structure(make_structure(**changes), Rules(), "data.xyz, frame 12")
    assert caught.value.rule == rule
    assert isinstance(caught.value, ValueError)


def test_overlapping_atoms():
    structure = make_structure(3, positions=np.array([[0, 0, 0], [3.0, 0, 0], [3.0, 0.4, 0]]))
    with pytest.raises(StructureError, match=r"atoms 1 and 2 overlap: 0\.4000 Å apart .*limit is 0\.5 Å"):
        check_structure(structure, Rules())
    check_structure(structure, Rules(min_distance=0.39))


def test_coincident_atoms():
    with pytest.raises(StructureError, match=r"overlap: 0\.0000 Å"):
        check_structure(make_structure(2, positions=np.zeros((2, 3))), Rules())


def test_overlap_through_a_periodic_face():
    cell, positions = 5 * np.eye(3), np.array([[0.1, 1, 1], [4.8, 1, 1]])
    check_structure(make_structure(2, positions=positions), Rules())
    with pytest.raises(StructureError, match=r"overlap: 0\.3000 Å"):
        check_structure(make_crystal(2, positions=positions, cell=cell), Rules())


def test_atom_overlapping_its_own_image():
    with pytest.raises(StructureError, match="atoms 0 and 0 overlap"):
        check_structure(make_crystal(1, cell=np.diag([0.4, 5, 5])), Rules())


@pytest.mark.parametrize("arguments", [{"min_distance": -1.0}, {"min_distance": NAN}, {"max_force": 0.0}])
def test_refuses_rules(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Rules(**arguments)
