"""Collating structures: offsets, row pointers, missing labels, empty batches."""

import numpy as np
import pytest
import torch
from ase.build import bulk, fcc111, molecule

from megagnn.data import keys
from megagnn.data.batch import batch_from_atoms, build_graph, collate


def graphs():
    rng = np.random.default_rng(0)
    result = []
    for num_atoms, cell, pbc in ((4, np.zeros((3, 3)), (False,) * 3), (1, 3 * np.eye(3), (True,) * 3)):
        numbers = np.arange(1, num_atoms + 1, dtype=np.uint8)
        result.append(build_graph(numbers, rng.uniform(0, 3, (num_atoms, 3)), cell, np.array(pbc), 4.0))
    result[0] |= {keys.ENERGY: -1e6 - 1e-4, keys.FORCES: np.ones((4, 3)), keys.SOURCE: 1, keys.LEVEL: 2}
    result[1] |= {keys.STRESS: np.eye(3), keys.FIXED: np.array([True]), keys.STRUCTURE: 17}
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_and_types(dtype):
    batch = collate(graphs(), dtype)
    assert batch[keys.ENERGY].dtype == torch.float64
    assert batch[keys.ENERGY].tolist() == [-1e6 - 1e-4, 0.0]
    for key in (keys.POSITIONS, keys.CELL, keys.CELL_SHIFTS, keys.FORCES, keys.STRESS):
        assert batch[key].dtype == dtype
    assert batch[keys.HAS_ENERGY].tolist() == batch[keys.HAS_FORCES].tolist() == [True, False]
    assert batch[keys.HAS_STRESS].tolist() == [False, True]
    assert batch[keys.FORCES].tolist() == [[1.0] * 3] * 4 + [[0.0] * 3]
    assert batch[keys.STRESS].tolist() == [np.zeros((3, 3)).tolist(), np.eye(3).tolist()]
    assert batch[keys.FIXED].tolist() == [False] * 4 + [True]
    assert batch[keys.SOURCE].tolist() == [1, 0]
    assert batch[keys.LEVEL].tolist() == [2, 0]
    assert batch[keys.STRUCTURE].tolist() == [0, 17]


def test_edges_stay_inside_their_structure_and_keep_their_vectors():
    parts = graphs()
    batch = collate(parts, torch.float64)
    destination, source = batch[keys.EDGE_INDEX]
    assert torch.equal(batch[keys.BATCH][destination], batch[keys.BATCH][source])
    cell = batch[keys.CELL][batch[keys.BATCH][destination]]
    shift = (batch[keys.CELL_SHIFTS][:, None, :] @ cell)[:, 0]
    vectors = batch[keys.POSITIONS][source] + shift - batch[keys.POSITIONS][destination]
    expected = [
        p[keys.POSITIONS][p[keys.EDGE_INDEX][1]]
        + p[keys.CELL_SHIFTS] @ p[keys.CELL]
        - p[keys.POSITIONS][p[keys.EDGE_INDEX][0]]
        for p in parts
    ]
    assert np.array_equal(vectors.numpy(), np.concatenate(expected))
    assert (vectors.norm(dim=1) < 4.0).all()


def test_row_pointers():
    batch = batch_from_atoms([molecule("CH3CH2OH"), bulk("Cu"), fcc111("Pt", (2, 2, 3), vacuum=6.0)], 5.0)
    destination, source = batch[keys.EDGE_INDEX]
    row_ptr, source_ptr, perm = batch[keys.ROW_PTR], batch[keys.SOURCE_PTR], batch[keys.SOURCE_PERM]
    num_atoms = len(batch[keys.ATOMIC_NUMBERS])
    assert len(row_ptr) == len(source_ptr) == num_atoms + 1
    for atom in range(num_atoms):
        assert (destination[row_ptr[atom] : row_ptr[atom + 1]] == atom).all()
        mine = perm[source_ptr[atom] : source_ptr[atom + 1]]
        assert torch.equal(mine, torch.nonzero(source == atom)[:, 0])  # all of them, in ascending order
    assert row_ptr[-1] == source_ptr[-1] == len(destination)
    assert batch[keys.GRAPH_PTR].tolist() == [0, 9, 10, 22]
    assert batch[keys.NUM_ATOMS].tolist() == [9, 1, 12]


def test_empty_batch_has_every_key_with_the_same_types():
    empty, full = collate([]), collate(graphs())
    assert empty.keys() == full.keys()
    for key, tensor in empty.items():
        assert tensor.dtype == full[key].dtype, key
        assert tensor.dim() == full[key].dim(), key
    assert empty[keys.EDGE_INDEX].shape == (2, 0)
    assert empty[keys.ROW_PTR].tolist() == empty[keys.GRAPH_PTR].tolist() == [0]
    assert empty[keys.STRESS].shape == (0, 3, 3)


def test_structure_without_edges():
    batch = batch_from_atoms([molecule("H2"), molecule("H")], 0.5)
    assert batch[keys.EDGE_INDEX].shape == (2, 0)
    assert batch[keys.ROW_PTR].tolist() == batch[keys.SOURCE_PTR].tolist() == [0] * 4
    assert not batch[keys.HAS_ENERGY].any()


def test_self_edges():
    batch = batch_from_atoms([molecule("H2")], 0.5, self_edges=True)
    assert batch[keys.EDGE_INDEX].tolist() == [[0, 1], [0, 1]]


def test_non_periodic_structure_has_no_cell():
    atoms = molecule("H2")
    atoms.cell = 5 * np.eye(3)
    assert not batch_from_atoms([atoms], 4.0)[keys.CELL].any()


def test_refuses_low_precision():
    with pytest.raises(ValueError, match="float32 or float64"):
        collate(graphs(), torch.bfloat16)
