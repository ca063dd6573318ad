"""Copies among structures: test structures that are training structures, and one structure with two energies.

Each structure is reduced to a few numbers that hardly change when positions are rounded, are the same for
whole translations and another choice of periodic images, and differ for any other structure. Copies are found
by sorting them, so that memory and time grow with the number of structures only. Copies have one charge and
one spin.
"""

import zlib
from array import array
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from ase.geometry import complete_cell
from numpy.typing import NDArray

from megagnn.data.arrays import Bools, Floats
from megagnn.data.record import Structure
from megagnn.data.split import SPLITS

NUM_MARKS = 12

ROUNDING, MAX_DISTANCE = 2e-4, 8e-3
"""Å. Marks of copies differ by less than ROUNDING times the square root of the number of coordinates (root of
the sum of squares over all marks), as those of positions that are written with four decimals do: by 3e-5 for
each coordinate and for the first atom, times the root of NUM_MARKS and some room. They never differ by
MAX_DISTANCE: one atom that is moved by 0.01 changes them by 0.035 or so, however many atoms there are."""

COMPARED = 8
"""How many of the next structures in the order of the first mark one is compared with."""

WRONG_ENERGY = 1.0
"""eV per atom. Copies with energies farther apart are not a matter of settings: one energy is wrong."""


class Places:
    """File and frame of structures; `add` them in order, then ask for the name of one.

    Each takes two numbers, for a store may be of millions of them.
    """

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._of_file, self._frames = array("i"), array("q")

    def add(self, file: str, frame: int) -> None:
        """The next structure: its file, and its number there."""
        self._of_file.append(self._files.setdefault(file, len(self._files)))
        self._frames.append(frame)

    def name(self, index: int) -> str:
        return f"{list(self._files)[self._of_file[index]]}, frame {self._frames[index]}"


class Copies:
    """Structures by their marks; `add` them in order, then ask."""

    def __init__(self) -> None:
        self._marks, self._energies = array("f"), array("d")
        self._species, self._num_atoms = array("q"), array("q")
        self._names: dict[str, int] = {}
        self._sources = array("i")
        self._places = Places()

    def add(self, structure: Structure, file: str, frame: int) -> None:
        """One structure, in the order of the store, and where it comes from."""
        s = structure
        species = zlib.crc32(np.asarray(s.atomic_numbers, dtype=np.uint8).tobytes() + bytes(map(int, s.pbc)))
        self._species.append(zlib.crc32(f"{s.source} {s.electronic_state}".encode(), species))
        self._num_atoms.append(s.num_atoms)
        self._marks.extend(marks(s).tolist())
        self._sources.append(self._names.setdefault(s.source, len(self._names)))
        self._energies.append(np.nan if s.energy is None else s.energy / s.num_atoms)
        self._places.add(file, frame)

    def in_training(self, sides: NDArray[np.integer], isolated: Bools) -> Iterator[str]:
        """Validation and test structures that are copies of training structures of their source, in words.

        Args:
            sides: (S,) index into SPLITS; isolated: (S,) isolated atoms, which are no test of anything.
        """
        found = self._pairs()
        sources, names = np.array(self._sources), list(self._names)
        for side in (1, 2):
            copies: set[int] = set()
            for a, b in found:
                for one, other in ((a, b), (b, a)):
                    if sides[one] == side and sides[other] == 0 and not isolated[one]:
                        copies.add(one)
            of_copies = sources[sorted(copies)]
            for index in dict.fromkeys(of_copies.tolist()):
                total = int(((sources == index) & (sides == side) & ~isolated).sum())
                count, source = int((of_copies == index).sum()), names[index]
                yield (
                    f"{source}: {count:,} of {total:,} {SPLITS[side]} structures are copies of training "
                    "structures, so errors there are not those of new structures; leave them out, or group "
                    "copies together (--group-by)"
                )

    def with_two_energies(self) -> Iterator[str]:
        """Copies whose energies differ by more than WRONG_ENERGY per atom, in words."""
        energies = np.array(self._energies)
        bad = [(a, b) for a, b in self._pairs() if abs(energies[a] - energies[b]) > WRONG_ENERGY]
        names = list(self._names)
        for index in dict.fromkeys(self._sources[a] for a, _ in bad):
            mine, source = [(a, b) for a, b in bad if self._sources[a] == index], names[index]
            a, b = mine[0]
            yield (
                f"{source}: {len(mine):,} pairs of copies of one structure have energies that differ by "
                f"more than {WRONG_ENERGY:g} eV per atom, such as "
                f"{self._places.name(a)} with {energies[a]:.6g} and "
                f"{self._places.name(b)} with {energies[b]:.6g} eV per atom"
            )

    def _pairs(self) -> list[tuple[int, int]]:
        """Pairs of copies; of many copies of one structure each with the next ones."""
        if len(self._species) < 2:
            return []
        values, species = np.array(self._marks).reshape(-1, NUM_MARKS), np.array(self._species)
        limits = np.minimum(ROUNDING * np.sqrt(3 * np.array(self._num_atoms)), MAX_DISTANCE)
        order = np.lexsort((values[:, 0], species))
        pairs = []
        for step in range(1, min(COMPARED, len(order) - 1) + 1):
            a, b = order[:-step], order[step:]
            near = np.linalg.norm(values[a] - values[b], axis=1) < limits[a]
            same = near & (species[a] == species[b])
            pairs += list(zip(a[same].tolist(), b[same].tolist(), strict=True))
        return pairs


def marks(structure: Structure) -> Floats:
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
    found = features.ravel() @ _weights(len(features), features.shape[1]) + cell.ravel() @ _weights(3, 3)
    return np.asarray(found)


def _weights(num_rows: int, num_columns: int) -> Floats:
    """(rows * columns, NUM_MARKS), fixed, of unit variance, so that a moved atom counts in any cell alike."""
    return _table(1 << (num_rows - 1).bit_length(), num_columns)[: num_rows * num_columns]


@lru_cache(maxsize=64)
def _table(num_rows: int, num_columns: int) -> Floats:
    rng = np.random.default_rng(num_rows * 16 + num_columns)
    return rng.normal(size=(num_rows * num_columns, NUM_MARKS))
