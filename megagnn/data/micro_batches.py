"""The order of a step's micro-batches."""

from __future__ import annotations

from collections.abc import Sequence


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
