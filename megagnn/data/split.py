"""Splits into train, valid and test that keep every group whole.

Frames of one trajectory or conformations of one molecule are near copies of each other. With some of them in
training and others in the test set, the test measures memory. So the unit of a split is the group, and one
name means one group over all sources: a molecule labelled by two methods lies on the same side in both.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "valid", "test")
"""Names of the splits; a split is stored as its index here."""

DEFAULT_FRACTIONS = (0.8, 0.1, 0.1)

FRAME_PREFIX = "frame "
"""Name of groups of one frame and its copies (--group-by frame)."""

TEST_PREFIX, VALID_PREFIX = "test file: ", "validation file: "
FIXED_PREFIXES = {SPLITS.index("valid"): VALID_PREFIX, SPLITS.index("test"): TEST_PREFIX}
"""Groups of fixed test and validation files are named apart: whether they are kin to their own training data
is their publisher's choice."""

# Random assignments tried, until every split of every source is within GOOD_MISFIT of its target.
MAX_ATTEMPTS = 64
GOOD_MISFIT = 0.02

Sizes = dict[str, dict[str, int]]
"""Group -> source -> number of structures."""


def split_groups(
    groups: Sequence[str],
    sources: Sequence[str],
    fractions: Sequence[float] = DEFAULT_FRACTIONS,
    seed: int = 0,
    *,
    fractions_of: Mapping[str, Sequence[float]] | None = None,
    pinned: Mapping[str, int] | None = None,
) -> NDArray[np.uint8]:
    """Assign whole groups to splits, aiming at the fractions within every source.

    The result depends on the names of groups, their sizes in each source and the seed, not on the order of
    the structures. A source that shares no group with another misses the target of a split by at most 4/3 of
    its largest group, except where a split would have stayed empty and takes the smallest group of another.
    Shared groups bind sources together, and the fractions are then met as well as a few random attempts can.

    Args:
        groups: (S,) group of each structure.
        sources: (S,) source of each structure.
        fractions: of train, valid, test; must sum to 1. A fraction of 0 leaves that split empty.
        seed: any integer.
        fractions_of: other fractions for some sources. A split of fraction 0 gets only groups shared with a
            source that wants it.
        pinned: groups whose side is decided already.

    Returns:
        (S,) uint8, index into SPLITS.

    Raises:
        ValueError: bad fractions, or a source whose groups cannot fill its splits.
    """
    if len(groups) != len(sources):
        raise ValueError(f"groups and sources must be equally long, got {len(groups)} and {len(sources)}")
    parts = dict.fromkeys(sources, check_fractions(fractions))
    parts |= {source: check_fractions(own) for source, own in (fractions_of or {}).items()}
    sizes: Sizes = defaultdict(lambda: defaultdict(int))
    for group, source in zip(groups, sources, strict=True):
        sizes[group][source] += 1
    sides: dict[str, int] = {}
    for bound in _bound_together(sizes):
        sides |= _Draw({group: sizes[group] for group in bound}, parts, dict(pinned or {})).best(seed)
    return np.array([sides[group] for group in groups], dtype=np.uint8)


def check_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    """Fractions of train, valid and test as floats.

    Raises:
        ValueError: not three numbers, one negative, or a sum other than 1.
    """
    parts = tuple(float(f) for f in fractions)
    if len(parts) != 3 or min(parts, default=-1) < 0 or abs(sum(parts) - 1) > 1e-6:
        raise ValueError(
            "split fractions are three numbers, train, valid and test, none negative, summing to 1; "
            f"got {fractions}, for example 0.8,0.1,0.1 would do"
        )
    return parts[0], parts[1], parts[2]


def without_prefix(group: str) -> str:
    """The name of a group of a fixed test or validation file as its source has it."""
    for prefix in FIXED_PREFIXES.values():
        group = group.removeprefix(prefix)
    return group


def _bound_together(sizes: Sizes) -> list[list[str]]:
    """Groups by sets of sources that share groups: sources that share none do not disturb each other."""
    parent = {source: source for of in sizes.values() for source in of}

    def root(source: str) -> str:
        while parent[source] != source:
            source = parent[source]
        return source

    for of in sizes.values():
        first, *others = map(root, of)
        for other in others:
            parent[other] = first
    bound: dict[str, list[str]] = defaultdict(list)
    for group, of in sizes.items():
        bound[root(next(iter(of)))].append(group)
    return list(bound.values())


