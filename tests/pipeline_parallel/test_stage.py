from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megagnn.data.sampler import Batch, BudgetSampler, hill
from megagnn.pipeline_parallel.schedules.ordinary import one_f_one_b
from megagnn.pipeline_parallel.simulate import Costs, simulate
from megagnn.pipeline_parallel.stage import split_layers


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
    `data.sampler.hill`.

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


def brute_force(costs: list[int], num_stages: int) -> int:
    cuts = combinations(range(1, len(costs)), num_stages - 1)
    return min(max(sum(costs[a:b]) for a, b in pairwise((0, *cut, len(costs)))) for cut in cuts)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_split_is_the_best(data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=9))
    num_stages = data.draw(st.integers(1, len(costs)))
    stages = split_layers(costs, num_stages)
    assert len(stages) == num_stages
    assert all(map(len, stages))
    assert [k for stage in stages for k in stage] == list(range(len(costs)))
    assert max(sum(costs[k] for k in stage) for stage in stages) == brute_force(costs, num_stages)


def test_head_and_embedding_weigh() -> None:
    """A head as dear as two layers leaves its stage two layers fewer; even numbers of layers are worse."""
    costs = [0.1, *[1.0] * 10, 2.0]
    stages = split_layers(costs, 3)
    assert max(sum(costs[k] for k in stage) for stage in stages) == pytest.approx(4.1)
    even = [costs[:5], costs[5:8], costs[8:]]
    assert max(map(sum, even)) > 4.1


def test_many_layers() -> None:
    stages = split_layers(np.random.default_rng(0).uniform(0.5, 1.5, 500).tolist(), 64)
    assert len(stages) == 64


def test_what_cannot_be_split() -> None:
    with pytest.raises(ValueError, match=r"2 layers .* do not fill 3 stages; use 1 to 2"):
        split_layers([1, 1], 3)
    with pytest.raises(ValueError, match="costs must be numbers of at least 0"):
        split_layers([1, -1], 1)
    with pytest.raises(ValueError, match="costs must be numbers of at least 0"):
        split_layers([1, float("nan")], 1)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 900)), max_size=40), st.integers(1, 8))
def test_micro_batches_hold_everything_once(counts: list[tuple[int, int]], m: int) -> None:
    num_atoms, num_edges = np.array(counts, dtype=np.int64).reshape(-1, 2).T
    batches = balanced_micro_batches(num_atoms, num_edges, m)
    assert len(batches) == m
    assert sorted(k for batch in batches for k in batch.tolist()) == list(range(len(counts)))
    cost = num_atoms + num_edges
    loads = [int(cost[batch].sum()) for batch in batches]
    # Graham's list scheduling: no micro-batch is above the mean by more than one structure.
    assert max(loads) <= sum(loads) / m + (cost.max() if len(cost) else 0)


def test_micro_batches_are_more_even_than_cuts() -> None:
    rng = np.random.default_rng(0)
    num_atoms = rng.integers(2, 200, 96)
    num_edges = num_atoms * rng.integers(5, 40, 96)
    balanced = micro_batch_sizes(balanced_micro_batches(num_atoms, num_edges, 8), num_atoms, num_edges)
    cut = micro_batch_sizes(np.split(np.arange(96), 8), num_atoms, num_edges)
    assert max(balanced) < 1.01 < 1.2 < max(cut)
    assert np.mean(balanced) == pytest.approx(1)
    schedule = one_f_one_b(4, 8)
    even, uneven = (simulate(schedule, Costs(micro_batch=sizes)) for sizes in (balanced, cut))
    assert even.makespan < 1.01 * simulate(schedule).makespan < uneven.makespan


def test_micro_batches_within_a_budget() -> None:
    num_atoms, num_edges = np.full(8, 10), np.full(8, 100)
    batches = balanced_micro_batches(num_atoms, num_edges, 4, max_atoms=20, max_edges=200)
    assert [len(batch) for batch in batches] == [2, 2, 2, 2]
    with pytest.raises(ValueError, match=r"do not fit in 4 micro-batches of 10 atoms and 800 edges; use 8"):
        balanced_micro_batches(num_atoms, num_edges, 4, max_atoms=10)
    with pytest.raises(ValueError, match="exceed the batch budget of 5 atoms"):
        balanced_micro_batches(num_atoms, num_edges, 4, max_atoms=5)
    with pytest.raises(ValueError, match="at least 1 micro-batch, got 0"):
        balanced_micro_batches(num_atoms, num_edges, 0)


def test_hill() -> None:
    assert [[3, 1, 2, 5, 4][k] for k in hill([3, 1, 2, 5, 4])] == [1, 3, 5, 4, 2]
    assert hill([]) == []
    sizes = np.exp(0.3 * np.random.default_rng(0).standard_normal(16))
    schedule = one_f_one_b(8, 16)
    ordered = simulate(schedule, Costs(micro_batch=[sizes[k] for k in hill(sizes.tolist())])).makespan
    assert ordered < 0.9 * simulate(schedule, Costs(micro_batch=sizes.tolist())).makespan
