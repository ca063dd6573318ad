"""Which edges of a batch each tensor-parallel rank works on."""

from __future__ import annotations

from torch import Tensor

from megagnn.data import keys
from megagnn.models.egnn.edge import EdgeGraph
from megagnn.models.egnn.edge.operation import EdgePartition, Plan
from megagnn.ops import Segments
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.row_collectives import Rows
from megagnn.tensor_parallel.edge_plan import edge_rows


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
    own = edge_rows(batch, context)
    return EdgePartition(EdgeGraph(own.destination, own.source), own.rows, own.edges, plan)
