"""Counts what a rank sends, so that a formula for a layout can be held against the program.

Counted are the elements that a bandwidth-optimal algorithm sends from one rank, whatever the back end does:
of n elements in all on each of t ranks, all-gather and reduce-scatter (t-1)/t n, all-reduce twice that,
all-to-all exactly what leaves the rank.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction


class Traffic:
    """Elements and bytes sent, by axis and by kind of collective."""

    def __init__(self) -> None:
        self.elements: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def count(self, axis: str, kind: str, elements: Fraction | int, element_size: int) -> None:
        """One collective: `kind` along `axis`."""
        self.elements[axis, kind] += elements  # type: ignore[assignment] # exact fractions
        self.bytes[axis, kind] += elements * element_size  # type: ignore[assignment]

    def total(self, axis: str) -> Fraction:
        """Elements sent along an axis, exactly."""
        return sum((Fraction(n) for (a, _), n in self.elements.items() if a == axis), Fraction(0))

    @contextmanager
    def measured(self) -> Iterator["Traffic"]:
        """What is sent within the context, as a Traffic of its own, complete when the context ends."""
        elements, sizes, inside = Counter(self.elements), Counter(self.bytes), Traffic()
        yield inside
        inside.elements = self.elements - elements
        inside.bytes = self.bytes - sizes
