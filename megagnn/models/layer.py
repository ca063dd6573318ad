"""One message-passing layer of the EGNN (docs/model.md), around the operation of megagnn/ops/edge_message.py.

    m_ij = phi_e(h_i, h_j, rho(d_ij))
    x_i <- x_i + 1/A sum_j f_ij r_ij/d_ij phi_x(m_ij)
    h_i <- h_i + phi_h(h_i, 1/A sum_j f_ij m_ij)

after Satorras, Hoogeboom, Welling, ICML 2021, eqs. 3-6. The first Linear of phi_e acts on a concatenation, so
it splits: its blocks for h_i and h_j are applied per atom and gathered, only the block of the distance
feature is applied per edge.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megagnn.config import ModelConfig
from megagnn.models.radial import DistanceFeature
from megagnn.ops import EdgeGraph, EdgeSpec, EdgeWeights, edge_message, edge_reference, gather
from megagnn.ops.activation import SiLU
from megagnn.ops.backends import AggregationBackend, aggregation_backend

# Added in quadrature to every distance, in Å: d = sqrt(|r|^2 + eps^2) has finite derivatives where two atoms
# coincide, and differs from |r| by 5e-7 Å at 1 Å.
DISTANCE_EPSILON = 1e-3


@dataclass(frozen=True)
class Edges:
    """What all layers share about the edges of a batch."""

    graph: EdgeGraph
    """Receiver i (edges are sorted by it) and sender j of every edge."""
    shift_EC: Tensor
    """Lattice translation of the sender, Å, (E, 3)."""
    centres_R: Tensor | None = None
    """Frequencies or centres of the distance features."""
    envelope_E: Tensor | None = None
    """f_c of the input distance, (E,)."""
    backend: AggregationBackend = field(default_factory=lambda: aggregation_backend("own"))
    """What gathers and sums in the unfused path."""


def edge_vectors(x_NC: Tensor, edges: Edges) -> Tensor:
    """r_ij = x_j + shift_ij - x_i at coordinates x, Å: (N, 3) to (E, 3)."""
    return gather(x_NC, edges.graph.source) + edges.shift_EC - gather(x_NC, edges.graph.destination)


def edge_distances(r_EC: Tensor) -> Tensor:
    """sqrt(|r|^2 + eps^2), Å: (E, 3) to (E,); every derivative is finite where two atoms coincide."""
    return torch.sqrt((r_EC * r_EC).sum(-1) + DISTANCE_EPSILON**2)


def edge_spec(config: ModelConfig, feature: DistanceFeature) -> EdgeSpec:
    """The configured edge operation."""
    return EdgeSpec(
        feature=config.distance_feature,
        direction=config.direction,
        activation=config.activation,
        bounded=config.coordinate_tanh,
        epsilon=DISTANCE_EPSILON,
        cutoff=config.cutoff,
        spread=feature.spread,
        memory=config.edge_memory,
        block_edges=config.edge_block,
    )


class Divisor(nn.Module):
    """Divides sums over neighbours by what `ModelConfig.message_aggregation` says."""

    def __init__(self, kind: str, mean_neighbours: float) -> None:
        super().__init__()
        self.kind = kind
        self.scale = 1.0 / mean_neighbours if kind == "constant" else 1.0

    def forward(self, sum_NK: Tensor, edges: Edges) -> Tensor:
        if self.kind == "mean":
            degree_N1 = edges.graph.destination.ptr.diff().clamp(min=1).unsqueeze(-1)
            return sum_NK / degree_N1
        return sum_NK * self.scale


class RMSNorm(nn.Module):
    """h / sqrt(mean(h^2) + eps) times a gain per channel (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, width: int, dtype: torch.dtype, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gain_F = nn.Parameter(torch.ones(width, dtype=dtype))

    def forward(self, h_NF: Tensor) -> Tensor:
        return h_NF * torch.rsqrt(h_NF.square().mean(-1, keepdim=True) + self.eps) * self.gain_F


def make_activation(config: ModelConfig) -> nn.Module:
    """The non-linearity named in the configuration."""
    return SiLU() if config.activation == "silu" else nn.ReLU()


def make_norm(config: ModelConfig, dtype: torch.dtype) -> nn.Module:
    """The normalisation of node features named in the configuration."""
    return RMSNorm(config.width, dtype) if config.normalisation == "rms" else nn.Identity()


class EdgeMessage(nn.Module):
    """phi_e: Linear, activation, Linear, activation; the first Linear split into atom and edge blocks."""

    def __init__(self, config: ModelConfig, num_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        hidden = config.message_hidden or config.width
        self.from_destination = nn.Linear(config.width, hidden, dtype=dtype)
        self.from_source = nn.Linear(config.width, hidden, bias=False, dtype=dtype)
        self.from_distance = nn.Linear(num_features, hidden, bias=False, dtype=dtype)
        self.out = nn.Linear(hidden, config.message_width or config.width, dtype=dtype)


class EdgeVector(nn.Module):
    """phi in the sum over neighbours of f_ij u_ij phi(m_ij), which is the coordinate update (phi_x) or the
    direct force head (phi_f): Linear, activation, Linear(-> 1).
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.message_width or config.width
        hidden = config.coordinate_hidden or config.width
        self.hidden = nn.Linear(width, hidden, dtype=dtype)
        self.out = nn.Linear(hidden, 1, bias=config.coordinate_bias, dtype=dtype)


class NodeUpdate(nn.Module):
    """phi_h of the concatenation [h ; messages]: Linear (split in two blocks), activation, Linear."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        hidden = config.node_hidden or config.width
        self.from_node = nn.Linear(config.width, hidden, dtype=dtype)
        self.from_messages = nn.Linear(config.message_width or config.width, hidden, bias=False, dtype=dtype)
        self.out = nn.Linear(hidden, config.width, dtype=dtype)
        self.activation = make_activation(config)

    def forward(self, h_NF: Tensor, messages_NM: Tensor) -> Tensor:
        update_NF: Tensor = self.out(self.activation(self.from_node(h_NF) + self.from_messages(messages_NM)))
        return update_NF


class EGNNLayer(nn.Module):
    """Messages, an optional coordinate update, an optional direct force head, and the node update.

    `vector_branch` says what the sum over f_ij u_ij phi(m_ij) is for: "coordinates" moves x, "forces" is
    returned, "none" leaves it out.
    """

    def __init__(
        self,
        config: ModelConfig,
        feature: DistanceFeature,
        mean_neighbours: float,
        vector_branch: str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.norm = make_norm(config, dtype)
        self.spec = edge_spec(config, feature)
        self.fused = config.edge_operation == "fused" and config.aggregation_backend == "own"
        self.message = EdgeMessage(config, feature.num_features, dtype)
        self.message_divisor = Divisor(config.message_aggregation, mean_neighbours)
        self.node_update = NodeUpdate(config, dtype)
        self.residual, self.published = config.residual, config.initialisation == "torch"
        # [Note: depth scaling] L updates of size 1/sqrt(L) add up to one; a coordinate update also moves the
        # geometry of every later layer, and only 1/L keeps the product of those L Jacobians bounded.
        depth = config.num_layers if config.depth_scaling else 1
        self.node_scale, self.coordinate_scale = depth**-0.5, 1.0 / depth
        self.vector_branch = vector_branch
        if vector_branch != "none":
            self.vector = EdgeVector(config, dtype)
            self.vector_divisor = Divisor(config.coordinate_aggregation, mean_neighbours)
            self.vector_scale = config.direction_sign

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The coordinate branch starts near zero."""
        if self.vector_branch != "coordinates":
            return
        if self.published:
            nn.init.xavier_uniform_(self.vector.out.weight, gain=0.001)
        else:
            self.vector.out.weight.mul_(0.3)
        if self.vector.out.bias is not None:
            self.vector.out.bias.zero_()

    def edge_weights(self, edges: Edges) -> EdgeWeights:
        """Weights of the edge operation."""
        message = self.message
        first = (edges.centres_R, message.from_distance.weight, message.out.weight, message.out.bias)
        if self.vector_branch == "none":
            return EdgeWeights(*first)
        hidden, out = self.vector.hidden, self.vector.out
        return EdgeWeights(*first, hidden.weight, hidden.bias, out.weight.squeeze(0), out.bias)

    def sum_edges(self, h_NF: Tensor, r_EC: Tensor, edges: Edges) -> tuple[Tensor, Tensor | None]:
        """Sums over neighbours, divided: of messages (N, M) and, with a vector branch, of vectors (N, 3)."""
        p_NH = self.message.from_destination(h_NF)
        q_NH = self.message.from_source(h_NF)
        inputs = (p_NH, q_NH, r_EC, edges.envelope_E, self.edge_weights(edges), edges.graph, self.spec)
        if self.fused:
            sum_NM, vectors_NC = edge_message(*inputs)
        else:
            sum_NM, vectors_NC = edge_reference.edge_message(*inputs, edges.backend)
        if vectors_NC is not None:
            vectors_NC = self.vector_divisor(vectors_NC * self.vector_scale, edges)
        return self.message_divisor(sum_NM, edges), vectors_NC

    def forward(
        self, h_NF: Tensor, x_NC: Tensor, r_EC: Tensor, edges: Edges
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(h, x) -> (h, x, forces or None), shapes (N, F), (N, 3), (N, 3); r (E, 3) are the vectors of x."""
        normed_NF = self.norm(h_NF)
        messages_NM, vectors_NC = self.sum_edges(normed_NF, r_EC, edges)
        update_NF = self.node_update(normed_NF, messages_NM) * self.node_scale
        h_NF = h_NF + update_NF if self.residual else update_NF
        if self.vector_branch == "coordinates" and vectors_NC is not None:
            return h_NF, x_NC + vectors_NC * self.coordinate_scale, None
        return h_NF, x_NC, vectors_NC
