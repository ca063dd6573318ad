"""One message-passing layer of the EGNN (docs/model.md), around the edge operation (edge/message.py).

    m_ij = phi_e(h_i, h_j, rho(d_ij))
    x_i <- x_i + 1/A sum_j f_ij r_ij/d_ij phi_x(m_ij)
    h_i <- h_i + phi_h(h_i, 1/A sum_j f_ij m_ij)

after Satorras, Hoogeboom, Welling, ICML 2021, eqs. 3-6. The first Linear of phi_e acts on a concatenation, so
it splits: its blocks for h_i and h_j are applied per atom and gathered, only the block of the distance
feature is applied per edge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megagnn.models.egnn.config import EGNNConfig
from megagnn.models.egnn.edge import EdgeSpec, EdgeWeights
from megagnn.models.egnn.edge.operation import EdgeOperation, EdgePartition
from megagnn.models.parts import DISTANCE_EPSILON, branch_rate, laws
from megagnn.models.radial import DistanceFeature
from megagnn.ops import dual, node
from megagnn.ops.backends import aggregation_backend
from megagnn.ops.dual import T
from megagnn.parallel.context import ParallelContext
from megagnn.tensor_parallel.layers import ColumnLinear, RMSNorm, RowLinear, gather_channels


@dataclass(frozen=True)
class Edges:
    """The edges of a batch as all layers share them."""

    partition: EdgePartition
    """Receiver i (edges are sorted by it) and sender j of this rank's edges."""
    shift_EC: Tensor | dual.Dual
    """Lattice translation of the sender, Å, (E, 3)."""
    centres_R: Tensor | None = None
    """Frequencies or centres of the distance features."""
    envelope_E: Tensor | dual.Dual | None = None
    """f_c of the input distance, (E,)."""

    degree_N1: Tensor | None = None
    """Neighbours of each atom, at least one, (N, 1)."""


def edge_vectors(x_NC: T, edges: Edges) -> T:
    """r_ij = x_j + shift_ij - x_i at coordinates x, Å: (N, 3) to (E, 3)."""
    graph, own = edges.partition.graph, edges.partition.own_rows
    return dual.edge_difference(x_NC[own], x_NC, edges.shift_EC, graph.destination, graph.source)


def edge_spec(config: EGNNConfig, feature: DistanceFeature, vector_branch: str) -> EdgeSpec:
    """The configured edge operation; only what moves coordinates is bounded, forces have no largest value."""
    return EdgeSpec(
        feature=config.distance_feature,
        direction=config.direction,
        activation=config.activation,
        bounded=config.coordinate_tanh and vector_branch == "coordinates",
        epsilon=DISTANCE_EPSILON,
        cutoff=config.cutoff,
        spread=feature.spread,
        memory=config.edge_memory,
        block_edges=config.edge_block,
    )


class Divisor(nn.Module):
    """Divides sums over neighbours by what `EGNNConfig.message_aggregation` says."""

    def __init__(self, kind: str, mean_neighbours: float) -> None:
        super().__init__()
        self.kind = kind
        self.scale = 1.0 / mean_neighbours if kind == "constant" else 1.0

    def forward(self, sum_NK: T, edges: Edges) -> tuple[T, float]:
        """The sum, divided where each atom has a divisor of its own, and a factor left to who reads it."""
        if self.kind == "mean":
            assert edges.degree_N1 is not None
            return sum_NK / edges.degree_N1, 1.0
        return sum_NK, self.scale


class Activation(nn.Module):
    """The non-linearity named in the configuration."""

    def __init__(self, config: EGNNConfig) -> None:
        super().__init__()
        self.kind = config.activation

    def forward(self, x: T) -> T:
        return dual.silu(x) if self.kind == "silu" else dual.relu(x)


def make_norm(
    config: EGNNConfig, context: ParallelContext, dtype: torch.dtype, rate: float = 1.0
) -> nn.Module:
    """The normalisation of node features named in the configuration."""
    return (
        RMSNorm(config.width, context, dtype, rate=rate) if config.normalisation == "rms" else nn.Identity()
    )


class FusedAtoms:
    """Where the atoms' products go through `ops.node`, and where through modules.

    With conservative forces `create_graph` differentiates gradients again: `ops.node` would run its chains
    for that, after its kernels. Forces alone, of a model that is frozen, and direct ones are served.
    """

    def __init__(self, config: EGNNConfig, context: ParallelContext) -> None:
        possible = config.activation == "silu" and context.tp_size == 1
        self.possible = possible and fuses_edges(config)
        self.conservative = config.forces == "conservative"

    def served(self, h_NF: Tensor | dual.Dual, weight: Tensor) -> Tensor | None:
        """The features, where it is for them, beside this weight."""
        twice = self.conservative and weight.requires_grad and torch.is_grad_enabled()
        if not self.possible or twice or not isinstance(h_NF, Tensor) or not node.has_kernels(h_NF):
            return None
        return h_NF