class _Draw:
    """The best of a few random assignments: one alone may miss the fractions by far if groups are large."""

    def __init__(self, sizes: Sizes, parts: Mapping[str, Sequence[float]], pinned: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.pinned = {group: pinned[group] for group in sizes if group in pinned}
        self.totals: dict[str, int] = defaultdict(int)
        for of in sizes.values():
            for source, count in of.items():
                self.totals[source] += count
        self.wanted = {source: [k for k in range(3) if parts[source][k] > 0] for source in self.totals}
        self.targets = {
            (source, k): parts[source][k] * total
            for source, total in self.totals.items()
            for k in self.wanted[source]
        }
        # A source of which everything is decided has nothing left to fill a split with.
        free = {source for group, of in sizes.items() if group not in self.pinned for source in of}
        self.to_fill = [place for place in self.targets if place[0] in free]
        self._check_counts(free)

    def _check_counts(self, free: set[str]) -> None:
        for source in sorted(free):
            count = sum(source in of for of in self.sizes.values())
            if count < len(self.wanted[source]):
                names = ", ".join(SPLITS[k] for k in self.wanted[source])
                raise ValueError(
                    f"source {source!r} has {count} group(s), too few to fill {names} without leaking; "
                    f"{self._way_out(source)}"
                )

    def _way_out(self, source: str) -> str:
        mine = [group for group, of in self.sizes.items() if source in of]
        no_test = "with a validation file of its own (--valid FILE --split 0.9,0.1,0) training needs no more"
        if all(group.startswith(FRAME_PREFIX) for group in mine):
            return (
                "each frame is a group already, and frames within about 1e-4 Å of each other are one: give "
                f"more structures, or files of its own (--test, --valid); {no_test}"
            )
        num_structures = sum(self.sizes[group][source] for group in mine)
        frames = ""
        if num_structures >= len(self.wanted[source]):
            frames = (
                "another grouping (--group-by frame takes every frame of a trajectory for unrelated to the "
                "others), "
            )
        files = "give more files, files of its own (--test, --valid)"
        return f"{files}, {frames}or a split fraction of 0; {no_test}"

    def best(self, seed: int) -> dict[str, int]:
        found: dict[str, int] = {}
        best = (len(self.targets) + 1, float("inf"))
        for attempt in range(MAX_ATTEMPTS):
            draws = {group: _draw(seed, attempt, group) for group in self.sizes}
            sides = self._assign(draws)
            held = self._held(sides)
            num_empty = sum(not held[place] for place in self.to_fill)
            misfit = max((abs(held[p] - t) / t for p, t in self.targets.items()), default=0.0)
            if (num_empty, misfit) < best:
                best, found = (num_empty, misfit), sides
            if best[0] == 0 and best[1] <= GOOD_MISFIT:
                break
        if best[0]:
            held = self._held(found)
            source, k = next(place for place in self.to_fill if not held[place])
            raise ValueError(
                f"source {source!r} gets no structure in {SPLITS[k]}: its groups are shared with other "
                "sources or decided by test files, and too few are free; give it a test file of its own "
                "(--test), another grouping (--group-by), or prepare it with a split fraction of 0"
            )
        return found

    def _assign(self, draws: Mapping[str, bytes]) -> dict[str, int]:
        """Groups in the order of their draws, each to the split its sources lack most of."""
        sides = dict(self.pinned)
        missing: dict[tuple[str, int], float] = defaultdict(float, self.targets)
        for group, k in sides.items():
            for source, count in self.sizes[group].items():
                missing[source, k] -= count
        for group in sorted(self.sizes, key=draws.__getitem__):
            if group in sides:
                continue
            of = self.sizes[group]
            lack = {
                k: sum(
                    count * missing[source, k] / self.totals[source] for source, count in sorted(of.items())
                )
                for k in self._open(group)
            }
            side = max(lack, key=lambda k: (lack[k], -k))
            sides[group] = side
            for source, count in of.items():
                missing[source, side] -= count
        self._fill(sides, draws)
        return sides

    def _open(self, group: str) -> list[int]:
        """Splits that some source of a group wants; the others follow it there."""
        return [k for k in range(3) if any(k in self.wanted[source] for source in self.sizes[group])]

    def _fill(self, sides: dict[str, int], draws: Mapping[str, bytes]) -> None:
        """Where a split of a source stayed empty, move the smallest group there that empties no other."""
        num_groups: dict[tuple[str, int], int] = defaultdict(int)
        for group, k in sides.items():
            for source in self.sizes[group]:
                num_groups[source, k] += 1
        for source, k in self.to_fill:
            if num_groups[source, k]:
                continue
            richest = max(self.wanted[source], key=lambda other: num_groups[source, other])
            movable = [
                group
                for group, of in self.sizes.items()
                if source in of
                and group not in self.pinned
                and k in self._open(group)
                and all(num_groups[s, sides[group]] > 1 for s in of)
            ]
            if movable:
                group = min(
                    movable, key=lambda g: (sides[g] != richest, sum(self.sizes[g].values()), draws[g])
                )
                for s in self.sizes[group]:
                    num_groups[s, sides[group]] -= 1
                    num_groups[s, k] += 1
                sides[group] = k

    def _held(self, sides: Mapping[str, int]) -> dict[tuple[str, int], int]:
        held: dict[tuple[str, int], int] = defaultdict(int)
        for group, k in sides.items():
            for source, count in self.sizes[group].items():
                held[source, k] += count
        return held


def _draw(seed: int, attempt: int, group: str) -> bytes:
    return hashlib.sha256(repr((seed, attempt, group)).encode()).digest()
