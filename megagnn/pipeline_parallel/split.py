"""Division of layers over the stages of a pipeline, by cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


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
