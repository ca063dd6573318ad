"""What a sample of the structures of a source tells: lengths that are none in Å, and labels of two methods.

Nearest neighbours of usual matter are near the sum of their covalent radii. Of two methods the energies of
equal compositions, charges and spins and like structures lie in two heaps.
"""

from typing import Any

import numpy as np
from ase.data import covalent_radii

from megagnn.data.arrays import Floats
from megagnn.data.near_frames import pair_of
from megagnn.data.record import Structure, edge_lengths

LONG, SHORT = 1.6, 0.6
"""Shortest distance over the sum of covalent radii, median of structures. Molecules and crystals have 0.75 to
1.2, and numbers in bohr are 1.89 times larger."""

NOBLE_GASES = (2, 10, 18, 36, 54, 86)

MAX_RATIOS, MIN_RATIOS = 100, 3

MAX_SAMPLE, MAX_ATOMS = 1000, 512
MIN_GAP = 0.3
"""eV per atom between the heaps, where some frames of one are near some of the other."""

FAR_GAP = 1.0
"""The same without near frames: a melt lies half an eV per atom above its crystal."""

GAP_SPREADS = 3.0
"""The gap over the width of the wider heap."""

MIN_SHARE, MIN_STRUCTURES, MIN_HEAP = 0.1, 10, 2
"""Fewest structures: of a composition in the smaller heap; in all that show the gap; in a heap."""

ALIKE = 0.15
"""By how much shortest distances and volumes of the two heaps may differ: crystals and dimers are no heaps of
two methods."""


class Lengths:
    """The shortest distances of the first structures of a source."""

    def __init__(self) -> None:
        self._ratios: list[float] = []

    def add(self, structure: Structure) -> None:
        """One structure; noble gases alone and single atoms tell nothing."""
        s = structure
        if len(self._ratios) >= MAX_RATIOS or not 2 <= s.num_atoms <= MAX_ATOMS:
            return
        if not np.all(np.isin(s.atomic_numbers, NOBLE_GASES)):
            self._ratios.append(shortest(s))

    @property
    def ratio(self) -> float:
        """Median over structures of the shortest distance over the sum of radii; 1 where they are few."""
        return float(np.median(self._ratios)) if len(self._ratios) >= MIN_RATIOS else 1.0

    def told(self) -> list[str]:
        ratio = self.ratio
        if SHORT <= ratio <= LONG:
            return []
        size = f"over {LONG:g}" if np.isinf(ratio) else f"{ratio:.3g}"
        unit = ", perhaps --units length=bohr" if ratio > LONG else " (lengths may be in Å or nm already)"
        return [
            f"atoms next to each other are {size} times the sum of their covalent radii apart, as in no "
            f"molecule or crystal; check the unit of positions and cell{unit}"
        ]


class TwoMethods:
    """A thinned sample of the structures of a source, evenly over all of them."""

    def __init__(self) -> None:
        self._kept: list[tuple[Structure, str]] = []
        self._count, self._stride = 0, 1

    def add(self, structure: Structure, file: str, frame: int) -> None:
        """One structure, and where it comes from."""
        s = structure
        if s.energy is None or not 2 <= s.num_atoms <= MAX_ATOMS:
            return
        if self._count % self._stride == 0:
            self._kept.append((s, f"{file}, frame {frame}"))
            if len(self._kept) > MAX_SAMPLE:
                self._kept, self._stride = self._kept[::2], 2 * self._stride
        self._count += 1

    def told(self) -> list[str]:
        of: dict[Any, list[tuple[Structure, str]]] = {}
        for entry in self._kept:
            s = entry[0]
            of.setdefault((np.sort(s.atomic_numbers).tobytes(), s.electronic_state), []).append(entry)
        heaps = [found for rows in of.values() if len(rows) >= 2 * MIN_HEAP and (found := _heaps(rows))]
        if sum(len(low) + len(high) for low, high in heaps) < MIN_STRUCTURES:
            return []
        if len(heaps) < sum(len(rows) >= 2 * MIN_HEAP for rows in of.values()) / 2:
            return []
        gap = np.median([_energies(high).min() - _energies(low).max() for low, high in heaps])
        (a, where), (_, other) = heaps[0][0][0], heaps[0][1][0]
        files = [{s.file for heap in heaps for s, _ in heap[k]} for k in (0, 1)]
        if a.file and not files[0] & files[1]:
            text = f"files {', '.join(sorted(files[0]))} and {', '.join(sorted(files[1]))} have energies"
            way = "keep them apart as sources (NAME=FILE)"
        else:
            text = f"like structures of equal composition, such as {where} and {other}, have energies"
            way = "put each into a file and a source of its own (NAME=FILE)"
        return [
            f"{text} {gap:.3g} eV per atom and more apart, with none between, as of two methods; if so, {way}"
        ]


def _energies(rows: list[tuple[Structure, str]]) -> Floats:
    return np.array([(s.energy or 0.0) / s.num_atoms for s, _ in rows])


def _heaps(
    rows: list[tuple[Structure, str]],
) -> tuple[list[tuple[Structure, str]], list[tuple[Structure, str]]] | None:
    """The structures of one composition below and above a gap between like structures; None without one."""
    rows = sorted(rows, key=lambda row: row[0].energy or 0.0)
    energies = _energies(rows)
    cut = int(np.argmax(np.diff(energies))) + 1
    low, high = rows[:cut], rows[cut:]
    width = max(np.ptp(energies[:cut]), np.ptp(energies[cut:]))
    gap = energies[cut] - energies[cut - 1]
    if gap < max(MIN_GAP, GAP_SPREADS * width):
        return None
    if min(len(low), len(high)) < max(MIN_HEAP, MIN_SHARE * len(rows)):
        return None
    for measure in (shortest, _volume):
        one, other = (float(np.median([measure(s) for s, _ in heap[:20]])) for heap in (low, high))
        if one != other and not abs(one - other) <= ALIKE * min(one, other):
            return None
    if gap < FAR_GAP and not any(pair_of(a, b) for a, _ in low[:20] for b, _ in high[:20]):
        return None
    return low, high


def _volume(structure: Structure) -> float:
    """Å^3 per atom of a crystal; 0 of others."""
    s = structure
    return float(abs(np.linalg.det(s.cell))) / s.num_atoms if np.all(s.pbc) else 0.0


def shortest(structure: Structure) -> float:
    """The shortest distance over the sum of covalent radii of its two atoms; infinite beyond twice `LONG`."""
    s = structure
    radii = covalent_radii[np.asarray(s.atomic_numbers, dtype=np.int64)]
    (i, j), distances = edge_lengths(s, 2 * LONG * 2 * float(radii.max()))
    return float((distances / (radii[i] + radii[j])).min(initial=np.inf))
