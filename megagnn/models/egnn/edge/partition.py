"""Which edges of a batch each tensor-parallel rank works on."""

from __future__ import annotations

import torch
from torch import Tensor

from megagnn.data import keys
from megagnn.models.egnn.edge import EdgeGraph
from megagnn.models.egnn.edge.operation import EdgePartition, Plan
from megagnn.ops import Segments
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.row_collectives import Rows, balanced_bounds


def partition_edges(batch: dict[str, Tensor], context: ParallelContext, plan: Plan | None) -> EdgePartition:
    """All edges on every rank (`channel`, or one rank), or those of contiguous, balanced rows (`edge`)."""
    index, ptr = batch[keys.EDGE_INDEX], batch[keys.ROW_PTR]
    num_edges, num_rows = index.shape[1], len(ptr) - 1
    if plan != "edge":
        graph = EdgeGraph(
            Segments(index[0], ptr), Segments(index[1], batch[keys.SOURCE_PTR], batch[keys.SOURCE_PERM])
        )
        bounds = (0,) * context.tp_size + (num_rows,)
        return EdgePartition(graph, Rows(bounds, context), slice(0, num_edges), plan)
    rows = Rows(balanced_bounds(ptr, context.tp_size), context)
    begin, end = int(ptr[rows.own.start]), int(ptr[rows.own.stop])
    destination = Segments(
        index[0, begin:end] - rows.own.start, ptr[rows.own.start : rows.own.stop + 1] - begin
    )
    source = index[1, begin:end].contiguous()
    # The stable order by source of some of the edges is that of all, without the others.
    perm = batch[keys.SOURCE_PERM]
    perm = perm[(perm >= begin) & (perm < end)] - begin
    counts = torch.bincount(source, minlength=num_rows)
    source_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    graph = EdgeGraph(destination, Segments(source, source_ptr, perm))
    return EdgePartition(graph, rows, slice(begin, end), plan)
