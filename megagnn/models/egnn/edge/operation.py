"""A layer's edge operation on tensors or Dual ones, by one process or divided over tensor-parallel ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor

from megagnn.data import keys
from megagnn.models.egnn.edge import reference as edge_reference
from megagnn.models.egnn.edge.ahead import edge_graph
from megagnn.models.egnn.edge.message import EdgePair, edge_message, edge_message_pair, pair_reference
from megagnn.models.egnn.edge.plan_channel import ChannelRunner
from megagnn.models.egnn.edge.plan_rows import RowsRunner, WeightRing
from megagnn.models.egnn.edge.reference import channel_edge_message, rows_edge_message
from megagnn.models.egnn.edge.runner import SERIAL, EdgeRunner, has_kernels
from megagnn.models.egnn.edge.types import EdgeGraph, EdgeSpec, EdgeWeights
from megagnn.ops.backends import AggregationBackend
from megagnn.ops.dual import Dual, T
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.row_collectives import Rows
from megagnn.tensor_parallel.edge_plan import edge_rows

Plan = Literal["channel", "edge"]


@dataclass(frozen=True)
class EdgePartition:
    """The edges that this rank works on, and how the operation is divided."""

    graph: EdgeGraph
    """Graph of this rank's edges; its destinations are this rank's rows."""
    rows: Rows
    """Rows of every rank: under `channel`, and on one rank, all rows are everyone's."""
    edges: slice
    """This rank's among the edges of the batch."""
    plan: Plan | None = None
    """None on one rank."""

    @property
    def own_rows(self) -> slice:
        """Rows of the graph's destinations among the atoms of the batch."""
        return self.rows.own if self.plan == "edge" else slice(0, self.rows.bounds[-1])


class EdgeOperation:
    """The edge operation (message.py) with p, q, sums and weights sharded by channels, and r and f shared.

    vec is replicated. Which plan runs is the partition's affair, batch by batch: parameters lie alike in all.
    """

    def __init__(
        self, spec: EdgeSpec, fused: bool, backend: AggregationBackend, context: ParallelContext
    ) -> None:
        self.spec, self.fused, self.backend, self.context = spec, fused, backend, context
        self.ring: WeightRing | None = None
        self.index = 0
        self._channel = ChannelRunner(context)

    def join_ring(self, ring: WeightRing, index: int) -> None:
        """Take the weights of the plan `edge` from a ring of all layers."""
        self.ring, self.index = ring, index

    def __call__(
        self, p_NH: T, q_NH: T, r_E3: T, f_E: T | None, weights: EdgeWeights, partition: EdgePartition
    ) -> tuple[T, T | None]:
        """sum (N, M/tp) and vec (N, 3), Å, or None; see `models.egnn.edge.message`."""
        values: Any = (p_NH, q_NH, r_E3, f_E)
        graph = partition.graph
        if not isinstance(p_NH, Dual):
            if self._is_fused(p_NH):
                operation: Any = partial(edge_message, runner=self._runner(partition))
            else:
                operation = self._reference(partition)
            result: tuple[T, T | None] = operation(*values, weights, graph, self.spec)
            return result
        tangents: Any = tuple(None if x is None else x.tangent for x in values)
        values = tuple(None if x is None else x.value for x in values)
        if self._is_fused(p_NH.value):
            pair = edge_message_pair(values, tangents, weights, graph, self.spec, self._runner(partition))
        else:
            pair = pair_reference(values, tangents, weights, graph, self.spec, self._reference(partition))
        return _duals(pair)

    def _is_fused(self, p_NH: Tensor) -> bool:
        return self.fused and has_kernels(p_NH)

    def _runner(self, partition: EdgePartition) -> EdgeRunner:
        if partition.plan is None:
            return SERIAL
        if partition.plan == "channel":
            return self._channel
        assert self.ring is not None
        return RowsRunner(partition.rows, self.ring, self.index)

    def _reference(self, partition: EdgePartition) -> Callable[..., tuple[Any, Any]]:
        if partition.plan is None:
            return partial(edge_reference.edge_message, backend=self.backend)
        if partition.plan == "channel":
            return partial(channel_edge_message, backend=self.backend, context=self.context)
        return partial(rows_edge_message, backend=self.backend, rows=partition.rows)


def _duals(pair: EdgePair) -> tuple[Any, Any]:
    vectors = None
    if pair.vec_N3 is not None and pair.vec_tangent_N3 is not None:
        vectors = Dual(pair.vec_N3, pair.vec_tangent_N3)
    return Dual(pair.sum_NM, pair.sum_tangent_NM), vectors


def partition_edges(batch: dict[str, Tensor], context: ParallelContext, plan: Plan | None) -> EdgePartition:
    """All edges on every rank (`channel`, or one rank), or those of contiguous, balanced rows (`edge`)."""
    index, ptr = batch[keys.EDGE_INDEX], batch[keys.ROW_PTR]
    num_edges, num_rows = index.shape[1], len(ptr) - 1
    if plan != "edge":
        graph = edge_graph(batch)
        bounds = (0,) * context.tp_size + (num_rows,)
        return EdgePartition(graph, Rows(bounds, context), slice(0, num_edges), plan)
    own = edge_rows(batch, context)
    return EdgePartition(EdgeGraph(own.destination, own.source), own.rows, own.edges, plan)
