"""The edge operation in plain PyTorch: what the kernels are tested against, and the unfused path.

For one process, and for both plans of tensor parallelism by collectives that autograd sees.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megagnn.models.egnn.edge.plan_rows import WEIGHT_DIMS
from megagnn.models.egnn.edge.types import EdgeGraph, EdgeSpec, EdgeWeights
from megagnn.models.radial import distance_features
from megagnn.ops.activation import silu
from megagnn.ops.backends import AggregationBackend
from megagnn.ops.segment import Segments, gather, segment_sum
from megagnn.parallel import collectives
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.row_collectives import Rows
from megagnn.tensor_parallel.edge_plan import by_rows

Gather = Callable[[Tensor, Segments], Tensor]


def aggregation(backend: AggregationBackend | None) -> tuple[Gather, Gather]:
    """The functions that gather and sum: a back end's, or the own kernels."""
    return (gather, segment_sum) if backend is None else (backend.gather, backend.segment_sum)


def activation(spec: EdgeSpec) -> Callable[[Tensor], Tensor]:
    """The non-linearity."""
    return silu if spec.activation == "silu" else functional.relu


def before(
    p_NH: Tensor,
    q_NH: Tensor,
    r_E3: Tensor,
    weights: EdgeWeights,
    graph: EdgeGraph,
    spec: EdgeSpec,
    take: Gather,
) -> tuple[Tensor, Tensor]:
    """The first pre-activation a (E, H), and the distances d (E,)."""
    squared_E = (r_E3 * r_E3).sum(-1)
    d_E = torch.sqrt(squared_E + spec.epsilon**2)
    rho_ER = distance_features(spec.feature, d_E, squared_E, weights.centres_R, spec.cutoff, spec.spread)
    rho_ER = rho_ER.to(p_NH.dtype)
    return take(p_NH, graph.destination) + take(q_NH, graph.source) + rho_ER @ weights.w1c_HR.t(), d_E


def enveloped(m_EM: Tensor, f_E: Tensor | None) -> Tensor:
    """f m, (E, M), in the type of m."""
    return m_EM if f_E is None else m_EM * f_E.to(m_EM.dtype).unsqueeze(-1)


def vectors(w_E: Tensor, r_E3: Tensor, d_E: Tensor, f_E: Tensor | None, spec: EdgeSpec) -> Tensor:
    """f tanh?(w) t(d) r, (E, 3), in the type of r."""
    w_E = w_E.to(r_E3.dtype)
    if spec.bounded:
        w_E = torch.tanh(w_E)
    if spec.direction == "unit":
        w_E = w_E / d_E
    elif spec.direction == "plus_one":
        w_E = w_E / (d_E + 1.0)
    if f_E is not None:
        w_E = w_E * f_E
    return w_E.unsqueeze(-1) * r_E3


def edge_message(
    p_NH: Tensor,
    q_NH: Tensor,
    r_E3: Tensor,
    f_E: Tensor | None,
    weights: EdgeWeights,
    graph: EdgeGraph,
    spec: EdgeSpec,
    backend: AggregationBackend | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `message.edge_message`; every intermediate is a tensor of E rows, kept for the backward.

    Args:
        backend: what gathers and sums, if not the own kernels.
    """
    take, add = aggregation(backend)
    act = activation(spec)
    a_EH, d_E = before(p_NH, q_NH, r_E3, weights, graph, spec, take)
    m_EM = act(functional.linear(act(a_EH), weights.w2_MH, weights.b2_M))
    sum_NM = add(enveloped(m_EM, f_E), graph.destination)
    if weights.w3_KM is None:
        return sum_NM, None
    assert weights.w4_K is not None
    u_EK = act(functional.linear(m_EM, weights.w3_KM, weights.b3_K))
    w_E = functional.linear(u_EK, weights.w4_K.unsqueeze(0), weights.b4_1).squeeze(-1)
    return sum_NM, add(vectors(w_E, r_E3, d_E, f_E, spec), graph.destination)


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
    take, add = aggregation(backend)
    act = activation(spec)
    a_EH, d_E = before(p_NH, q_NH, r_E3, weights, graph, spec, take)
    c_EM = collectives.reduce_scatter(act(a_EH) @ weights.w2_MH.t(), -1, context)
    m_EM = act(c_EM if weights.b2_M is None else c_EM + weights.b2_M)
    sum_NM = add(enveloped(m_EM, f_E), graph.destination)
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
    return sum_NM, add(vectors(w_E, r_E3, d_E, f_E, spec), graph.destination)


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
        return edge_message(p_NH, q_NH, r_E3, f_E, EdgeWeights(*whole), graph, spec, backend)

    divided = list(zip(weights, WEIGHT_DIMS, strict=True))
    sum_NM, vec_N3 = by_rows(of_rows, rows, [p_NH], [q_NH], divided, replicated={1})
    return sum_NM, vec_N3