def fuses_edges(config: EGNNConfig) -> bool:
    """Whether edges go through the kernels, where there are any; else the reference runs, and chains."""
    return config.edge_operation == "fused" and config.aggregation_backend == "own"


def normed_linears(norm: nn.Module, h_NF: Tensor, linears: Sequence[ColumnLinear]) -> Any:
    """The Linears of the normed features, a tensor (N, ...) for each, fused."""
    gain_F, eps = (norm.gain_F, norm.eps) if isinstance(norm, RMSNorm) else (None, 0.0)
    return node.norm_linear(h_NF, gain_F, eps, [m.weight for m in linears], [m.bias for m in linears])


class EdgeMessage(nn.Module):
    """phi_e: Linear, activation, Linear, activation; the first Linear split into atom and edge blocks."""

    def __init__(
        self, config: EGNNConfig, num_features: int, context: ParallelContext, dtype: torch.dtype
    ) -> None:
        super().__init__()
        width, hidden = config.width, config.message_hidden or config.width
        rate, name = branch_rate(config), "model.message_hidden"
        at = laws(config, width, rate=rate)
        self.from_destination = ColumnLinear(width, hidden, context, at, dtype, name=name)
        self.from_source = ColumnLinear(width, hidden, context, at, dtype, bias=False, name=name)
        self.from_distance = ColumnLinear(
            num_features,
            hidden,
            context,
            laws(config, num_features, "input", rate=rate),
            dtype,
            bias=False,
            name=name,
        )
        message = config.message_width or width
        self.out = RowLinear(
            hidden,
            message,
            context,
            laws(config, hidden, rate=rate),
            dtype,
            names=(name, "model.message_width"),
        )


