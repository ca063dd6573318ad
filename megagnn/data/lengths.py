"""Lengths that are none in Å: nearest neighbours of usual matter are near the sum of their covalent radii."""

from __future__ import annotations

import numpy as np
from ase.data import covalent_radii

from megagnn.data.neighbours import neighbour_list
from megagnn.data.record import Structure

LONG, SHORT = 1.6, 0.6
"""Shortest distance over the sum of covalent radii, median of structures. Molecules and crystals have 0.75 to
1.2, and numbers in bohr are 1.89 times larger."""

NOBLE_GASES = (2, 10, 18, 36, 54, 86)

MAX_SAMPLE, MAX_ATOMS, MIN_SAMPLE = 100, 512, 3


class Lengths:
    """The shortest distances of the first structures of a source."""

    def __init__(self) -> None:
        self._ratios: list[float] = []

    def add(self, structure: Structure) -> None:
        """One structure; noble gases alone and single atoms tell nothing."""
        s = structure
        if len(self._ratios) >= MAX_SAMPLE or not 2 <= s.num_atoms <= MAX_ATOMS:
            return
        if not np.all(np.isin(s.atomic_numbers, NOBLE_GASES)):
            self._ratios.append(shortest(s))

    @property
    def ratio(self) -> float:
        """Median over structures of the shortest distance over the sum of radii; 1 where they are few."""
        return float(np.median(self._ratios)) if len(self._ratios) >= MIN_SAMPLE else 1.0

    def told(self) -> list[str]:
        """What is odd, in words."""
        ratio = self.ratio
        if SHORT <= ratio <= LONG:
            return []
        size = f"over {LONG:g}" if np.isinf(ratio) else f"{ratio:.3g}"
        unit = ", perhaps --units length=bohr" if ratio > LONG else " (lengths may be in Å or nm already)"
        return [
            f"atoms next to each other are {size} times the sum of their covalent radii apart, as in no "
            f"molecule or crystal; check the unit of positions and cell{unit}"
        ]


def shortest(structure: Structure) -> float:
    """The shortest distance over the sum of covalent radii of its two atoms; infinite beyond twice `LONG`."""
    s = structure
    radii = covalent_radii[np.asarray(s.atomic_numbers, dtype=np.int64)]
    edge_index, shifts = neighbour_list(s.positions, s.cell, s.pbc, 2 * LONG * 2 * float(radii.max()))[:2]
    if edge_index.shape[1] == 0:
        return float("inf")
    a, b = edge_index
    vectors = s.positions[b] - s.positions[a] + shifts @ np.where(np.any(s.pbc), s.cell, 0.0)
    return float((np.linalg.norm(vectors, axis=1) / (radii[a] + radii[b])).min())
