"""Neighbour lists against the brute-force oracle and against ASE."""

from itertools import product

import ase.neighborlist
import numpy as np
import pytest
from ase import Atoms

from megagnn.data.neighbours import DENSE_ATOMS, neighbour_list, periodic_cell

TRICLINIC = np.array([[4.0, 0.0, 0.0], [1.3, 3.6, 0.0], [-0.7, 0.9, 4.4]])


def cases():
    rng = np.random.default_rng(7)
    spread = rng.uniform(-6, 6, (9, 3))  # far outside the cells below
    flat = TRICLINIC.copy()
    flat[2] = 0
    yield "molecule", spread, np.zeros((3, 3)), (False, False, False)
    yield "molecule in a box", spread, TRICLINIC, (False, False, False)
    yield (
        "larger than the dense limit",
        rng.uniform(0, 12, (DENSE_ATOMS + 9, 3)),
        np.zeros((3, 3)),
        (False,) * 3,
    )
    yield "triclinic bulk, unwrapped", spread, TRICLINIC, (True, True, True)
    yield "slab", spread, TRICLINIC, (True, True, False)
    yield "slab with a zero third vector", spread, flat, (True, True, False)
    yield "chain along b", spread, TRICLINIC, (False, True, False)
    yield "slab in a, c", spread, TRICLINIC, (True, False, True)
    yield "one atom", np.array([[0.3, 9.0, -7.0]]), TRICLINIC, (True, True, True)


def brute_force(positions, cell, pbc, cutoff, self_edges=False):
    """The same list by trying every pair and every image: O(N^2 images)."""
    points = np.asarray(positions, dtype=np.float64)
    periodic = np.asarray(pbc, dtype=bool)
    box = periodic_cell(np.asarray(cell, dtype=np.float64), periodic)
    reach = image_reach(points, box, periodic, cutoff)
    edges, shifts = [], []
    for shift in product(*(range(-n, n + 1) for n in reach)):
        vectors = points[None, :, :] + np.asarray(shift) @ box - points[:, None, :]
        near = np.linalg.norm(vectors, axis=-1) < cutoff
        if shift == (0, 0, 0):
            np.fill_diagonal(near, self_edges)
        pairs = np.argwhere(near)
        edges.append(pairs)
        shifts.append(np.broadcast_to(shift, (len(pairs), 3)))
    edge_index = np.concatenate(edges).T.astype(np.int64)
    shift_array = np.concatenate(shifts).astype(np.int64)
    order = np.lexsort((*shift_array.T[::-1], edge_index[1], edge_index[0]))
    return edge_index[:, order], shift_array[order]


def image_reach(points, box, periodic, cutoff):
    """How many images to try along each vector: enough for atoms lying anywhere."""
    reach = [0, 0, 0]
    if not len(points) or not periodic.any():
        return reach
    used = np.flatnonzero(periodic)
    dual = np.linalg.pinv(box[used])  # (3, k): fractional coordinates along the periodic vectors
    spread = np.ptp(points @ dual, axis=0)
    for k, axis in enumerate(used):
        reach[axis] = int(np.ceil(cutoff * np.linalg.norm(dual[:, k]) + spread[k])) + 1
    return reach


@pytest.mark.parametrize(("name", "positions", "cell", "pbc"), list(cases()), ids=[c[0] for c in cases()])
@pytest.mark.parametrize("self_edges", [False, True])
def test_equals_brute_force(name, positions, cell, pbc, self_edges):
    edges, shifts = neighbour_list(positions, cell, pbc, 4.2, self_edges)
    expected, expected_shifts = brute_force(positions, cell, pbc, 4.2, self_edges)
    assert np.array_equal(edges, expected)
    assert np.array_equal(shifts, expected_shifts)
    assert edges.dtype == shifts.dtype == np.int64


@pytest.mark.parametrize(("name", "positions", "cell", "pbc"), list(cases()), ids=[c[0] for c in cases()])
def test_equals_ase(name, positions, cell, pbc):
    atoms = Atoms(numbers=np.ones(len(positions)), positions=positions, cell=cell, pbc=pbc)
    i, j, s, vectors = ase.neighborlist.neighbor_list("ijSD", atoms, 4.2)
    edges, shifts = neighbour_list(positions, cell, pbc, 4.2)
    rows = np.column_stack([*edges, shifts])
    expected = np.column_stack([i, j, s])
    order = np.lexsort(expected.T[::-1])
    assert np.array_equal(rows, expected[order])
    own = positions[edges[1]] + shifts @ cell - positions[edges[0]]
    assert np.allclose(own, vectors[order], atol=1e-12)


def test_list_is_sorted_and_symmetric():
    edges, shifts = neighbour_list(
        np.random.default_rng(1).uniform(0, 4, (6, 3)), TRICLINIC, (True,) * 3, 5.0
    )
    rows = [tuple(map(int, row)) for row in np.column_stack([*edges, shifts])]
    assert rows == sorted(rows)
    assert len(set(rows)) == len(rows)
    assert {(j, i, -a, -b, -c) for i, j, a, b, c in rows} == set(rows)


@pytest.mark.parametrize("num_atoms", [2, DENSE_ATOMS + 2])
def test_coincident_atoms_are_neighbours(num_atoms):
    positions = 10.0 * np.arange(num_atoms)[:, None] * np.ones(3)
    positions[1] = positions[0]
    for cell, pbc in ((np.zeros((3, 3)), (False,) * 3), (1e4 * np.eye(3), (True,) * 3)):
        assert neighbour_list(positions, cell, pbc, 1.0)[0].T.tolist() == [[0, 1], [1, 0]]


def test_no_atoms():
    edges, shifts = neighbour_list(np.zeros((0, 3)), np.zeros((3, 3)), (False,) * 3, 5.0)
    assert edges.shape == (2, 0)
    assert shifts.shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cutoff": -1.0}, "cutoff must be"),
        ({"cutoff": float("nan")}, "cutoff must be"),
        ({"positions": np.zeros((2, 2))}, r"shape \(N, 3\)"),
        ({"positions": np.full((2, 3), np.nan)}, "finite"),
        ({"cell": np.zeros((3, 3))}, "linearly independent"),
        ({"cell": np.diag([1.0, 1.0, 0.0])}, "linearly independent"),
        ({"cell": np.array([[1.0, 0, 0], [2.0, 0, 0], [0, 0, 1]])}, "linearly independent"),
        ({"cell": np.eye(2)}, "cell must have shape"),
        ({"pbc": (True, True)}, "pbc"),
    ],
)
def test_refuses(change, message):
    arguments = {
        "positions": np.zeros((1, 3)),
        "cell": np.eye(3),
        "pbc": (True,) * 3,
        "cutoff": 2.0,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        neighbour_list(**arguments)
