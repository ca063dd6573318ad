"""Nested subsets of a training split, for scaling studies: more data is the same data and more of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megagnn.data import keys
from megagnn.data.dataset import StructureDataset


def nested_subset(dataset: StructureDataset, num_structures: int, seed: int) -> NDArray[np.int64]:
    """Indices of `num_structures` structures: the head of one random order, which the seed gives.

    At its very head the order has isolated atoms, which fix references, and of each source the first labelled
    structures that show each element and each level of theory, with an energy where the source has any:
    without them a small subset would make a model that cannot be evaluated, for lack of an element or of a
    reference energy. They are a bias of the smallest subsets towards rare elements.

    Raises:
        ValueError: more structures than there are, or fewer than show every source and element.
    """
    if num_structures > len(dataset):
        raise ValueError(
            f"data.num_structures is {num_structures}, but the training split has {len(dataset)} structures; "
            "lower it, or leave it out to take them all"
        )
    order = np.random.default_rng((seed, 0x5CA1E)).permutation(len(dataset))
    first = _showing_all(dataset, order)
    if num_structures < len(first):
        raise ValueError(
            f"data.num_structures is {num_structures}, but it takes {len(first)} structures to show every "
            f"source, element and level of theory; use at least {len(first)}"
        )
    head = order[first]
    return np.concatenate([head, np.delete(order, first)])[:num_structures]


def _showing_all(dataset: StructureDataset, order: NDArray[np.int64]) -> list[int]:
    """Positions in the order of the structures that show something new."""
    seen: set[tuple[int, str, int]] = set()
    first = []
    labelled, isolated = dataset.sources_with_energy(), dataset.isolated_atoms()
    for position, index in enumerate(order):
        record = dataset.record(int(index))
        source = record[keys.SOURCE]
        shown = {(source, "element", int(z)) for z in np.unique(record[keys.ATOMIC_NUMBERS])}
        shown.add((source, "level", record[keys.LEVEL]))
        if isolated[index]:
            first.append(position)
        elif (keys.ENERGY in record or source not in labelled) and not shown <= seen:
            first.append(position)
            seen |= shown
    return first
