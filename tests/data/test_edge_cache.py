"""Neighbour lists beside a store."""

import errno
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from megagnn.data import edge_cache
from megagnn.data.dataset import StructureDataset
from megagnn.data.edge_cache import EdgeCache
from tests import runs


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return runs.write_data(tmp_path / "store", runs.structures()[:12])


def graphs(dataset: StructureDataset) -> list[bytes]:
    found = [dataset[k] for k in range(len(dataset))]
    return [g["edge_index"].tobytes() + g["cell_shifts"].tobytes() for g in found]


@pytest.mark.parametrize("self_edges", [False, True])
def test_kept_lists_are_those_found(store: Path, self_edges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = StructureDataset([store], "all", 4.0, self_edges)
    kept = StructureDataset([store], "all", 4.0, self_edges)
    kept.cache_edges(1.0, make=True)
    assert graphs(kept) == graphs(plain)
    again = StructureDataset([store], "all", 4.0, self_edges)
    again.cache_edges(1.0, make=False)
    expected = graphs(plain)
    monkeypatch.setattr("megagnn.data.batch.neighbour_list", None)  # nothing is searched for any more
    assert graphs(again) == expected
    assert graphs(pickle.loads(pickle.dumps(again))) == expected
    with pytest.raises(TypeError):
        graphs(StructureDataset([store], "all", 4.0, self_edges))


def test_room_is_bounded_and_damage_seen(store: Path) -> None:
    dataset = StructureDataset([store], "all", 4.0)
    some = int(dataset.num_edges[:7].sum() * 7 + 40)
    dataset.cache_edges(some / 1e9, make=True)
    expected = graphs(StructureDataset([store], "all", 4.0))
    assert graphs(dataset) == expected
    [cache] = dataset._caches
    assert cache is not None
    there = [cache.get(row) is not None for row in range(12)]
    assert there == [True] * 7 + [False] * 5
    [data] = [f for f in store.glob("edges-*") if "index" not in f.name]
    assert data.stat().st_size <= some + 128
    whole = bytearray(data.read_bytes())
    whole[-20] ^= 1
    with data.open("r+b") as file:
        file.write(whole)
    assert [cache.get(row) is not None for row in range(12)] == [True] * 6 + [False] * 6
    assert graphs(dataset) == expected, "found again"
    assert cache.get(6) is not None


def test_nothing_fits(store: Path) -> None:
    dataset = StructureDataset([store], "all", 4.0)
    dataset.cache_edges(1e-9, make=True)
    assert graphs(dataset) == graphs(StructureDataset([store], "all", 4.0))
    assert dataset.without_cache() == []


def test_shifts_beyond_a_byte_are_not_kept(store: Path) -> None:
    dataset = StructureDataset([store], "all", 4.0)
    dataset.cache_edges(1.0, make=True)
    [cache] = dataset._caches
    assert cache is not None
    graph = StructureDataset([store], "all", 4.0)[0]
    far = np.where(np.arange(len(graph["cell_shifts"]))[:, None] == 0, 128, graph["cell_shifts"])
    cache.put(0, graph["edge_index"], far)
    assert cache.get(0) is None
    cache.put(0, graph["edge_index"], graph["cell_shifts"])
    assert cache.get(0) is not None


def test_another_store_has_other_files(store: Path) -> None:
    dataset = StructureDataset([store], "all", 4.0)
    dataset.cache_edges(1.0, make=True)
    names = {f.name for f in store.glob("edges-*")}
    dataset = StructureDataset([store], "all", 3.5)
    dataset.cache_edges(1.0, make=True)
    assert len({f.name for f in store.glob("edges-*")} - names) == 2


def test_without_files_or_rights_there_is_none(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = StructureDataset([store], "all", 4.0)
    dataset.cache_edges(1.0, make=False)
    assert dataset.without_cache() == [store]

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(edge_cache.tempfile, "mkstemp", refuse)
    dataset.cache_edges(1.0, make=True)
    assert dataset.without_cache() == [store]
    assert len(graphs(dataset)) == 12


def test_foreign_files_are_refused(store: Path) -> None:
    dataset = StructureDataset([store], "all", 4.0)
    dataset.cache_edges(1.0, make=True)
    [index] = store.glob("edges-*.index.npy")
    np.save(index, np.zeros(3))
    data = Path(str(index).replace(".index", ""))
    with pytest.raises(ValueError, match="is no index of neighbour lists; remove it"):
        EdgeCache(index, data, "<u2")
    assert os.path.exists(data)


def test_a_full_disk_is_no_end(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left, and lists are searched."""

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(edge_cache, "_take_room", full)
    dataset = StructureDataset([store], "all", 4.0)
    before = set(store.iterdir())
    dataset.cache_edges(1.0, make=True)
    assert dataset.without_cache() == [store]
    assert set(store.iterdir()) == before
    assert graphs(dataset) == graphs(StructureDataset([store], "all", 4.0))


def test_room_is_taken_at_once(store: Path) -> None:
    StructureDataset([store], "all", 4.0).cache_edges(1.0, make=True)
    [data] = [f for f in store.glob("edges-*") if "index" not in f.name]
    assert 512 * data.stat().st_blocks >= data.stat().st_size


def test_lists_of_another_user_are_read(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = StructureDataset([store], "all", 4.0)
    first.cache_edges(1.0, make=True)
    some = [first[k]["edge_index"] for k in range(6)]
    monkeypatch.setattr(os, "access", lambda *_: False)
    other = StructureDataset([store], "all", 4.0)
    other.cache_edges(1.0, make=False)
    assert other.without_cache() == []
    assert graphs(other) == graphs(StructureDataset([store], "all", 4.0))
    [cache] = other._caches
    assert cache is not None
    assert [cache.get(row) is not None for row in (5, 6)] == [True, False], "nothing is written"
    assert np.array_equal(cache.get(0)[0], some[0])
