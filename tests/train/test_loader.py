"""Loading of batches: oversized structures, mixed sources, worker processes."""

from pathlib import Path

import numpy as np
import pytest

from megagnn.data import keys
from tests import runs


def test_oversized_structures_are_refused_left_out_or_alone(store: Path, tmp_path: Path) -> None:
    """The clusters' largest batch is a crystal of four atoms: six and more are too many."""
    small = ("--data.max_atoms", "5")
    with pytest.raises(ValueError, match=r'data\.oversized = "alone"'):
        runs.make_trainer(store, tmp_path / "run", *small)
    skipping = runs.make_trainer(store, tmp_path / "run", *small, "--data.oversized", "skip")
    assert skipping.train.dataset.num_atoms.max() <= 5
    assert skipping.train.dataset.num_oversized == 24
    told = [line for line in skipping.told if "left out" in line]
    assert [line.split(" structures")[0] for line in told] == ["24 of 48", "6 of 12"]
    alone = runs.make_trainer(store, tmp_path / "run", *small, "--data.oversized", "alone")
    assert len(alone.train.dataset) == 48
    sizes = [batch[keys.NUM_ATOMS].tolist() for batch in alone.train.batches()]
    assert sorted(n for batch in sizes for n in batch) == sorted(alone.train.dataset.num_atoms)
    assert all(sum(batch) <= 5 or len(batch) == 1 for batch in sizes)
    assert "24 of 48 structures of the train split are larger" in alone.told[0]
    with pytest.raises(ValueError, match="48 structures, all of them larger than the budget"):
        runs.make_trainer(store, tmp_path / "run", "--data.max_atoms", "3", "--data.oversized", "skip")


def test_sources_are_mixed_in_training_alone(store: Path, tmp_path: Path) -> None:
    """Of 24 clusters and 24 crystals 6 clusters are kept; at a high temperature they are half of an epoch."""

    def numbers(*options: str) -> tuple[list[int], int]:
        trainer = runs.make_trainer(store, tmp_path / "run", "--data.num_structures", "30", *options)
        names = trainer.train.dataset.source_names()
        drawn = np.concatenate([b[keys.STRUCTURE].numpy() for b in trainer.train.batches()])
        valid = sum(len(b[keys.STRUCTURE]) for b in trainer.valid.batches())
        assert valid == len(trainer.valid.dataset)
        assert len(drawn) == 30
        return [int((names == s).sum()) for s in ("clusters", "crystals")], int(
            (names[drawn] == "clusters").sum()
        )

    (clusters, crystals), drawn = numbers()
    assert drawn == clusters != crystals
    mixed = numbers("--data.mixing_temperature", "1e6")[1]
    assert mixed == 15