class EdgeVector(nn.Module):
    """phi in the sum over neighbours of f_ij u_ij phi(m_ij), which is the coordinate update (phi_x) or the
    direct force head (phi_f): Linear, activation, Linear(-> 1).
    """

    def __init__(self, config: EGNNConfig, context: ParallelContext, moves: bool, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.message_width or config.width
        hidden = config.coordinate_hidden or config.width
        last = laws(config, hidden, "output")
        if moves:  # the coordinate branch starts near zero
            # of PyTorch's laws Xavier's even one, gain 0.001, as published
            xavier = 0.001 * (6 * hidden / (hidden + 1)) ** 0.5
            scale = 0.3 if config.initialisation == "lecun" else xavier
            last = laws(config, hidden, "output", scale, zero_bias=True)
        names = ("model.message_width", "model.coordinate_hidden")
        self.hidden = RowLinear(width, hidden, context, laws(config, width), dtype, names=names)
        self.out = RowLinear(
            hidden, 1, context, last, dtype, bias=config.coordinate_bias, names=(names[1], names[1])
        )


class NodeUpdate(nn.Module):
    """phi_h of the concatenation [h ; messages]: Linear (split in two blocks), activation, Linear."""

    def __init__(self, config: EGNNConfig, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        width, message = config.width, config.message_width or config.width
        hidden, name = config.node_hidden or width, "model.node_hidden"
        rate = branch_rate(config)
        self.from_node = ColumnLinear(
            width, hidden, context, laws(config, width, rate=rate), dtype, name=name
        )
        self.from_messages = RowLinear(
            message,
            hidden,
            context,
            laws(config, message, rate=rate),
            dtype,
            bias=False,
            names=("model.message_width", name),
        )
        last = laws(config, hidden, rate=rate)
        self.out = RowLinear(hidden, width, context, last, dtype, names=(name, "model.width"))
        self.activation = Activation(config)

    def forward(self, h_NF: T, messages_NM: T) -> T:
        """h of all channels (shared), messages and the update sharded."""
        update_NF: T = self.out(self.activation(self.from_node(h_NF) + self.from_messages(messages_NM)))
        return update_NF

    def fused(self, u_NK: Tensor, messages: tuple[Any, float], h_NF: Any, scale: float) -> Any:
        """h (or None, for zero) + scale times the update, of tensors; u = from_node(normed h), and the
        messages' sums with the factor that belongs to them.
        """
        sum_NM, factor = messages
        side = (sum_NM, self.from_messages.weight, factor)
        return node.silu_linear(u_NK, self.out.weight, self.out.bias, side, h_NF, scale)


class EGNNLayer(nn.Module):
    """Messages, an optional coordinate update, an optional direct force head, and the node update.

    `vector_branch` says what the sum over f_ij u_ij phi(m_ij) is for: "coordinates" moves x, "forces" is
    returned, "none" leaves it out.
    """

    def __init__(
        self,
        config: EGNNConfig,
        feature: DistanceFeature,
        mean_neighbours: float,
        vector_branch: str,
        context: ParallelContext,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.context = context
        self.norm = make_norm(config, context, dtype, branch_rate(config))
        self.fused_atoms = FusedAtoms(config, context)
        backend = aggregation_backend(config.aggregation_backend)
        self.edge_operation = EdgeOperation(
            edge_spec(config, feature, vector_branch), fuses_edges(config), backend, context
        )
        self.message = EdgeMessage(config, feature.num_features, context, dtype)
        self.message_divisor = Divisor(config.message_aggregation, mean_neighbours)
        self.node_update = NodeUpdate(config, context, dtype)
        self.residual = config.residual
        # [Note: depth scaling] L updates of size 1/sqrt(L) add up to one; a coordinate update also moves the
        # geometry of every later layer, and only 1/L keeps the product of those L Jacobians bounded.
        depth = config.num_layers if config.depth_scaling else 1
        self.node_scale = depth**-0.5
        self.vector_branch = vector_branch
        if vector_branch != "none":
            self.vector = EdgeVector(config, context, vector_branch == "coordinates", dtype)
            self.vector_divisor = Divisor(config.coordinate_aggregation, mean_neighbours)
            moves = vector_branch == "coordinates"
            self.vector_scale = config.direction_sign * (1.0 / depth if moves else 1.0)

    def edge_weights(self, centres_R: Tensor | None = None) -> EdgeWeights:
        """Weights of the edge operation, this rank's slices."""
        message = self.message
        first = (centres_R, message.from_distance.weight, message.out.weight, message.out.bias)
        if self.vector_branch == "none":
            return EdgeWeights(*first)  # type: ignore[arg-type]
        hidden, out = self.vector.hidden, self.vector.out
        return EdgeWeights(*first, hidden.weight, hidden.bias, out.weight.squeeze(0), out.bias)  # type: ignore[arg-type]

    def sum_edges(self, p_NH: T, q_NH: T, r_EC: T, edges: Edges) -> tuple[tuple[T, float], T | None]:
        """Sums over neighbours: of messages (N, M), with what to multiply them by, and, with a vector branch,
        of vectors (N, 3).
        """
        f_E: T | None = edges.envelope_E  # type: ignore[assignment] # a Dual where r is one
        weights = self.edge_weights(edges.centres_R)
        sum_NM, vectors_NC = self.edge_operation(p_NH, q_NH, r_EC, f_E, weights, edges.partition)
        if vectors_NC is not None:
            vectors_NC, factor = self.vector_divisor(vectors_NC, edges)
            vectors_NC = vectors_NC * (factor * self.vector_scale)
        return self.message_divisor(sum_NM, edges), vectors_NC

    def forward(self, h_NF: T, x_NC: T, r_EC: T, edges: Edges) -> tuple[T, T, T | None]:
        """(h, x) -> (h, x, forces or None), shapes (N, F), (N, 3), (N, 3); r (E, 3) are the vectors of x."""
        before: T | None = h_NF if self.residual else None
        plain_NF = self.fused_atoms.served(h_NF, self.node_update.out.weight)
        if plain_NF is not None:
            first = (self.message.from_destination, self.message.from_source, self.node_update.from_node)
            p_NH, q_NH, u_NK = normed_linears(self.norm, plain_NF, first)
            messages, vectors_NC = self.sum_edges(p_NH, q_NH, r_EC, edges)
            h_NF = self.node_update.fused(u_NK, messages, before, self.node_scale)
        else:
            normed_NF = gather_channels(self.norm(h_NF), self.context)
            p_NH, q_NH = self.message.from_destination(normed_NF), self.message.from_source(normed_NF)
            (sum_NM, factor), vectors_NC = self.sum_edges(p_NH, q_NH, r_EC, edges)
            update_NF = self.node_update(normed_NF, sum_NM * factor) * self.node_scale
            h_NF = update_NF if before is None else before + update_NF
        if self.vector_branch == "coordinates" and vectors_NC is not None:
            return h_NF, x_NC + vectors_NC, None
        return h_NF, x_NC, vectors_NC
