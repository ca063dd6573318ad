"""Batches within a budget of atoms and edges, balanced over ranks, in an order that can be resumed.

The plan of an epoch is a pure function of the counts, the seed and the epoch. Every rank computes the whole
plan and takes its share, so ranks agree without talking, and a run resumes at (epoch, step) without any saved
state. Steps are cut from the order one after the other, so that those done are a prefix of the order, and a
plan for another number of ranks can begin where they end: `first` structures of an epoch are then left out.
Of very many structures the plan is made window by window while it is used (order.py, deal.py).

An optimizer step may take several batches of each rank, its micro-batches. Then the plan counts these:
`per_step` entries of it, one after another, hold the structures of one step, dealt at once over micro-batches
and ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megagnn.data.arrays import Bools, Ints
from megagnn.data.config import Oversized
from megagnn.data.deal import Budget, Dealt, Sizes, best_fill, cut, deal
from megagnn.data.order import EpochOrder

Batch = Ints
# Structures that the share of the budget is tried on by which steps of very many are cut, and their seed.
_TRIED, _OF_TRIAL = 2**15, 0xF111


def exceeds(
    num_atoms: NDArray[np.integer], num_edges: NDArray[np.integer], max_atoms: int, max_edges: int
) -> Bools:
    """(S,) whether each structure is larger than the budget of a batch."""
    return (num_atoms > max_atoms) | (num_edges > max_edges)


@dataclass(eq=False)
class BudgetSampler:
    """Plans index arrays, one for each micro-batch and rank.

    A step takes structures in (shuffled) order until the budget of one of its batches would burst, gives them
    to the batches so that their costs (edges + atoms) are even, and starts the next step. Every structure
    comes exactly once an epoch (unless sources are mixed: order.py), every rank has the same number of
    batches, and in the last step a batch may get no structure. Several batches to a step come in the order of
    `rounds_of`.

    Args:
        num_atoms, num_edges: (S,) of each structure, whole numbers of any type.
        max_atoms, max_edges: budget of one batch.
        dp_size, dp_rank: data-parallel ranks and this one's number.
        seed: of the order.
        shuffle: False keeps the order of the data set, for evaluation.
        max_structures: largest number of structures of one batch, or None.
        per_step: batches of each rank in a step.
        sources, temperature: of the order, see `EpochOrder`.
        oversized: "alone" gives structures larger than the budget a batch each, anything else refuses them.

    Raises:
        ValueError: a structure larger than the budget, or arguments out of range.
    """

    num_atoms: NDArray[np.integer]
    num_edges: NDArray[np.integer]
    _: KW_ONLY
    max_atoms: int
    max_edges: int
    dp_size: int = 1
    dp_rank: int = 0
    seed: int = 0
    shuffle: bool = True
    max_structures: int | None = None
    per_step: int = 1
    sources: Ints | None = None
    temperature: float = 1.0
    oversized: Oversized = "error"

    def __post_init__(self) -> None:
        self.num_atoms = _integers(self.num_atoms)
        self.num_edges = _integers(self.num_edges)
        self._check()
        self.order = EpochOrder(len(self.num_atoms), self.seed, self.shuffle, self.sources, self.temperature)
        self._plan: tuple[tuple[int, int], list[list[Batch]]] | None = None
        self._fill: float | None = None
        self._room_atoms, self._room_edges = self.num_atoms, self.num_edges
        if self.order.is_whole:
            self._room_atoms, self._room_edges = self._room(np.arange(len(self.num_atoms)))

    def _room(self, chosen: Ints) -> tuple[Ints, Ints]:
        """Room that structures take in a batch: that of an oversized one is all there is."""
        atoms, edges = self.num_atoms[chosen].astype(np.int64), self.num_edges[chosen].astype(np.int64)
        over = exceeds(atoms, edges, self.max_atoms, self.max_edges)
        atoms[over], edges[over] = self.max_atoms, self.max_edges
        return atoms, edges

    def _check(self) -> None:
        if self.num_atoms.shape != self.num_edges.shape or self.num_atoms.ndim != 1:
            raise ValueError(
                f"num_atoms and num_edges must be (S,), got {self.num_atoms.shape} and {self.num_edges.shape}"
            )
        if self.max_structures is not None and self.max_structures < 1:
            raise ValueError(f"max_structures must be at least 1 or None, got {self.max_structures}")
        if self.dp_size < 1 or not 0 <= self.dp_rank < self.dp_size:
            raise ValueError(f"dp_rank must lie in 0..dp_size - 1, got {self.dp_rank} of {self.dp_size}")
        if self.per_step < 1:
            raise ValueError(f"a step needs at least 1 micro-batch, got {self.per_step}")
        over = np.flatnonzero(exceeds(self.num_atoms, self.num_edges, self.max_atoms, self.max_edges))
        self.num_oversized = len(over)
        if len(over) and self.oversized != "alone":
            k = int(over[0])
            more = f" and {len(over) - 1} more" if len(over) > 1 else ""
            raise ValueError(
                f"structure {k}{more}: {self.num_atoms[k]} atoms and {self.num_edges[k]} edges exceed the "
                f"batch budget of {self.max_atoms} atoms and {self.max_edges} edges; raise the budget to at "
                f"least {self.num_atoms.max()} atoms and {self.num_edges.max()} edges, lower the cutoff, or "
                'say what becomes of them: data.oversized = "alone" (a batch each) or "skip"'
            )

    def check_position(self, epoch: int, step: int, first: int = 0) -> None:
        """Refuse a position to resume from that this plan does not have.

        Raises:
            ValueError: a negative epoch, a step outside 0..number of steps (the end of the epoch), or more
                structures left out than there are.
        """
        if epoch < 0:
            raise ValueError(f"cannot start at epoch {epoch}; epochs count from 0")
        if not 0 <= first <= self.order.length:
            raise ValueError(
                f"cannot start at structure {first} of an epoch: there are {self.order.length} structures; "
                "was the run started with other data?"
            )
        if self.order.is_whole:
            self._check_step(epoch, step, len(self.plan(epoch, first)))

    def _check_step(self, epoch: int, step: int, num_steps: int) -> None:
        if not 0 <= step <= num_steps:
            raise ValueError(
                f"cannot start at epoch {epoch}, step {step}: the epoch has {num_steps} steps; was the run "
                "started with other data, another budget or another number of ranks?"
            )

    def batches(self, epoch: int, first: int = 0) -> list[Batch]:
        """This rank's batches of an epoch without its first structures; the same number on every rank."""
        return [step[self.dp_rank] for step in self.plan(epoch, first)]

    def batches_from(self, epoch: int, start: int, first: int = 0) -> Iterator[Batch]:
        """The same from the `start`-th on, of very many structures made as they are needed.

        Raises:
            ValueError: see `check_position`.
        """
        self.check_position(epoch, start, first)
        if self.order.is_whole:
            yield from self.batches(epoch, first)[start:]
            return
        passed = 0
        for rows, dealt in self._dealt(epoch, first):
            num = (len(dealt.bounds) - 1) // self.dp_size
            for k in range(min(max(start - passed, 0), num), num):
                at = k * self.dp_size + self.dp_rank
                yield rows[dealt.places[dealt.bounds[at] : dealt.bounds[at + 1]]]
            passed += num
        self._check_step(epoch, start, passed)

    def num_batches(self, epoch: int, first: int = 0) -> int:
        """Batches of each rank in an epoch."""
        if self.order.is_whole:
            return len(self.plan(epoch, first))
        return sum((len(dealt.bounds) - 1) // self.dp_size for _, dealt in self._dealt(epoch, first))

    def num_structures(self, epoch: int, num_steps: int, first: int = 0) -> int:
        """Structures of the first steps of a plan, on all ranks together."""
        if self.order.is_whole:
            return sum(len(batch) for step in self.plan(epoch, first)[:num_steps] for batch in step)
        total = left = 0
        left = num_steps * self.dp_size
        for _, dealt in self._dealt(epoch, first):
            total += int(dealt.bounds[min(left, len(dealt.bounds) - 1)])
            left -= min(left, len(dealt.bounds) - 1)
            if not left:
                break
        return total

    def on_ranks(self, dp_size: int) -> BudgetSampler:
        """The sampler of the first of another number of ranks."""
        return replace(self, dp_size=dp_size, dp_rank=0)

    def plan(self, epoch: int, first: int = 0) -> list[list[Batch]]:
        """Batches of an epoch without its `first` structures, each a list of one for each rank."""
        if self._plan is None or self._plan[0] != (epoch, first):
            found: list[list[Batch]] = []
            if self.order.is_whole:
                found = self._steps(
                    np.concatenate([*self.order.windows(epoch, first), np.zeros(0, np.int64)])
                )
            else:
                for rows, dealt in self._dealt(epoch, first):
                    parts = np.split(rows[dealt.places], dealt.bounds[1:-1])
                    found += [parts[k : k + self.dp_size] for k in range(0, len(parts), self.dp_size)]
            self._plan = ((epoch, first), found)
        return self._plan[1]

    def _dealt(self, epoch: int, first: int) -> Iterator[tuple[Ints, Dealt]]:
        """Structures of an epoch and how they are dealt, window by window. What is left of one, too little
        for a step, goes to the next."""
        num, budget = self.dp_size * self.per_step, self._budget()
        left = np.zeros(0, dtype=np.int64)
        begun = first
        for window in self.order.windows(epoch, first):
            begun += len(window)
            rows = np.concatenate([left, window])
            sizes = self._sizes(rows)
            starts = cut(sizes, budget, num, self._share())
            if begun < self.order.length and len(starts) > 1:
                starts = starts[:-1]
            rows, left = rows[: starts[-1]], rows[starts[-1] :]
            if not len(rows):
                continue
            dealt = deal(Sizes(*(x[: len(rows)] for x in sizes)), starts, budget, num)
            yield rows, self._in_rounds(dealt, sizes.cost)

    def _budget(self) -> Budget:
        most = len(self.num_atoms) if self.max_structures is None else self.max_structures
        return Budget(self.max_atoms, self.max_edges, most)

    def _sizes(self, rows: Ints) -> Sizes:
        cost = self.num_atoms[rows].astype(np.int64) + self.num_edges[rows]
        return Sizes(*self._room(rows), cost)

    def _share(self) -> float:
        """`best_fill` of a sample, drawn by the seed: every rank finds the same."""
        if self._fill is None:
            rng = np.random.default_rng((self.seed, _OF_TRIAL))
            sample = self._sizes(rng.integers(len(self.num_atoms), size=_TRIED))
            self._fill = best_fill(sample, self._budget(), self.dp_size * self.per_step)
        return self._fill

    def _in_rounds(self, dealt: Dealt, cost: Ints) -> Dealt:
        """The batches of each step in the order of `rounds_of`."""
        if self.per_step == 1:
            return dealt
        totals = np.concatenate([[0], np.cumsum(cost[dealt.places])])
        costs = np.diff(totals[dealt.bounds]).reshape(-1, self.dp_size * self.per_step)
        chosen = np.concatenate(
            [
                k * costs.shape[1] + np.concatenate(rounds_of(row, self.dp_size))
                for k, row in enumerate(costs.tolist())
            ]
            or [np.zeros(0, dtype=np.int64)]
        )
        lengths = np.diff(dealt.bounds)[chosen]
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        moved = np.arange(bounds[-1]) + np.repeat(dealt.bounds[chosen] - bounds[:-1], lengths)
        return Dealt(dealt.places[moved], bounds)

    def _steps(self, order: Ints) -> list[list[Batch]]:
        """Cut the order into steps: the longest runs that `_deal` finds room for."""
        steps: list[list[Batch]] = []
        start = 0
        while start < len(order):
            size = self._greedy_size(order, start)
            dealt = self._deal(order[start : start + size])
            while dealt is None:  # evenly dealt, some rank would burst its budget: take a little less
                size = max(1, min(size - 1, int(size * 0.97)))
                dealt = self._deal(order[start : start + size])
            steps += self._rounds(dealt)
            start += size
        return steps

    def _rounds(self, dealt: list[Batch]) -> list[list[Batch]]:
        if self.per_step == 1:
            return [dealt]
        cost = [int((self.num_edges[batch] + self.num_atoms[batch]).sum()) for batch in dealt]
        return [[dealt[k] for k in one] for one in rounds_of(cost, self.dp_size)]

    def _greedy_size(self, order: Ints, start: int) -> int:
        """Structures that fit the budget of all batches together, an upper bound for a step."""
        atoms = edges = count = 0
        num = self.dp_size * self.per_step
        most = len(order) if self.max_structures is None else self.max_structures * num
        for k in order[start : start + most]:
            atoms += int(self._room_atoms[k])
            edges += int(self._room_edges[k])
            if atoms > self.max_atoms * num or edges > self.max_edges * num:
                break
            count += 1
        return count

    def _deal(self, chosen: Ints) -> list[Batch] | None:
        """Structures to batches, the costliest to the cheapest first (Graham 1969); None without room."""
        cost = self.num_edges[chosen] + self.num_atoms[chosen]
        num = self.dp_size * self.per_step
        batches: list[list[int]] = [[] for _ in range(num)]
        room = [(self.max_atoms, self.max_edges)] * num
        heap = [(0, slot) for slot in range(num)]
        for k in np.argsort(-cost, kind="stable"):
            index = int(chosen[k])
            atoms, edges = int(self._room_atoms[index]), int(self._room_edges[index])
            full = []
            while heap:
                load, slot = heapq.heappop(heap)
                left = room[slot]
                many = self.max_structures is not None and len(batches[slot]) >= self.max_structures
                if left[0] >= atoms and left[1] >= edges and not many:
                    break
                full.append((load, slot))
            else:
                return None
            batches[slot].append(int(k))
            room[slot] = (left[0] - atoms, left[1] - edges)
            heapq.heappush(heap, (load + int(cost[k]), slot))
            for entry in full:
                heapq.heappush(heap, entry)
        # Within a batch the drawn order is kept: it costs nothing and keeps evaluation in the data's order.
        return [chosen[np.sort(np.array(batch, dtype=np.int64))] for batch in batches]


def _integers(counts: NDArray[np.integer]) -> NDArray[np.integer]:
    """Whole numbers as they are, for there may be very many; others, as of an empty list, as int64."""
    array = np.asarray(counts)
    return array if array.dtype.kind == "i" else array.astype(np.int64)


def hill(costs: Sequence[float]) -> list[int]:
    """Order with the cheapest micro-batches at both ends and the costliest in the middle.

    Pipeline ranks wait for the first and after the last micro-batches, so these should be small; and
    neighbours should be alike, because ranks work on different ones at a time (measured in
    docs/results/pipeline.md).
    """
    rising = sorted(range(len(costs)), key=lambda k: costs[k])
    return rising[::2] + rising[1::2][::-1]


def rounds_of(costs: Sequence[float], dp_size: int) -> list[list[int]]:
    """Micro-batches of like cost side by side on the data-parallel ranks, one after another as in `hill`.

    In each round the rank with the least so far gets the costliest.

    Args:
        costs: (m * dp_size,) of each micro-batch.

    Returns:
        (m, dp_size) indices into `costs`.
    """
    rising = sorted(range(len(costs)), key=lambda k: costs[k])
    rounds = [rising[k : k + dp_size] for k in range(0, len(rising), dp_size)]
    load = [0.0] * dp_size
    dealt = []
    for place in hill([sum(costs[k] for k in one) for one in rounds]):
        ranks = sorted(range(dp_size), key=lambda rank: -load[rank])
        chosen = [0] * dp_size
        for rank, k in zip(ranks, rounds[place], strict=True):
            chosen[rank] = k
            load[rank] += costs[k]
        dealt.append(chosen)
    return dealt
