"""Copies among structures: test structures that are training structures, and one structure with two energies.

Each structure is reduced to a few numbers that hardly change when positions are rounded, are the same for
whole translations and another choice of periodic images, and differ for any other structure. Copies are found
by sorting them, so that memory and time grow with the number of structures only.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np
from ase.geometry import complete_cell
from numpy.typing import NDArray

from megagnn.data.record import Structure
from megagnn.data.split import SPLITS

NUM_MARKS = 4
TOLERANCE = 1e-4
"""Å. Positions written with four decimals differ by half of it."""

COMPARED = 8
"""How many of the next structures in the order of the first mark one is compared with."""

SAME_ENERGY = 1.0
"""eV per atom. Copies with energies farther apart are not a matter of settings: one energy is wrong."""

SHOWN = 3


class Copies:
    """Structures by their marks; `add` them in order, then ask."""

    def __init__(self) -> None:
        self._marks: list[NDArray[np.float64]] = []
        self._species: list[int] = []
        self._sources: list[str] = []
        self._energies: list[float] = []
        self._where: list[str] = []

    def add(self, structure: Structure, where: str) -> None:
        """One structure, in the order of the store, and where it comes from."""
        s = structure
        species = zlib.crc32(np.asarray(s.atomic_numbers, dtype=np.uint8).tobytes() + bytes(map(int, s.pbc)))
        self._species.append(zlib.crc32(s.source.encode(), species))
        self._marks.append(marks(s))
        self._sources.append(s.source)
        self._energies.append(np.nan if s.energy is None else s.energy / s.num_atoms)
        self._where.append(where)

    def in_training(self, sides: NDArray[np.integer], isolated: NDArray[np.bool_]) -> list[str]:
        """Validation and test structures that are copies of training structures of their source, in words.

        Args:
            sides: (S,) index into SPLITS; isolated: (S,) isolated atoms, which are no test of anything.
        """
        told = []
        found = self._pairs()
        sources = np.array(self._sources)
        for side in (1, 2):
            copies: set[int] = set()
            for a, b in found:
                for one, other in ((a, b), (b, a)):
                    if sides[one] == side and sides[other] == 0 and not isolated[one]:
                        copies.add(one)
            for source in dict.fromkeys(self._sources[i] for i in sorted(copies)):
                total = int(((sources == source) & (sides == side) & ~isolated).sum())
                count = sum(self._sources[i] == source for i in copies)
                told.append(
                    f"{source}: {count:,} of {total:,} {SPLITS[side]} structures are copies of training "
                    "structures, so errors there are not those of new structures; leave them out, or group "
                    "copies together (--group-by)"
                )
        return told

    def with_two_energies(self) -> list[str]:
        """Copies whose energies differ by more than SAME_ENERGY per atom, in words."""
        told = []
        energies = np.array(self._energies)
        bad = [(a, b) for a, b in self._pairs() if abs(energies[a] - energies[b]) > SAME_ENERGY]
        for source in dict.fromkeys(self._sources[a] for a, _ in bad):
            mine = [(a, b) for a, b in bad if self._sources[a] == source]
            a, b = mine[0]
            told.append(
                f"{source}: {len(mine):,} pairs of copies of one structure have energies that differ by more "
                f"than {SAME_ENERGY:g} eV per atom, such as {self._where[a]} with {energies[a]:.6g} and "
                f"{self._where[b]} with {energies[b]:.6g} eV per atom"
            )
        return told

    def _pairs(self) -> list[tuple[int, int]]:
        """Pairs of copies; of many copies of one structure each with the next ones."""
        if len(self._marks) < 2:
            return []
        values, species = np.array(self._marks), np.array(self._species)
        order = np.lexsort((values[:, 0], species))
        pairs = []
        for step in range(1, min(COMPARED, len(order) - 1) + 1):
            a, b = order[:-step], order[step:]
            same = (species[a] == species[b]) & (np.abs(values[a] - values[b]).max(axis=1) < TOLERANCE)
            pairs += list(zip(a[same].tolist(), b[same].tolist(), strict=True))
        return pairs


def marks(structure: Structure) -> NDArray[np.float64]:
    """(NUM_MARKS,) sums of positions relative to the first atom and of the cell with fixed weights, Å."""
    s = structure
    relative = s.positions - s.positions[0]
    cell = np.zeros((3, 3))
    features = relative
    if np.any(s.pbc):
        cell = np.where(np.asarray(s.pbc)[:, None], s.cell, 0.0)
        whole = complete_cell(cell)
        lengths = np.linalg.norm(whole, axis=1)
        fractions = relative @ np.linalg.inv(whole)
        angles = 2 * np.pi * fractions
        # A fraction and the next whole number are one place; an angle's sine and cosine know that.
        waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1) * np.tile(lengths, 2) / (2 * np.pi)
        open_axes = np.where(s.pbc, 0.0, fractions * lengths)
        features = np.concatenate([waves * np.tile(s.pbc, 2), open_axes], axis=1)
    weights = _weights(len(features), features.shape[1])
    of_cell = _weights(3, 3)
    return np.einsum("ac,kac->k", features, weights) + np.einsum("ac,kac->k", cell, of_cell)


@lru_cache(maxsize=64)
def _weights(num_rows: int, num_columns: int) -> NDArray[np.float64]:
    """(NUM_MARKS, rows, columns), fixed, of unit length each, so that a sum is about one position's size."""
    drawn = np.random.default_rng(num_rows * 16 + num_columns).normal(size=(NUM_MARKS, num_rows, num_columns))
    return drawn / np.sqrt(num_rows * num_columns)
