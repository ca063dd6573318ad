"""The order in which an epoch takes structures: one permutation, or window by window of very many.

Up to `WHOLE` structures an epoch's order is a permutation of all of them. Beyond that, blocks of neighbours
in the data are drawn in random order, and those of one window at a time are shuffled together: memory and
what must be read from disk at a time are bounded by the window, whatever the size of the data. Every
structure comes once an epoch in either case, and the order is a function of the seed and the epoch alone.

[Note: mixing] With a temperature T a source of n structures has a share of the draws that goes as n^(1/T):
T = 1 leaves the data as they are, a large T gives all sources alike. An epoch has as many draws as there are
structures. A source's draws come from passes over it, each in an order of its own, and go on from epoch to
epoch where they stopped: over many epochs all of its structures come equally often, be it once in several
epochs or several times in one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megagnn.data.arrays import Ints

WHOLE = 2**20
"""Structures whose order is one permutation."""
BLOCK = 2**14
"""Neighbours in the data that come in the same window, beyond that."""
WINDOW = 2**20
"""Structures that are shuffled together, beyond that."""
# Behind the seeds of draws of different kinds, none of which may meet another's.
_OF_WINDOW, _OF_PASS = 0x57D0, 0x9A55


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """Orders of the epochs of a data set.

    Args:
        num_structures: S.
        seed: of the orders.
        shuffle: False takes structures as they come.
        sources: (S,) number of each structure's source, or None where they are not mixed anew.
        temperature: see [Note: mixing].

    Raises:
        ValueError: a temperature that is not positive, or one other than 1 without sources.
    """

    num_structures: int
    seed: int = 0
    shuffle: bool = True
    sources: Ints | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"a mixing temperature must be positive, got {self.temperature}; 1 mixes nothing"
            )
        members: list[Ints | None] = [None]
        if self.temperature != 1 and self.sources is None:
            raise ValueError(f"a mixing temperature of {self.temperature} needs the source of each structure")
        if self.temperature != 1 and self.shuffle:
            numbers = np.asarray(self.sources)
            found = np.flatnonzero(np.bincount(numbers)) if len(numbers) else np.zeros(0, dtype=np.int64)
            members = [np.flatnonzero(numbers == source) for source in found]
        sizes = [self.num_structures if m is None else len(m) for m in members]
        object.__setattr__(self, "_members", members)
        object.__setattr__(self, "_sizes", sizes)
        object.__setattr__(self, "draws", shares(sizes, self.temperature))

    draws: tuple[int, ...] = ()
    """Of each source in an epoch."""

    @property
    def length(self) -> int:
        """Structures of an epoch."""
        return sum(self.draws)

    @property
    def is_whole(self) -> bool:
        """Whether an epoch's order is made at once."""
        return self.num_structures <= WHOLE

    def windows(self, epoch: int, first: int = 0) -> Iterator[Ints]:
        """Pieces of an epoch's order, one after another, without its `first` structures."""
        num = 1 if self.is_whole else -(-self.length // WINDOW)
        for window in range(num):
            spans = [(k * window // num, k * (window + 1) // num) for k in self.draws]
            size = sum(end - begin for begin, end in spans)
            if first >= size > 0:
                first -= size
                continue
            yield self._window(epoch, window, spans)[first:]
            first = 0

    def _window(self, epoch: int, window: int, spans: list[tuple[int, int]]) -> Ints:
        if not self.shuffle:
            return np.arange(*spans[0])
        if self.is_whole and self.temperature == 1:
            return np.random.default_rng((self.seed, epoch)).permutation(np.arange(self.num_structures))
        drawn = np.concatenate(
            [
                self._draws(source, epoch * num + begin, epoch * num + end)
                for source, (num, (begin, end)) in enumerate(zip(self.draws, spans, strict=True))
            ]
        )
        return np.random.default_rng((self.seed, epoch, window, _OF_WINDOW)).permutation(drawn)

    def _draws(self, source: int, begin: int, end: int) -> Ints:
        """Draws `begin` to `end` of a source, counted over all epochs."""
        found = [np.zeros(0, dtype=np.int64)]
        size: int = self._sizes[source]  # type: ignore[attr-defined]
        while begin < end:
            number, at = divmod(begin, size)
            stop = min(at + end - begin, size)
            found.append(self._of_pass(source, number, at, stop))
            begin += stop - at
        drawn = np.concatenate(found)
        members: Ints | None = self._members[source]  # type: ignore[attr-defined]
        return drawn if members is None else members[drawn]

    def _of_pass(self, source: int, number: int, begin: int, end: int) -> Ints:
        """Part of a pass over a source: its blocks in random order, cut to what lies between two places."""
        size: int = self._sizes[source]  # type: ignore[attr-defined]
        block = 1 if self.is_whole else BLOCK
        rng = np.random.default_rng((self.seed, source, number, _OF_PASS))
        firsts = rng.permutation(-(-size // block)) * block
        lengths = np.minimum(firsts + block, size) - firsts
        ends = np.cumsum(lengths)
        places = ends - lengths
        left, right = np.maximum(places, begin), np.minimum(ends, end)
        used = np.flatnonzero(left < right)
        left, right = left[used], right[used]
        counts = right - left
        return np.arange(counts.sum()) + np.repeat(
            firsts[used] + left - places[used] - np.cumsum(counts) + counts, counts
        )


def shares(sizes: list[int], temperature: float) -> tuple[int, ...]:
    """Draws of each source in an epoch, see [Note: mixing]: their sum is that of the sizes, but for sources
    that would get none, which get one."""
    weights = np.array(sizes, dtype=np.float64) ** (1 / temperature)
    exact = weights / max(weights.sum(), 1e-300) * sum(sizes)
    found = np.floor(exact).astype(np.int64)
    left = sum(sizes) - int(found.sum())
    found[np.argsort(found - exact, kind="stable")[:left]] += 1
    return tuple(np.maximum(found, np.minimum(sizes, 1)).tolist())
