"""Positions far from the cell: what float32 keeps of distances, and what must stay as it is."""

import numpy as np
import pytest

from megagnn.data.neighbours import neighbour_list
from megagnn.data.store import Store, write_store
from megagnn.data.store_writer import storable_positions
from tests.data.conftest import make_crystal, make_structure


def distances(positions, cell, pbc):
    cell, pbc = np.asarray(cell, dtype=np.float64), np.asarray(pbc, dtype=bool)
    (i, j), shifts = neighbour_list(np.asarray(positions, dtype=np.float64), cell, pbc, 3.0)
    return np.sort(np.linalg.norm(positions[j] + shifts @ cell - positions[i], axis=1))


def stored(path, structure):
    write_store(path, [structure], splits=np.zeros(1, dtype=np.uint8))
    return Store.open(path).arrays["positions"]


@pytest.mark.parametrize("periodic", [(True, True, True), (True, True, False), (False, True, False)])
def test_distances_of_far_atoms_are_kept(tmp_path, periodic):
    near = make_crystal(8, 0, pbc=np.array(periodic), stress=None)
    images = np.random.default_rng(1).integers(-9000, 9000, (8, 3)) * np.array(periodic)
    far = near.positions + images @ near.cell
    exact = distances(near.positions, near.cell, near.pbc)
    assert len(exact) > 8
    lost = far.astype(np.float32).astype(np.float64)
    moved = stored(tmp_path / "s", make_crystal(8, 0, pbc=near.pbc, stress=None, positions=far)).astype(
        np.float64
    )
    kept = distances(moved, near.cell, near.pbc)
    assert np.abs(kept - exact).max() < 1e-6
    assert np.abs(lost - far).max() > 1e-4  # what is guarded against


def test_a_molecule_far_away_comes_to_the_origin(tmp_path):
    molecule = make_structure(6, 0)
    far = molecule.positions + np.array([20000.0, -5000.0, 3.0])
    moved = stored(tmp_path / "s", make_structure(6, 0, positions=far)).astype(np.float64)
    kept = np.linalg.norm(moved[:, None] - moved, axis=2)
    exact = np.linalg.norm(molecule.positions[:, None] - molecule.positions, axis=2)
    assert np.abs(kept - exact).max() < 1e-6


def test_what_is_near_stays_to_the_byte(tmp_path):
    crystal = make_crystal(8, 0)
    unwrapped = crystal.positions + np.array([1, -1, 0]) @ crystal.cell * 0.9
    for positions, cell, pbc in [
        (unwrapped, crystal.cell, crystal.pbc),
        (make_structure(6, 0).positions + 100.0, np.zeros((3, 3)), np.zeros(3, dtype=bool)),
    ]:
        assert storable_positions(positions, cell, pbc).tobytes() == positions.tobytes()
    read = stored(tmp_path / "s", make_crystal(8, 0, positions=unwrapped))
    assert read.tobytes() == unwrapped.astype("<f4").tobytes()
