"""Which side of the split each structure lies on that `prepare` reads: kept, fixed by its file, or drawn."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray

from megagnn.data.record import Structure
from megagnn.data.split import FIXED_PREFIXES, SPLITS, check_fractions, split_groups

TRAIN, VALID, TEST = range(3)

MISSED = 2.0
"""A split this many times larger or smaller than asked for is told."""


class Sides:
    """The sides of structures: `add` them in order, then `split` gives all of them (a `SplitRule`).

    What came with a side keeps it, files given for a side go there, isolated atoms go to train; the rest is
    drawn by groups. A source with a file of its own for a side gets no other part there. A group of such a
    file is held out of other sources, too, unless its own source trains on it: that was its publisher's
    choice. Where an element of a source would be drawn to valid and test alone, a group that has it goes to
    train instead.

    Attributes:
        warnings: what a user should know of the split, in words; filled by `split`.
    """

    def __init__(self, fractions: Sequence[float], seed: int) -> None:
        self.fractions, self.seed = check_fractions(fractions), seed
        self.warnings: list[str] = []
        self._kept: list[int | None] = []
        self._isolated: list[bool] = []
        self._elements: list[int] = []  # bit z: holds atomic number z

    def add(self, structure: Structure, kept: int | None, isolated: bool) -> None:
        """One structure, in the order of the store.

        Args:
            kept: side it had in the store it comes from, if it is to stay there.
            isolated: it is an isolated atom, and belongs to train whatever the fractions.
        """
        self._kept.append(kept)
        self._isolated.append(isolated and self.fractions[TRAIN] > 0)
        self._elements.append(sum(1 << z for z in np.unique(structure.atomic_numbers).tolist()))

    def split(self, groups: Sequence[str], sources: Sequence[str]) -> NDArray[np.uint8]:
        """(S,) uint8, index into SPLITS.

        Raises:
            ValueError: see `split_groups`.
        """
        result = np.full(len(groups), TRAIN, dtype=np.uint8)
        pinned: dict[str, int] = {}
        drawn: list[int] = []
        fixed: dict[int, int] = {}
        for index, (group, kept) in enumerate(zip(groups, self._kept, strict=True)):
            side = next((k for k, prefix in FIXED_PREFIXES.items() if group.startswith(prefix)), None)
            if kept is not None:
                result[index] = pinned[group] = kept
            elif side is not None:
                result[index] = fixed[index] = side
            elif not self._isolated[index]:
                drawn.append(index)
        trained_on = {(sources[index], groups[index]) for index in drawn}
        for side in (TEST, VALID):
            for index in (i for i, k in sorted(fixed.items()) if k == side):
                group = groups[index].removeprefix(FIXED_PREFIXES[side])
                if (sources[index], group) not in trained_on:
                    pinned.setdefault(group, side)
        fractions_of = self._fractions_of((sources[i], side) for i, side in fixed.items())
        result[drawn] = split_groups(
            [groups[i] for i in drawn],
            [sources[i] for i in drawn],
            self.fractions,
            self.seed,
            fractions_of=fractions_of,
            pinned=pinned,
        )
        if self.fractions[TRAIN] > 0:
            movable = {groups[i] for i in drawn} - set(pinned)
            self._keep_elements(result, groups, sources, movable)
            self._tell_unknown(result, sources)
        self._tell_missed(result, sources, drawn, fractions_of)
        return result

    def _fractions_of(self, fixed: Iterable[tuple[str, int]]) -> dict[str, tuple[float, ...]]:
        """Fractions of sources with files of their own for some side: the others share what is left."""
        found: dict[str, tuple[float, ...]] = {}
        sides = defaultdict(set)
        for source, side in fixed:
            sides[source].add(side)
        for source, taken in sides.items():
            left = [0.0 if k in taken else part for k, part in enumerate(self.fractions)]
            if sum(left) > 0:
                found[source] = tuple(part / sum(left) for part in left)
        return found

    def _missing(self, sides: NDArray[np.uint8], sources: Sequence[str]) -> dict[str, int]:
        """Elements of each source that no training structure has, but for isolated atoms, as bits."""
        have: dict[str, int] = defaultdict(int)
        train: dict[str, int] = defaultdict(int)
        for source, side, bits, isolated in zip(sources, sides, self._elements, self._isolated, strict=True):
            if side != TRAIN:
                have[source] |= bits
            elif not isolated:
                train[source] |= bits
        return {source: bits & ~train[source] for source, bits in have.items() if bits & ~train[source]}

    def _keep_elements(
        self, sides: NDArray[np.uint8], groups: Sequence[str], sources: Sequence[str], movable: set[str]
    ) -> None:
        """Moves the smallest drawn groups to train, one by one, whose elements it lacks; empties no side."""
        members: dict[str, list[int]] = defaultdict(list)
        if self._missing(sides, sources):
            for index, group in enumerate(groups):
                if group in movable:
                    members[group].append(index)
        while missing := self._missing(sides, sources):
            left = Counter(zip(sources, sides.tolist(), strict=True))
            candidates = []
            for group, rows in members.items():
                side = int(sides[rows[0]])
                gained = sum((self._elements[i] & missing.get(sources[i], 0)).bit_count() for i in rows)
                leaves = Counter(sources[i] for i in rows)
                if side != TRAIN and gained and all(left[s, side] > n for s, n in leaves.items()):
                    candidates.append((len(rows), group))
            if not candidates:
                return
            sides[members[min(candidates)[1]]] = TRAIN

    def _tell_unknown(self, sides: NDArray[np.uint8], sources: Sequence[str]) -> None:
        for source, bits in sorted(self._missing(sides, sources).items()):
            if not any(s == source and k == TRAIN for s, k in zip(sources, sides, strict=True)):
                continue  # a source without training structures is told, or meant
            symbols = [symbol for z, symbol in enumerate(chemical_symbols) if bits >> z & 1]
            counts = [
                sum(
                    s == source and side == k and bool(held & bits)
                    for s, side, held in zip(sources, sides, self._elements, strict=True)
                )
                for k in (VALID, TEST)
            ]
            self.warnings.append(
                f"{source}: {counts[0]:,} validation and {counts[1]:,} test structures hold "
                f"{', '.join(symbols)}, which no training structure of the source does, so no model of it "
                "can be evaluated on them, and training refuses them in validation; train on such "
                "structures, too (more data, --split, or --valid FILE with elements of training), or leave "
                "these out"
            )

    def _tell_missed(
        self,
        sides: NDArray[np.uint8],
        sources: Sequence[str],
        drawn: Sequence[int],
        fractions_of: dict[str, tuple[float, ...]],
    ) -> None:
        totals = Counter(sources[i] for i in drawn)
        counts = Counter((sources[i], int(sides[i])) for i in drawn)
        for source, total in sorted(totals.items()):
            asked = fractions_of.get(source, self.fractions)
            got = [counts[source, k] for k in range(3)]
            if not any(_is_missed(n, part * total) for n, part in zip(got, asked, strict=True)):
                continue
            wanted = " / ".join(f"{part:.3g}" for part in asked)
            self.warnings.append(
                f"{source}: the split has {' / '.join(f'{n:,}' for n in got)} structures in "
                f"{' / '.join(SPLITS)} where {wanted} of {total:,} was asked for, because whole groups are "
                "few or large; give files of their own (--test, --valid) or another grouping (--group-by)"
            )


def _is_missed(got: int, wanted: float) -> bool:
    """Whether a split is off by a factor of two and by over two structures, which small sets cannot help."""
    return wanted > 0 and abs(got - wanted) > 2 and not wanted / MISSED <= got <= wanted * MISSED
