"""Frames hold what the store has, and nothing is compared that other programs would not understand."""

from __future__ import annotations

from pathlib import Path

import ase.io
import numpy as np
import pytest

from megagnn.data import keys
from megagnn.data.record import Structure
from megagnn.data.split import SPLITS
from megagnn.data.store import Store, write_store
from tests.data.conftest import make_crystal, make_structure
from tools.peers.contract import ENERGY, FORCES
from tools.peers.frames import write_splits

THREE = np.array([0, 1, 2], np.uint8)


def store_of(folder: Path, structures: list[Structure], splits: np.ndarray = THREE) -> Store:
    write_store(folder / "store", structures, splits=splits, provenance={})
    return Store.open(folder / "store")


def test_frames_are_those_of_the_store(tmp_path: Path) -> None:
    of_one = {"source": "A", "level": "toy"}
    structures = [make_crystal(6, k, group=str(k), **of_one) for k in range(5)]
    structures.append(make_structure(1, 7, group="atom", config_type="IsolatedAtom", **of_one))
    store = store_of(tmp_path, structures, np.array([0, 2, 0, 1, 2, 0], np.uint8))
    write_splits(store, tmp_path / "frames")
    found = 0
    for split in SPLITS:
        frames = ase.io.read(tmp_path / "frames" / f"{split}.xyz", index=":")
        assert len(frames) == len(store.indices(split))
        for index, frame in zip(store.indices(split), frames, strict=True):
            record = store.structure(index)
            assert frame.calc is None
            assert not {"stress", "REF_stress", "virial"} & {*frame.info, *frame.arrays}
            assert frame.info[ENERGY] == pytest.approx(record[keys.ENERGY], abs=1e-8)
            np.testing.assert_allclose(frame.arrays[FORCES], record[keys.FORCES], rtol=0, atol=1e-8)
            np.testing.assert_allclose(frame.positions, record[keys.POSITIONS], rtol=0, atol=1e-8)
            np.testing.assert_allclose(frame.cell[:], record[keys.CELL], rtol=1e-15)
            np.testing.assert_array_equal(frame.numbers, record[keys.ATOMIC_NUMBERS])
            np.testing.assert_array_equal(frame.pbc, record[keys.PBC])
            assert frame.info.get("config_type", "") == ("IsolatedAtom" if len(frame) == 1 else "")
            found += 1
    assert found == len(structures)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forces": None}, "structure 2 of .* lacks energy or forces"),
        ({"energy": None}, "structure 2 of .* lacks energy or forces"),
        ({"fixed": np.array([True, False, False, False])}, "structure 2 of .* or has atoms held fixed"),
        ({"source": "B"}, "has the sources A, B; programs are compared on one"),
        ({"level": "other"}, "has the levels of theory toy, other; programs are compared on one"),
    ],
)
def test_what_others_would_not_understand_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    structures = [make_structure(4, k) for k in range(2)] + [make_structure(4, 2, **changes)]
    with pytest.raises(ValueError, match=message):
        write_splits(store_of(tmp_path, structures), tmp_path / "frames")


def test_a_store_without_a_split_is_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path, [make_structure(4, k) for k in range(3)], np.array([0, 0, 2], np.uint8))
    with pytest.raises(ValueError, match="has no valid frames; prepare it with all three splits"):
        write_splits(store, tmp_path / "frames")
