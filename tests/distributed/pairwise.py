"""A few cells of a matrix that hold every pair of values which the whole matrix holds."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations

Pair = tuple[tuple[int, object], tuple[int, object]]


def pairs_of(cell: Sequence[object]) -> frozenset[Pair]:
    """Every two values of a cell, each with the number of its axis."""
    return frozenset(combinations(enumerate(cell), 2))


def pairwise(cells: Sequence[tuple[object, ...]]) -> list[tuple[object, ...]]:
    """A subset of the cells, in their order, that covers all pairs of values in them.

    Greedy: each time the cell that holds most of the pairs still missing (as AETG, Cohen et al., IEEE Trans.
    Softw. Eng. 23, 437 (1997)), of several the one whose values were used least, then the first. What may
    not be combined is left out of `cells`.
    """
    pairs = [pairs_of(cell) for cell in cells]
    missing: set[Pair] = set().union(*pairs)
    used: Counter[tuple[int, object]] = Counter()
    chosen = []

    def merit(k: int) -> tuple[int, int, int]:
        return len(pairs[k] & missing), -sum(used[value] for value in enumerate(cells[k])), -k

    while missing:
        best = max(range(len(cells)), key=merit)
        chosen.append(best)
        used.update(enumerate(cells[best]))
        missing -= pairs[best]
    return [cells[k] for k in sorted(chosen)]
