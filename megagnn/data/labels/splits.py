"""Splits by a hash of the group: the same molecule falls on the same side in every source, size and seed."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

FRACTIONS = (0.8, 0.1, 0.1)
RULE = "hash of group: blake2b(group, person=b'megagnn') / 2**64 against cumulated fractions"


def hash_splits(
    groups: Iterable[str], fractions: tuple[float, float, float] = FRACTIONS
) -> NDArray[np.uint8]:
    """Split code (0 train, 1 valid, 2 test) of each structure, from its group alone.

    A shuffled split depends on what else is in the data, so that a molecule held out of the GFN2 source could
    be trained on in the GFN1 source, or a larger set could train on the test molecules of a smaller one. A
    hash cannot. The price: fractions are met on average, to about sqrt(f (1 - f) / number of groups).

    Args:
        groups: split key of each structure.
        fractions: shares of train, valid and test; they sum to 1.

    Raises:
        ValueError: fractions that are negative or do not sum to 1.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1.0) > 1e-9:
        raise ValueError(f"split fractions must be non-negative and sum to 1, got {fractions}")
    edges = np.cumsum(fractions)[:2]
    codes: dict[str, int] = {}
    splits = []
    for group in groups:
        if group not in codes:
            digest = blake2b(group.encode(), digest_size=8, person=b"megagnn").digest()
            codes[group] = int(np.searchsorted(edges, int.from_bytes(digest, "big") / 2**64, side="right"))
        splits.append(codes[group])
    return np.array(splits, dtype=np.uint8)
