"""Even pipelines: layers over stages, structures over micro-batches, by cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megagnn.data.sampler import Batch, BudgetSampler


def split_layers(costs: Sequence[float], num_stages: int) -> list[range]:
    """Contiguous stages with the smallest possible maximum of summed cost.

    Exact, by dynamic programming over the last stage's first layer (the linear partition problem), in time
    O(S L log L), for costs that are not negative.

    Args:
        costs: (L,) of what follows one another: embedding, layers, heads, in any unit.
        num_stages: S.

    Returns:
        (S,) ranges of indices into `costs`, none empty.

    Raises:
        ValueError: fewer costs than stages, or a cost that is negative or no number.
    """
    cost_L = np.asarray(costs, dtype=np.float64)
    length = len(cost_L)
    if not 1 <= num_stages <= length:
        raise ValueError(
            f"{length} layers (with embedding and heads) do not fill {num_stages} stages; use 1 to {length}"
        )
    if not (np.isfinite(cost_L).all() and (cost_L >= 0).all()):
        raise ValueError(f"costs must be numbers of at least 0, got {list(costs)}")
    total = np.concatenate([[0.0], np.cumsum(cost_L)])
    best = total.copy()  # of the first j layers in the stages so far
    starts: list[NDArray[np.int64]] = []
    for stage in range(1, num_stages):
        new = np.full(length + 1, np.inf)
        start = np.zeros(length + 1, dtype=np.int64)
        for end in range(stage + 1, length + 1):
            # best[k] grows with k and the last stage's cost falls: the least maximum is where they cross.
            low, high = stage, end - 1
            while low < high:
                middle = (low + high) // 2
                if best[middle] >= total[end] - total[middle]:
                    high = middle
                else:
                    low = middle + 1
            for k in {low, max(low - 1, stage)}:
                value = max(best[k], total[end] - total[k])
                if value < new[end] or (value == new[end] and k < start[end]):
                    new[end], start[end] = value, k
        starts.append(start)
        best = new
    ends = [length]
    for start in reversed(starts):
        ends.append(int(start[ends[-1]]))
    bounds = [0, *reversed(ends)]
    return [range(a, b) for a, b in pairwise(bounds)]


def balanced_micro_batches(
    num_atoms: NDArray[np.int64],
    num_edges: NDArray[np.int64],
    num_micro_batches: int,
    *,
    max_atoms: int | None = None,
    max_edges: int | None = None,
) -> list[Batch]:
    """One step's structures in micro-batches of even cost (edges + atoms), each within a budget.

    By the data sampler, the costliest structure first to the cheapest micro-batch, in the order of
    `data.micro_batches.hill`.

    Args:
        num_atoms, num_edges: (S,) of the step's structures.
        num_micro_batches: m; some are empty where there are fewer structures.
        max_atoms, max_edges: budget of a micro-batch, or None.

    Returns:
        (m,) index arrays into the structures.

    Raises:
        ValueError: no micro-batches, or structures that do not fit in the budget.
    """
    sampler = BudgetSampler(
        num_atoms,
        num_edges,
        max_atoms=int(num_atoms.sum()) if max_atoms is None else max_atoms,
        max_edges=int(num_edges.sum()) if max_edges is None else max_edges,
        per_step=num_micro_batches,
        shuffle=False,
    )
    batches = sampler.batches(0)
    if len(batches) > num_micro_batches:
        raise ValueError(
            f"{num_atoms.sum()} atoms and {num_edges.sum()} edges do not fit in {num_micro_batches} "
            f"micro-batches of {sampler.max_atoms} atoms and {sampler.max_edges} edges; use "
            f"{len(batches)}, or a larger budget"
        )
    return batches or [np.zeros(0, dtype=np.int64)] * num_micro_batches


def micro_batch_sizes(
    batches: Sequence[Batch], num_atoms: NDArray[np.int64], num_edges: NDArray[np.int64]
) -> list[float]:
    """(m,) cost of each micro-batch over their mean, for `simulate.Costs`."""
    cost = np.array([(num_atoms[batch] + num_edges[batch]).sum() for batch in batches], dtype=np.float64)
    mean = cost.mean()
    return [float(size / mean) if mean else 1.0 for size in cost]
