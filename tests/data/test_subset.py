import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megagnn.data.config import DataConfig
from megagnn.data.dataset import StructureDataset, nested_subset
from megagnn.data.store import write_store
from megagnn.models.egnn.config import EGNNConfig
from megagnn.models.statistics import compute_statistics
from megagnn.parallel.context import ParallelContext
from megagnn.train.loader import open_split
from tests import runs


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_data(tmp_path_factory.mktemp("data") / "store")


def test_smaller_subsets_are_part_of_larger_ones(store: Path) -> None:
    dataset = StructureDataset([store], "train", 4.0)
    chosen = [set(nested_subset(dataset, n, 0).tolist()) for n in (8, 12, 30, len(dataset))]
    assert [len(c) for c in chosen] == [8, 12, 30, len(dataset)]
    assert all(small < large for small, large in itertools.pairwise(chosen))
    assert chosen[1] != set(nested_subset(dataset, 12, 1).tolist())
    assert chosen[1] == set(nested_subset(dataset, 12, 0).tolist())


def test_small_subsets_show_every_source_and_element(store: Path) -> None:
    """Copper and silver in clusters and crystals: four structures show them; a random four would not."""
    whole = StructureDataset([store], "train", 4.0)
    expected = [found.tolist() for found in whole.source_elements()]
    plain = 0
    for seed in range(10):
        dataset = StructureDataset([store], "train", 4.0)
        dataset.keep(nested_subset(dataset, 4, seed))
        assert [found.tolist() for found in dataset.source_elements()] == expected
        random = StructureDataset([store], "train", 4.0)
        random.keep(np.random.default_rng(seed).permutation(len(random))[:4])
        plain += [found.tolist() for found in random.source_elements()] == expected
    assert plain < 10


def test_the_training_split_alone_is_cut(store: Path) -> None:
    data = DataConfig(paths=(str(store),), num_structures=12)
    model, context = EGNNConfig(cutoff=4.0), ParallelContext()
    train = open_split(data, model, "train", context)
    assert (len(train), len(train.num_atoms), len(train.num_edges)) == (12, 12, 12)
    assert train.num_labelled()["energy"] == 12
    assert [len(train[k]["atomic_numbers"]) for k in range(12)] == train.num_atoms.tolist()
    statistics = compute_statistics(train)
    for split in ("valid", "test"):
        whole = StructureDataset([store], split, 4.0)
        assert len(open_split(data, model, split, context, statistics)) == len(whole)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (1000, r"data.num_structures is 1000, but the training split has 48 structures; lower it"),
        (3, r"data.num_structures is 3, but it takes 4 structures to show every source.*use at least 4"),
    ],
)
def test_what_cannot_be_chosen(store: Path, number: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nested_subset(StructureDataset([store], "train", 4.0), number, 0)


def test_isolated_atoms_are_at_the_head(tmp_path: Path) -> None:
    """Without them a subset would have other references than the whole."""
    atom = runs.structures()[0]
    atoms = [
        replace(
            atom,
            atomic_numbers=np.array([z], dtype=np.uint8),
            positions=np.zeros((1, 3)),
            energy=-1.0 * z,
            forces=None,
            stress=None,
            cell=np.zeros((3, 3)),
            pbc=np.zeros(3, dtype=bool),
            group=str(100 + z),
        )
        for z in (29, 47)
    ]
    records = runs.structures() + atoms
    write_store(tmp_path / "store", records, splits=np.zeros(len(records), dtype=np.uint8))
    dataset = StructureDataset([tmp_path / "store"], "train", 4.0)
    for seed in range(3):
        assert {len(records) - 2, len(records) - 1} <= set(nested_subset(dataset, 8, seed).tolist())
