"""One message-passing layer of the EGNN (docs/model.md), unfused: PyTorch around the segment sum.

    m_ij = phi_e(h_i, h_j, rho(d_ij))
    x_i <- x_i + 1/A sum_j f_ij r_ij/d_ij phi_x(m_ij)
    h_i <- h_i + phi_h(h_i, 1/A sum_j f_ij m_ij)

after Satorras, Hoogeboom, Welling, ICML 2021, eqs. 3-6. The first Linear of phi_e acts on a concatenation, so
it splits: its blocks for h_i and h_j are applied per atom and gathered, only the block of the distance
feature is applied per edge.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megagnn.config import ModelConfig
from megagnn.ops.activation import SiLU
from megagnn.models.radial import DistanceFeature
from megagnn.ops import Segments
from megagnn.ops.backends import OWN, AggregationBackend

# Added in quadrature to every distance, in Å: d = sqrt(|r|^2 + eps^2) has finite derivatives where two atoms
# coincide, and differs from |r| by 5e-7 Å at 1 Å.
DISTANCE_EPSILON = 1e-3


@dataclass(frozen=True)
class Edges:
    """What all layers share about the edges of a batch."""

    destination: Segments
    """Receiver i of every edge; edges are sorted by it."""
    source: Segments
    """Sender j of every edge."""
    shift_EC: Tensor
    """Lattice translation of the sender, Å, (E, 3)."""
    envelope_E1: Tensor | None = None
    """f_c of the input distance, (E, 1)."""
    backend: AggregationBackend = OWN
    """What gathers and sums."""


@dataclass(frozen=True)
class Geometry:
    """Vectors and distances of the edges at the current coordinates."""

    r_EC: Tensor
    """r_ij = x_j + shift_ij - x_i, Å, (E, 3)."""
    d_E: Tensor
    """sqrt(|r|^2 + eps^2), Å, (E,)."""
    feature_ER: Tensor
    """What phi_e sees of the distance, (E, R)."""


def edge_geometry(x_NC: Tensor, edges: Edges, feature: DistanceFeature) -> Geometry:
    """Geometry of the edges at coordinates x, (N, 3); every derivative is finite where two atoms coincide."""
    gather = edges.backend.gather
    r_EC = gather(x_NC, edges.source) + edges.shift_EC - gather(x_NC, edges.destination)
    squared_E = (r_EC * r_EC).sum(-1)
    d_E = torch.sqrt(squared_E + DISTANCE_EPSILON**2)
    return Geometry(r_EC, d_E, feature(d_E, squared_E))


class Aggregate(nn.Module):
    """Sum over each atom's neighbours, enveloped and divided as `ModelConfig.message_aggregation` says."""

    def __init__(self, kind: str, mean_neighbours: float) -> None:
        super().__init__()
        self.kind = kind
        self.scale = 1.0 / mean_neighbours if kind == "constant" else 1.0

    def forward(self, values_EK: Tensor, edges: Edges) -> Tensor:
        if edges.envelope_E1 is not None:
            values_EK = values_EK * edges.envelope_E1
        sum_NK = edges.backend.segment_sum(values_EK, edges.destination)
        if self.kind == "mean":
            degree_N1 = edges.destination.ptr.diff().clamp(min=1).unsqueeze(-1)
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
        self.activation = make_activation(config)

    def forward(self, h_NF: Tensor, feature_ER: Tensor, edges: Edges) -> Tensor:
        """Messages m_ij, (E, message_width)."""
        gather = edges.backend.gather
        a_EH = (
            gather(self.from_destination(h_NF), edges.destination)
            + gather(self.from_source(h_NF), edges.source)
            + self.from_distance(feature_ER)
        )
        m_EM: Tensor = self.activation(self.out(self.activation(a_EH)))
        return m_EM


class EdgeVector(nn.Module):
    """Sum over neighbours of f_ij u_ij phi(m_ij): the coordinate update (phi_x) and the direct force head
    (phi_f).

    phi = Linear, activation, Linear(-> 1); u_ij is the unit vector, the vector, or r/(d+1), with the
    configured sign.
    """

    def __init__(self, config: ModelConfig, aggregate: Aggregate, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.message_width or config.width
        hidden = config.coordinate_hidden or config.width
        self.direction, self.sign = config.direction, config.direction_sign
        self.hidden = nn.Linear(width, hidden, dtype=dtype)
        self.out = nn.Linear(hidden, 1, bias=config.coordinate_bias, dtype=dtype)
        self.activation = make_activation(config)
        self.bound: nn.Module = nn.Tanh() if config.coordinate_tanh else nn.Identity()
        self.aggregate = aggregate

    def forward(self, m_EM: Tensor, geometry: Geometry, edges: Edges) -> Tensor:
        """Vectors of the atoms, (N, 3)."""
        weight_E1 = self.bound(self.out(self.activation(self.hidden(m_EM))))
        if self.direction == "unit":
            weight_E1 = weight_E1 / geometry.d_E.unsqueeze(-1)
        elif self.direction == "plus_one":
            weight_E1 = weight_E1 / (geometry.d_E.unsqueeze(-1) + 1.0)
        vectors_NC: Tensor = self.aggregate(weight_E1 * geometry.r_EC, edges)
        return vectors_NC if self.sign == 1 else -vectors_NC


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
        num_features: int,
        mean_neighbours: float,
        vector_branch: str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.norm = make_norm(config, dtype)
        self.message = EdgeMessage(config, num_features, dtype)
        self.aggregate = Aggregate(config.message_aggregation, mean_neighbours)
        self.node_update = NodeUpdate(config, dtype)
        self.residual, self.published = config.residual, config.initialisation == "torch"
        # [Note: depth scaling] L updates of size 1/sqrt(L) add up to one; a coordinate update also moves the
        # geometry of every later layer, and only 1/L keeps the product of those L Jacobians bounded.
        depth = config.num_layers if config.depth_scaling else 1
        self.node_scale, self.coordinate_scale = depth**-0.5, 1.0 / depth
        self.vector_branch = vector_branch
        if vector_branch != "none":
            aggregate = Aggregate(config.coordinate_aggregation, mean_neighbours)
            self.vector = EdgeVector(config, aggregate, dtype)

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

    def forward(
        self, h_NF: Tensor, x_NC: Tensor, geometry: Geometry, edges: Edges
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(h, x) -> (h, x, forces or None), shapes (N, F), (N, 3), (N, 3); `geometry` is that of x."""
        normed_NF = self.norm(h_NF)
        m_EM = self.message(normed_NF, geometry.feature_ER, edges)
        vectors_NC = self.vector(m_EM, geometry, edges) if self.vector_branch != "none" else None
        update_NF = self.node_update(normed_NF, self.aggregate(m_EM, edges)) * self.node_scale
        h_NF = h_NF + update_NF if self.residual else update_NF
        if self.vector_branch == "coordinates" and vectors_NC is not None:
            return h_NF, x_NC + vectors_NC * self.coordinate_scale, None
        return h_NF, x_NC, vectors_NC
