"""Which edges and rows each tensor-parallel rank takes. No processes needed."""

import pytest
import torch
from torch import Tensor

from megagnn.data import keys
from megagnn.models.egnn.edge.operation import Plan, partition_edges
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.row_collectives import balanced_bounds
from tests.distributed.parity import batch_of

RANKS = (1, 2, 4)
SHARES = {"all": range(6), "one atom": [4], "nothing": [], "molecule": [0]}


def pointer(*degrees: int) -> Tensor:
    return torch.tensor([0, *degrees]).cumsum(0)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("share", SHARES)
def test_the_ranks_together_have_every_edge_once(share: str, ranks: int) -> None:
    batch = batch_of(SHARES[share])
    index, num_rows = batch[keys.EDGE_INDEX], len(batch[keys.ROW_PTR]) - 1
    found, begin, row = [], 0, 0
    for rank in range(ranks):
        part = partition_edges(batch, ParallelContext(tp_size=ranks, tp_rank=rank), "edge")
        part.graph.destination.validate()
        part.graph.source.validate()
        assert (part.edges.start, part.own_rows.start) == (begin, row)
        begin, row = part.edges.stop, part.own_rows.stop
        assert part.graph.destination.num_rows == part.own_rows.stop - part.own_rows.start
        assert part.graph.source.num_rows == num_rows
        destination = part.graph.destination.index + part.own_rows.start
        found.append(torch.stack([destination, part.graph.source.index]))
    assert (begin, row) == (index.shape[1], num_rows)
    assert torch.equal(torch.cat(found, 1), index)


@pytest.mark.parametrize("ranks", RANKS)
def test_the_transpose_is_a_stable_sort_by_source(ranks: int) -> None:
    batch = batch_of(range(6))
    for rank in range(ranks):
        graph = partition_edges(batch, ParallelContext(tp_size=ranks, tp_rank=rank), "edge").graph
        source, num_rows = graph.source.index, graph.source.num_rows
        assert graph.source.perm is not None
        assert torch.equal(graph.source.perm, torch.argsort(source, stable=True))
        assert torch.equal(graph.source.ptr, pointer(*torch.bincount(source, minlength=num_rows).tolist()))


@pytest.mark.parametrize("ranks", [2, 4])
def test_edges_are_balanced_to_a_row(ranks: int) -> None:
    batch = batch_of(range(6))
    num_edges, most = batch[keys.EDGE_INDEX].shape[1], int(batch[keys.ROW_PTR].diff().max())
    for rank in range(ranks):
        part = partition_edges(batch, ParallelContext(tp_size=ranks, tp_rank=rank), "edge")
        assert abs(part.edges.stop - part.edges.start - num_edges / ranks) <= most


@pytest.mark.parametrize("plan", ["channel", None])
def test_other_plans_take_all_edges(plan: Plan | None) -> None:
    batch = batch_of(range(6))
    ranks = 4 if plan else 1
    part = partition_edges(batch, ParallelContext(tp_size=ranks, tp_rank=ranks - 1), plan)
    num_rows = len(batch[keys.ROW_PTR]) - 1
    assert part.own_rows == slice(0, num_rows)
    assert part.edges == slice(0, batch[keys.EDGE_INDEX].shape[1])
    assert torch.equal(part.graph.destination.index, batch[keys.EDGE_INDEX][0])
    assert torch.equal(part.graph.source.index, batch[keys.EDGE_INDEX][1])


@pytest.mark.parametrize(
    ("degrees", "ranks", "bounds"),
    [
        ((2, 2, 2, 2), 2, (0, 2, 4)),
        ((2, 2, 2, 2), 4, (0, 1, 2, 3, 4)),
        ((6, 1, 1, 1, 1, 1, 1), 2, (0, 1, 7)),
        ((1, 1, 1, 100, 1), 2, (0, 3, 5)),  # a giant row: the rest cannot make up for it
        ((0, 0, 0, 0), 2, (0, 2, 4)),  # no edges: atoms alone
        ((5, 0, 0, 0, 0, 5), 2, (0, 3, 6)),  # rows without edges are shared out as well
        ((3,), 2, (0, 1, 1)),  # fewer rows than ranks
        ((), 4, (0, 0, 0, 0, 0)),
        ((1, 2, 3), 1, (0, 3)),
    ],
)
def test_balanced_bounds(degrees: tuple[int, ...], ranks: int, bounds: tuple[int, ...]) -> None:
    assert balanced_bounds(pointer(*degrees), ranks) == bounds
    assert balanced_bounds(pointer(*degrees).tolist(), ranks) == bounds


def test_balanced_bounds_of_many_graphs() -> None:
    """They rise from 0 to the number of rows, and no rank is off by more than the largest row."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        num_rows = int(torch.randint(0, 40, (), generator=generator))
        ranks = int(torch.randint(1, 9, (), generator=generator))
        sparse = torch.rand(num_rows, generator=generator) < 0.5
        degrees = torch.randint(0, 60, (num_rows,), generator=generator) * sparse
        ptr = pointer(*degrees.tolist())
        bounds = torch.tensor(balanced_bounds(ptr, ranks))
        assert len(bounds) == ranks + 1
        assert (int(bounds[0]), int(bounds[-1])) == (0, num_rows)
        assert (bounds.diff() >= 0).all()
        if num_rows:
            largest = int(degrees.max())
            # Half a row at either end, and what rows without edges count for.
            off = (ptr[bounds].diff() - int(ptr[-1]) / ranks).abs().max().item()
            assert off <= largest + 0.01 * num_rows
