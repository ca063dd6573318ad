"""Index arithmetic for rows of uneven length stored one after the other (CSR)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def ragged_indices(offsets: NDArray[np.integer], rows: NDArray[np.integer]) -> NDArray[np.int64]:
    """Flat indices of all elements of some rows: offsets[r]:offsets[r + 1] of each row r in turn.

    Args:
        offsets: (R + 1,) first element of each row; rows: (K,) rows wanted, in any order.
    """
    lengths = np.diff(offsets)[rows]
    skipped = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(offsets[rows] - skipped, lengths)
