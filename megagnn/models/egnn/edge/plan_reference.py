"""Both plans in plain PyTorch and collectives that autograd sees: the unfused path, the runners' reference.

Arguments and results as `reference.edge_message`; who holds what as in the runners.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megagnn.models.egnn.edge import reference as edge_reference
from megagnn.models.egnn.edge.plan_rows import WEIGHT_DIMS
from megagnn.models.egnn.edge.types import EdgeGraph, EdgeSpec, EdgeWeights
from megagnn.ops.backends import AggregationBackend
from megagnn.parallel import collectives
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.row_collectives import Rows
from megagnn.tensor_parallel.edge_plan import by_rows


def channel_edge_message(
    p_NH: Tensor,
    q_NH: Tensor,
    r_E3: Tensor,
    f_E: Tensor | None,
    weights: EdgeWeights,
    graph: EdgeGraph,
    spec: EdgeSpec,
    backend: AggregationBackend | None,
    context: ParallelContext,
) -> tuple[Tensor, Tensor | None]:
    """The plan `channel`."""
    take, add = edge_reference.aggregation(backend)
    act = edge_reference.activation(spec)
    a_EH, d_E = edge_reference.before(p_NH, q_NH, r_E3, weights, graph, spec, take)
    c_EM = collectives.reduce_scatter(act(a_EH) @ weights.w2_MH.t(), -1, context)
    m_EM = act(c_EM if weights.b2_M is None else c_EM + weights.b2_M)
    sum_NM = add(edge_reference.enveloped(m_EM, f_E), graph.destination)
    if weights.w3_KM is None:
        return sum_NM, None
    assert weights.w4_K is not None
    g_EK = collectives.reduce_scatter(m_EM @ weights.w3_KM.t(), -1, context)
    u_EK = act(g_EK if weights.b3_K is None else g_EK + weights.b3_K)
    w_E = collectives.reduce((u_EK @ weights.w4_K).to(r_E3.dtype), context)
    if weights.b4_1 is not None:
        w_E = w_E + weights.b4_1
    # From here on every rank does the same, and it counts once.
    r_E3, d_E = collectives.unshare(r_E3, context), collectives.unshare(d_E, context)
    f_E = None if f_E is None else collectives.unshare(f_E, context)
    return sum_NM, add(edge_reference.vectors(w_E, r_E3, d_E, f_E, spec), graph.destination)


def rows_edge_message(
    p_NH: Tensor,
    q_NH: Tensor,
    r_E3: Tensor,
    f_E: Tensor | None,
    weights: EdgeWeights,
    graph: EdgeGraph,
    spec: EdgeSpec,
    backend: AggregationBackend | None,
    rows: Rows,
) -> tuple[Tensor, Tensor | None]:
    """The plan `edge`."""

    def of_rows(p_NH: Tensor, q_NH: Tensor, *whole: Any) -> tuple[Tensor, Tensor | None]:
        return edge_reference.edge_message(p_NH, q_NH, r_E3, f_E, EdgeWeights(*whole), graph, spec, backend)

    divided = list(zip(weights, WEIGHT_DIMS, strict=True))
    sum_NM, vec_N3 = by_rows(of_rows, rows, [p_NH], [q_NH], divided, replicated={1})
    return sum_NM, vec_N3
