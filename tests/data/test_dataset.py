"""The data set over stores: merged tables, labels, edge counts and their cache."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from megagnn.data import dataset as dataset_module
from megagnn.data import keys
from megagnn.data import store as store_module
from megagnn.data.batch import collate
from megagnn.data.dataset import StructureDataset
from megagnn.data.sampler import BudgetSampler
from megagnn.data.store import Store, cached_num_edges, write_store


@pytest.fixture
def paths(structures, make_store):
    others = [
        replace(s, source={"A": "C", "B": "A"}[s.source], energy=-1.0 * s.num_atoms) for s in structures
    ]
    return [make_store(structures, "one"), make_store(others[::-1], "two")]


def test_tables_are_merged_by_name(structures, paths):
    data = StructureDataset(paths, "all", 3.0)
    assert data.sources == ("A", "B", "C")
    assert data.levels == ("toy", "other")
    names = [s.source for s in structures] + [{"A": "C", "B": "A"}[s.source] for s in structures[::-1]]
    levels = [s.level for s in structures] + [s.level for s in structures[::-1]]
    for index in range(len(data)):
        graph = data[index]
        assert data.sources[graph[keys.SOURCE]] == names[index]
        assert data.levels[graph[keys.LEVEL]] == levels[index]
        assert graph[keys.STRUCTURE] == index


def test_splits_are_those_of_the_stores(paths):
    stores = [Store.open(path) for path in paths]
    for split in ("train", "valid", "test"):
        data = StructureDataset(paths, split, 3.0)
        assert len(data) == sum(len(store.indices(split)) for store in stores)
        own = [store.structure(int(i))[keys.POSITIONS] for store in stores for i in store.indices(split)]
        assert all(np.array_equal(data[k][keys.POSITIONS], own[k]) for k in range(len(data)))


@pytest.mark.parametrize("self_edges", [False, True])
def test_counts_are_those_of_the_graphs(paths, self_edges):
    data = StructureDataset(paths, "train", 3.0, self_edges)
    for index in range(len(data)):
        graph = data[index]
        assert data.num_atoms[index] == len(graph[keys.ATOMIC_NUMBERS])
        assert data.num_edges[index] == graph[keys.EDGE_INDEX].shape[1]
    assert data.num_edges.sum() > 0


def test_missing_labels_stay_missing_in_the_batch(structures, paths):
    data = StructureDataset(paths[:1], "all", 3.0)
    batch = data.batch(range(len(data)), torch.float64)
    assert batch[keys.HAS_ENERGY].tolist() == [s.energy is not None for s in structures]
    assert batch[keys.HAS_FORCES].tolist() == [s.forces is not None for s in structures]
    assert batch[keys.HAS_STRESS].tolist() == [s.stress is not None for s in structures]
    assert all(torch.isfinite(t).all() for t in batch.values())
    fixed = np.concatenate([np.zeros(s.num_atoms, bool) if s.fixed is None else s.fixed for s in structures])
    assert batch[keys.FIXED].tolist() == fixed.tolist()


def test_edge_counts_are_cached(structures, make_store):
    store = Store.open(make_store(structures))
    first = cached_num_edges(store, 3.0)
    cache = store.path / "num_edges-3.0.npy"
    assert np.array_equal(np.load(cache), first)
    np.save(cache, first + 1)
    assert np.array_equal(cached_num_edges(store, 3.0), first + 1)  # it is read
    assert not np.array_equal(cached_num_edges(store, 2.0), first)  # each cutoff has its own
    cache.write_bytes(cache.read_bytes()[:-5])
    assert np.array_equal(cached_num_edges(store, 3.0), first)  # a truncated one is made again
    np.save(cache, first[:-1])
    assert np.array_equal(cached_num_edges(store, 3.0), first)
    assert sorted(p.name for p in store.path.iterdir() if p.name.startswith(".")) == []


def test_many_readers_may_count_at_once(structures, make_store):
    path = make_store(structures)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: cached_num_edges(Store.open(path), 3.0), range(8)))
    assert all(np.array_equal(results[0], r) for r in results)
    assert [p.name for p in path.iterdir() if "num_edges" in p.name] == ["num_edges-3.0.npy"]


def test_a_store_that_cannot_be_written_is_counted_anyway(structures, make_store, monkeypatch):
    store = Store.open(make_store(structures))

    def refuse(*args, **kwargs):
        raise PermissionError("read-only file system")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert cached_num_edges(store, 3.0).sum() > 0
    assert not os.path.exists(store.path / "num_edges-3.0.npy")


def test_references_are_fitted_on_energies_of_the_split(structures, make_store):
    known = {1: -1.0, 6: -30.0, 8: -50.0}
    labelled = [
        replace(s, energy=None if s.energy is None else sum(known[int(z)] for z in s.atomic_numbers))
        for s in structures
    ]
    data = StructureDataset([make_store(labelled)], "train", 3.0)
    references = data.baseline().references
    assert references.shape == (2, 119)
    for source in (0, 1):
        assert references[source, [1, 6, 8]] == pytest.approx(list(known.values()), abs=1e-8)


def test_with_loader_workers_and_sampler(paths):
    data = StructureDataset(paths, "train", 3.0)
    sampler = BudgetSampler(data.num_atoms, data.num_edges, max_atoms=60, max_edges=2000)
    plan = sampler.batches(0)
    loader = DataLoader(data, batch_sampler=[b.tolist() for b in plan], collate_fn=collate, num_workers=1)
    batches = list(loader)
    assert len(batches) == len(plan)
    seen = torch.cat([batch[keys.STRUCTURE] for batch in batches])
    assert sorted(seen.tolist()) == list(range(len(data)))
    assert max(len(batch[keys.ATOMIC_NUMBERS]) for batch in batches) <= 60


def test_elements_and_squares_of_forces(structures, paths):
    for split in ("train", "all"):
        data = StructureDataset(paths, split, 3.0)
        records = [data.record(i) for i in range(len(data))]
        for source, found in enumerate(data.source_elements()):
            mine = [r[keys.ATOMIC_NUMBERS] for r in records if r[keys.SOURCE] == source]
            assert found.tolist() == np.unique(np.concatenate(mine)).tolist()
        forces = np.concatenate([r[keys.FORCES].ravel() for r in records if keys.FORCES in r]).astype(float)
        assert data.force_squares() == (forces.size, pytest.approx(np.square(forces).sum(), rel=1e-12))


@pytest.mark.parametrize("block", [2, 65536])
def test_forces_of_atoms_held_fixed_do_not_count(structures, tmp_path, monkeypatch, block):
    """One free atom with a force is enough, wherever it is; without forces it is none."""
    monkeypatch.setattr(dataset_module, "ROWS_AT_ONCE", block)
    held = [replace(s, fixed=np.ones(s.num_atoms, bool)) for s in structures if s.forces is not None][:5]
    last = replace(held[-1], fixed=np.arange(held[-1].num_atoms) > 0)
    without = replace(last, energy=1.0, forces=None)
    for number, (records, expected) in enumerate([(held, False), ([*held[:-1], last], True)]):
        store = tmp_path / str(number)
        write_store(store, [*records, without], splits=np.zeros(6, np.uint8))
        data = StructureDataset([store], "all", 3.0)
        assert data.num_labelled()["forces"] == 5
        assert data.has_free_forces() == expected
    write_store(tmp_path / "none", [without], splits=np.zeros(1, np.uint8))
    assert not StructureDataset([tmp_path / "none"], "all", 3.0).has_free_forces()


def test_statistics_do_not_depend_on_the_block(paths, monkeypatch):
    data = StructureDataset(paths, "train", 3.0)
    whole = [e.tolist() for e in data.source_elements()], data.force_squares()
    monkeypatch.setattr(dataset_module, "ROWS_AT_ONCE", 7)
    assert [e.tolist() for e in data.source_elements()] == whole[0]
    assert data.force_squares() == (whole[1][0], pytest.approx(whole[1][1], rel=1e-12))


def test_counting_many_edges_shows_its_progress(structures, make_store, monkeypatch, capfd):
    store = Store.open(make_store(structures))
    cached_num_edges(store, 2.0)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(store_module, "SILENT_STRUCTURES", 50)
    cached_num_edges(store, 3.0)
    assert "counting edges of store: 100%" in capfd.readouterr().err


def test_one_store_is_given_once(paths, tmp_path):
    with pytest.raises(ValueError, match="are the same store; give it once"):
        StructureDataset([paths[0], paths[0].parent / "." / "one"], "train", 3.0)
    shutil.copytree(paths[0], tmp_path / "copy")
    with pytest.raises(ValueError, match="are the same store; give it once"):
        StructureDataset([paths[0], tmp_path / "copy"], "train", 3.0)


def test_a_group_lies_on_one_side_in_all_stores(structures, paths, tmp_path):
    moved = [replace(s, energy=-1.0, forces=None) for s in structures if s.source == "A"]
    held = Store.open(paths[0]).split[:40]
    write_store(tmp_path / "same", moved, splits=held)  # other labels of the same molecules: welcome
    StructureDataset([paths[0], tmp_path / "same"], "train", 3.0)
    write_store(tmp_path / "leaky", moved, splits=np.where(held == 2, 0, 2))
    with pytest.raises(ValueError, match=r"group 'm\d+' is (train|test|valid) in .*Prepare them together"):
        StructureDataset([paths[0], tmp_path / "leaky"], "train", 3.0)


def test_a_published_test_set_may_be_kin_to_its_own_training_set_only(structures, tmp_path):
    train, test = structures[0], replace(structures[1], group="test file: m0")
    write_store(tmp_path / "published", [train, test], splits=np.array([0, 2]))
    other = replace(structures[0], energy=0.0)
    for name, group, split in (("a", "m0", 0), ("b", "m0", 2), ("c", "test file: m0", 2)):
        write_store(tmp_path / name, [replace(other, group=group)], splits=np.array([split]))
    StructureDataset([tmp_path / "published", tmp_path / "a"], "all", 3.0)
    for name in "bc":
        with pytest.raises(ValueError, match=r"group 'm0' is train in .*published and test in"):
            StructureDataset([tmp_path / "published", tmp_path / name], "all", 3.0)


def test_refuses(paths):
    with pytest.raises(ValueError, match="at least one store"):
        StructureDataset([], "train", 3.0)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        StructureDataset(paths, "dev", 3.0)
    with pytest.raises(IndexError):
        StructureDataset(paths, "train", 3.0)[10**6]


def test_entries_of_atoms_come_structure_by_structure(structures, make_store):
    store = Store.open(make_store(structures))
    rows = np.array([5, 0, 7])
    expected = np.concatenate([structures[k].atomic_numbers for k in rows])
    assert store.of_atoms("atomic_numbers", rows).tolist() == expected.tolist()
    assert store.of_atoms("forces", np.zeros(0, dtype=int)).shape == (0, 3)
