"""Splits into train, valid and test that keep every group whole.

Frames of one trajectory or conformations of one molecule are near copies of each other. With some of them in
training and others in the test set, the test measures memory. So the unit of a split is the group, and groups
with one name in two sources are two groups.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "valid", "test")
"""Names of the splits; a split is stored as its index here."""

DEFAULT_FRACTIONS = (0.8, 0.1, 0.1)

# Random assignments tried for a source, until every split is within GOOD_MISFIT of its target.
MAX_ATTEMPTS = 64
GOOD_MISFIT = 0.02


def split_groups(
    groups: Sequence[str],
    sources: Sequence[str],
    fractions: Sequence[float] = DEFAULT_FRACTIONS,
    seed: int = 0,
) -> NDArray[np.uint8]:
    """Assign whole groups to splits, source by source.

    The result depends on names, group sizes and seed, and not on the order of the structures. Within a source
    each split's number of structures misses its target by at most 4/3 of the largest group, except where a
    split would have stayed empty and takes the smallest group of another.

    Args:
        groups: (S,) group of each structure.
        sources: (S,) source of each structure.
        fractions: of train, valid, test; must sum to 1. A fraction of 0 leaves that split empty.
        seed: any integer.

    Returns:
        (S,) uint8, index into SPLITS.

    Raises:
        ValueError: bad fractions, or a source with fewer groups than splits to fill.
    """
    parts = _check_fractions(fractions)
    if len(groups) != len(sources):
        raise ValueError(f"groups and sources must be equally long, got {len(groups)} and {len(sources)}")
    members: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, (source, group) in enumerate(zip(sources, groups, strict=True)):
        members[source][group].append(index)
    result = np.zeros(len(groups), dtype=np.uint8)
    for source, by_group in members.items():
        for group, split in _assign(source, {g: len(m) for g, m in by_group.items()}, parts, seed).items():
            result[by_group[group]] = split
    return result


def _check_fractions(fractions: Sequence[float]) -> tuple[float, ...]:
    parts = tuple(float(f) for f in fractions)
    if len(parts) != 3 or min(parts, default=-1) < 0 or abs(sum(parts) - 1) > 1e-6 or parts[0] == 0:
        raise ValueError(
            "split fractions are three numbers, train, valid and test, none negative, train not 0, summing "
            "to 1; "
            f"got {fractions}, for example 0.8,0.1,0.1 would do"
        )
    return parts


def _assign(source: str, sizes: dict[str, int], parts: tuple[float, ...], seed: int) -> dict[str, int]:
    """The best of a few random assignments: with few large groups a single one may miss the fractions by
    far.
    """
    wanted = [k for k in range(3) if parts[k] > 0]
    if len(sizes) < len(wanted):
        names = ", ".join(SPLITS[k] for k in wanted)
        raise ValueError(
            f"source {source!r} has {len(sizes)} group(s), too few to fill {names} without leaking; give a "
            "test file of its own (--test), another grouping (--group-by), or a split fraction of 0"
        )
    targets = {k: parts[k] * sum(sizes.values()) for k in wanted}
    best, best_misfit = {}, float("inf")
    for attempt in range(MAX_ATTEMPTS):
        draws = {group: _draw(seed, attempt, source, group) for group in sizes}
        assigned = _assign_once(sizes, targets, draws)
        held = dict.fromkeys(wanted, 0)
        for group, k in assigned.items():
            held[k] += sizes[group]
        misfit = max(abs(held[k] - targets[k]) / targets[k] for k in wanted)
        if misfit < best_misfit:
            best, best_misfit = assigned, misfit
        if misfit <= GOOD_MISFIT:
            break
    return best


def _assign_once(sizes: dict[str, int], targets: dict[int, float], draws: dict[str, bytes]) -> dict[str, int]:
    """Groups in the order of their draws, each to the split that lacks most structures."""
    missing = dict(targets)
    held: dict[int, list[str]] = {k: [] for k in targets}
    for group in sorted(sizes, key=draws.__getitem__):
        split = max(targets, key=lambda k: (missing[k], -k))
        held[split].append(group)
        missing[split] -= sizes[group]
    for k in targets:
        if not held[k]:
            richest = max(targets, key=lambda other: len(held[other]))
            smallest = min(held[richest], key=lambda group: (sizes[group], draws[group]))
            held[richest].remove(smallest)
            held[k].append(smallest)
    return {group: k for k, names in held.items() for group in names}


def _draw(seed: int, attempt: int, source: str, group: str) -> bytes:
    """A random key that is the same in every process and on every machine, unlike Python's hash."""
    return hashlib.sha256(repr((seed, attempt, source, group)).encode()).digest()
