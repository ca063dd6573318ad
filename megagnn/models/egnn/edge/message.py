"""The blockwise edge operation: messages, their sum and the vector branch, with no tensor of E rows kept.

    a_e = p_i + q_j + W1c rho(d_e)        m_e = act(W2 act(a_e) + b2)       sum_i = sum_e f_e m_e
    w_e = w4 . act(W3 m_e + b3) + b4      vec_i = sum_e f_e w_e t(d_e) r_e

for edges e from j to i, sorted by i; with `bounded`, tanh(w_e) in place of w_e. Blocks of edges go through
the stages one after another and stay in the cache; the backward recomputes them (`memory = "recompute"`) or
reads c = W2 act(a) and g = W3 m kept by the forward (`"save"`). The derivation is in docs/kernels.md.
The runners of plan_channel.py and plan_rows.py divide it over ranks.
"""

from typing import Any, NamedTuple

from torch import Tensor

from megagnn.models.egnn.edge import autograd as edge_autograd
from megagnn.models.egnn.edge import reference as edge_reference
from megagnn.models.egnn.edge.runner import SERIAL, Call, EdgeRunner, has_kernels
from megagnn.models.egnn.edge.types import EdgeGraph, EdgeSpec, EdgeWeights
from megagnn.ops.lift import value_and_tangent


def edge_message(
    p_NH: Tensor,
    q_NH: Tensor,
    r_E3: Tensor,
    f_E: Tensor | None,
    weights: EdgeWeights,
    graph: EdgeGraph,
    spec: EdgeSpec,
    runner: EdgeRunner = SERIAL,
) -> tuple[Tensor, Tensor | None]:
    """sum (N, M) and vec (N, 3), Å (None without a vector branch), of the module's equations.

    Twice differentiable in every tensor but the centres. Runs the kernels, in float64 where p is, else in
    float32, or `edge_reference.edge_message` where there are none; types as in [Note: types].

    Args:
        p_NH: what the receiver adds to the hidden layer, its bias included.
        q_NH: what the sender adds.
        r_E3: x_j + shift - x_i, Å.
        f_E: envelope of each edge, or None for one.
        runner: who runs the passes; [Note: runners].

    Raises:
        RuntimeError: shapes or types that do not fit, with the names.
        ValueError: edges that are not sorted by destination; p or q without one row per atom.
    """
    if not has_kernels(p_NH):
        return edge_reference.edge_message(p_NH, q_NH, r_E3, f_E, weights, graph, spec)
    call = Call(graph, spec, False, (p_NH, q_NH, r_E3, f_E, *weights))
    sum_NM, vec_N3 = edge_autograd.apply(runner, call)
    assert sum_NM is not None
    return sum_NM, vec_N3


class EdgePair(NamedTuple):
    """Sums and vectors, and their tangents: (N, M), (N, 3), (N, M), (N, 3)."""

    sum_NM: Tensor
    vec_N3: Tensor | None
    sum_tangent_NM: Tensor
    vec_tangent_N3: Tensor | None


def edge_message_pair(
    values: tuple[Tensor, Tensor, Tensor, Tensor | None],
    tangents: tuple[Tensor, Tensor, Tensor, Tensor | None],
    weights: EdgeWeights,
    graph: EdgeGraph,
    spec: EdgeSpec,
    runner: EdgeRunner = SERIAL,
) -> EdgePair:
    """`edge_message` of (p, q, r, f) and its derivative along their tangents, in one pass.

    The weights have no tangents. Once differentiable: this is what a loss on forces needs (docs/kernels.md).
    Raises like `edge_message`, and ValueError for the tangent of an absent envelope.
    """
    if values[3] is None and tangents[3] is not None:
        raise ValueError(
            "edge_message_pair: an absent envelope has no tangent, got one; pass an envelope of ones with it"
        )
    if not has_kernels(values[0]):
        return pair_reference(values, tangents, weights, graph, spec)
    call = Call(graph, spec, True, (*values, *tangents, *weights))
    return EdgePair(*edge_autograd.apply(runner, call))  # type: ignore[arg-type]


def pair_reference(
    values: Any,
    tangents: Any,
    weights: EdgeWeights,
    graph: EdgeGraph,
    spec: EdgeSpec,
    operation: Any = edge_reference.edge_message,
) -> EdgePair:
    """`edge_message_pair` of plain operations, lifted by `ops.lift`.

    operation: has the arguments and results of `edge_reference.edge_message`.
    """
    results, along = value_and_tangent(lambda *x: operation(*x, weights, graph, spec), values, tangents)
    return EdgePair(*results, *along)
