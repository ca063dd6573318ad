"""Positions far from the origin, brought near before they are stored with 24 bits: float32 at 30,000 Å knows
steps of 2e-3 Å, which is more than what a distance may be off.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LARGEST_LOSS = 1e-5
"""Å; molecules and slabs are moved to the origin where their coordinates would lose more."""


def storable_positions(
    positions: NDArray[np.float64], cell: NDArray[np.float64], pbc: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Positions (N, 3) in Å that are as good in float32, and the same where they were so already.

    Along periodic lattice vectors, atoms further than one cell outside the cell are wrapped into it. If
    coordinates are still large and not everything is periodic, all atoms are moved so that their centre is
    the origin. Neither changes a distance between atoms or images.
    """
    positions = np.asarray(positions, dtype=np.float64)
    periodic = np.asarray(pbc, dtype=bool)
    if periodic.any():
        positions = _wrapped(positions, np.asarray(cell, dtype=np.float64), periodic)
    loss = np.abs(positions).max(initial=0.0) * 2.0**-24
    if loss > LARGEST_LOSS and not periodic.all():
        positions = positions - positions.mean(axis=0)
    return positions


def _wrapped(
    positions: NDArray[np.float64], cell: NDArray[np.float64], periodic: NDArray[np.bool_]
) -> NDArray[np.float64]:
    # Least squares: of a slab or a chain the other lattice vectors may be zero.
    fractions = positions @ np.linalg.pinv(np.where(periodic[:, None], cell, 0.0))
    far = ((fractions < -1) | (fractions >= 2)) & periodic
    if not far.any():
        return positions
    return positions - np.where(far, np.floor(fractions), 0.0) @ cell
