"""Batches within a budget of atoms and edges, balanced over ranks, in an order that can be resumed.

The plan of an epoch is a pure function of the counts, the seed and the epoch. Every rank computes the whole
plan and takes its share, so ranks agree without talking, and a run resumes at (epoch, step) without any saved
state. Steps are cut from the order one after the other, so that those done are a prefix of the order, and a
plan for another number of ranks can begin where they end: `first` structures of an epoch are then left out.

An optimizer step may take several batches of each rank, its micro-batches. Then the plan counts these:
`per_step` entries of it, one after another, hold the structures of one step, dealt at once over micro-batches
and ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np

from megagnn.data.arrays import Ints

Batch = Ints


@dataclass(eq=False)
class BudgetSampler:
    """Plans index arrays, one for each micro-batch and rank.

    A step takes structures in (shuffled) order until the budget of one of its batches would burst, gives them
    to the batches so that their costs (edges + atoms) are even, and starts the next step. Every structure
    comes exactly once an epoch, every rank has the same number of batches, and in the last step a batch may
    get no structure. Several batches to a step come in the order of `rounds_of`.

    Args:
        num_atoms, num_edges: (S,) of each structure.
        max_atoms, max_edges: budget of one batch.
        dp_size, dp_rank: data-parallel ranks and this one's number.
        seed: of the order.
        shuffle: False keeps the order of the data set, for evaluation.
        max_structures: largest number of structures of one batch, or None.
        per_step: batches of each rank in a step.

    Raises:
        ValueError: a structure larger than the budget, or arguments out of range.
    """

    num_atoms: Ints
    num_edges: Ints
    _: KW_ONLY
    max_atoms: int
    max_edges: int
    dp_size: int = 1
    dp_rank: int = 0
    seed: int = 0
    shuffle: bool = True
    max_structures: int | None = None
    per_step: int = 1

    def __post_init__(self) -> None:
        self.num_atoms = np.asarray(self.num_atoms, dtype=np.int64)
        self.num_edges = np.asarray(self.num_edges, dtype=np.int64)
        self._check()
        self._plan: tuple[tuple[int, int], list[list[Batch]]] | None = None

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
        over = np.flatnonzero((self.num_atoms > self.max_atoms) | (self.num_edges > self.max_edges))
        if len(over):
            k = int(over[0])
            more = f" and {len(over) - 1} more" if len(over) > 1 else ""
            raise ValueError(
                f"structure {k}{more}: {self.num_atoms[k]} atoms and {self.num_edges[k]} edges exceed the "
                f"batch budget of {self.max_atoms} atoms and {self.max_edges} edges; raise the budget to at "
                f"least {self.num_atoms.max()} atoms and {self.num_edges.max()} edges, or lower the cutoff"
            )

    def check_position(self, epoch: int, step: int, first: int = 0) -> None:
        """Refuse a position to resume from that this plan does not have.

        Raises:
            ValueError: a negative epoch, a step outside 0..number of steps (the end of the epoch), or more
                structures left out than there are.
        """
        if epoch < 0:
            raise ValueError(f"cannot start at epoch {epoch}; epochs count from 0")
        if not 0 <= first <= len(self.num_atoms):
            raise ValueError(
                f"cannot start at structure {first} of an epoch: there are {len(self.num_atoms)} structures; "
                "was the run started with other data?"
            )
        num_steps = len(self.plan(epoch, first))
        if not 0 <= step <= num_steps:
            raise ValueError(
                f"cannot start at epoch {epoch}, step {step}: the epoch has {num_steps} steps; was the run "
                "started with other data, another budget or another number of ranks?"
            )

    def batches(self, epoch: int, first: int = 0) -> list[Batch]:
        """This rank's batches of an epoch without its first structures; the same number on every rank."""
        return [step[self.dp_rank] for step in self.plan(epoch, first)]

    def num_structures(self, epoch: int, num_steps: int, first: int = 0) -> int:
        """Structures of the first steps of a plan, on all ranks together."""
        return sum(len(batch) for step in self.plan(epoch, first)[:num_steps] for batch in step)

    def on_ranks(self, dp_size: int) -> BudgetSampler:
        """The sampler of the first of another number of ranks."""
        return replace(self, dp_size=dp_size, dp_rank=0)

    def plan(self, epoch: int, first: int = 0) -> list[list[Batch]]:
        """Batches of an epoch without its `first` structures, each a list of one for each rank."""
        if self._plan is None or self._plan[0] != (epoch, first):
            order = np.arange(len(self.num_atoms))
            if self.shuffle:
                order = np.random.default_rng((self.seed, epoch)).permutation(order)
            self._plan = ((epoch, first), self._steps(order[first:]))
        return self._plan[1]

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
            atoms += int(self.num_atoms[k])
            edges += int(self.num_edges[k])
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
            atoms, edges = int(self.num_atoms[index]), int(self.num_edges[index])
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
