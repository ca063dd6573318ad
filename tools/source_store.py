"""Write one source of a store into a store of its own: source_store.py STORE SOURCE OUT [--train N]

STORE may be an archive. The structures keep their split and their groups. --train N keeps N of the training
structures, drawn at random, always the same.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from megagnn.data.formats.options import ReadOptions
from megagnn.data.formats.packed import read_store, store_header
from megagnn.data.record import Structure
from megagnn.data.split import SPLITS
from megagnn.data.store import write_store

Row = TypeVar("Row")


def _only(source: str, rows: Mapping[str, Row]) -> dict[str, Row]:
    return {name: row for name, row in rows.items() if name == source}


def _fewer(structures: list[Structure], num_train: int) -> list[Structure]:
    """All structures in their order, but of the training split only so many."""
    train = np.flatnonzero([s.split == SPLITS.index("train") for s in structures])
    if not 0 < num_train <= len(train):
        raise ValueError(f"--train is {num_train}, and the source has {len(train)} training structures")
    left_out = {*np.random.default_rng(0).permutation(train)[num_train:].tolist()}
    return [s for index, s in enumerate(structures) if index not in left_out]


def main() -> int:
    """Write the store; return the exit code."""
    parser = argparse.ArgumentParser(description="Write one source of a store into a store of its own.")
    parser.add_argument("store", type=Path, help="directory of the store, or its archive")
    parser.add_argument("source", help="name of the source")
    parser.add_argument("out", type=Path, help="directory to be made")
    parser.add_argument("--train", type=int, metavar="N", help="so many training structures")
    args = parser.parse_args()
    try:
        header = store_header(args.store)
        if args.source not in header.sources:
            raise ValueError(
                f"{args.store} has no source '{args.source}'; it has {', '.join(header.sources)}"
            )
        found = [s for s in read_store(args.store, ReadOptions()) if s.source == args.source]
        if args.train is not None:
            found = _fewer(found, args.train)
        splits = np.array([s.split for s in found], dtype=np.uint8)
        others = tuple(f"{name}: " for name in header.sources if name != args.source)
        write_store(
            args.out,
            found,
            splits=splits,
            provenance=_only(args.source, header.provenance),
            references=_only(args.source, header.references),
            warnings=[line for line in header.warnings if not line.startswith(others)],
            isolated_distance=header.isolated_distance,
        )
    except ValueError as error:
        print(f"source_store: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(found):,} structures of {args.source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
