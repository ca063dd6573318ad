"""A store's training, validation and test frames as extended XYZ, which other programs read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ase

from megagnn.data import keys
from megagnn.data.split import SPLITS
from megagnn.data.store import Store
from megagnn.train.predicted_frames import write_frames
from tools.peers.contract import ENERGY, FORCES


def frames_of(store: Store, split: str) -> Iterator[ase.Atoms]:
    """Frames of a split in the store's order, with energy and forces; stress is left out.

    Raises:
        ValueError: a frame lacks energy or forces, or has atoms held fixed.
    """
    config_types = store.config_types()
    for index in store.indices(split):
        record = store.structure(int(index))
        if not {keys.ENERGY, keys.FORCES} <= record.keys() or record[keys.FIXED].any():
            raise ValueError(
                f"structure {index} of {store.path} lacks energy or forces, or has atoms held fixed; "
                "programs are compared on frames with both and of free atoms only"
            )
        geometry = {"positions": record[keys.POSITIONS], "cell": record[keys.CELL], "pbc": record[keys.PBC]}
        frame = ase.Atoms(record[keys.ATOMIC_NUMBERS], **geometry)
        frame.info[ENERGY] = record[keys.ENERGY]
        frame.new_array(FORCES, record[keys.FORCES].astype("f8"))
        if config_types[index]:
            frame.info["config_type"] = str(config_types[index])
        yield frame


def write_splits(store: Store, folder: Path) -> None:
    """FOLDER/train.xyz, valid.xyz and test.xyz.

    Raises:
        ValueError: a split is empty, there are several sources or levels, or see `frames_of`.
    """
    tables = {"sources": store.header.sources, "levels of theory": store.header.levels}
    for what, names in tables.items():
        if len(names) > 1:
            raise ValueError(
                f"{store.path} has the {what} {', '.join(names)}; programs are compared "
                "on one, prepare it alone"
            )
    for split in SPLITS:
        if not len(store.indices(split)):
            raise ValueError(f"{store.path} has no {split} frames; prepare it with all three splits")
        write_frames(folder / f"{split}.xyz", frames_of(store, split), "extxyz")
