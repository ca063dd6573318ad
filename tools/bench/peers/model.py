"""What the peers share: embedding, geometry, energy head, and the way to and from megagnn's weights.

A peer is the default EGNN of docs/model.md with the layer of another author. Its first Linear of phi_e and of
phi_h act on concatenations, so their weights are those of megagnn's split blocks side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megagnn.data import keys
from megagnn.models.egnn.config import EGNNConfig
from megagnn.models.egnn.model import EGNN
from megagnn.models.parts import DISTANCE_EPSILON
from megagnn.models.radial import envelope

# What the peers have been written for; everything else of the configuration is a size.
PARTS = {
    "distance_feature": "bessel",
    "envelope": True,
    "direction": "unit",
    "direction_sign": 1,
    "message_aggregation": "constant",
    "coordinate_aggregation": "constant",
    "activation": "silu",
    "normalisation": "rms",
    "residual": True,
    "message_hidden": None,
    "message_width": None,
    "coordinate_hidden": None,
    "node_hidden": None,
    "coordinate_bias": False,
    "coordinate_tanh": False,
}


@dataclass(frozen=True)
class Sizes:
    """Of one layer, and the constants of its function."""

    width: int
    """Channels of a node, F."""
    num_radial: int
    """Radial basis functions, R."""
    mean_neighbours: float
    """Divisor of the sums over neighbours."""
    node_scale: float
    """Factor of the node update."""
    vector_branch: str
    """"coordinates", "forces" or "none", as in megagnn.models.egnn.layer.EGNNLayer."""


def edge_mlp(sizes: Sizes) -> nn.Sequential:
    """phi_e on [h_i ; h_j ; rho]: Linear, SiLU, Linear, SiLU; (E, 2F + R) -> (E, F)."""
    width = sizes.width
    first = nn.Linear(2 * width + sizes.num_radial, width)
    return nn.Sequential(first, nn.SiLU(), nn.Linear(width, width), nn.SiLU())


def vector_mlp(sizes: Sizes) -> nn.Sequential:
    """phi_x, or phi_f of the force head: Linear, SiLU, Linear(-> 1); (E, F) -> (E, 1)."""
    width = sizes.width
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1, bias=False))


def node_mlp(sizes: Sizes) -> nn.Sequential:
    """phi_h on [h_i ; messages]: Linear, SiLU, Linear; (N, 2F) -> (N, F)."""
    width = sizes.width
    return nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))


class BesselBasis(nn.Module):
    """sin(n pi s) / s with s = d / cutoff, n = 1..R; (E,) -> (E, R)."""

    frequencies: Tensor

    def __init__(self, num_radial: int, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        frequencies = torch.arange(1, num_radial + 1, dtype=torch.float64) * (math.pi / cutoff)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, d: Tensor) -> Tensor:
        """See the class."""
        d = d.unsqueeze(-1)
        return torch.sin(d * self.frequencies) * (self.cutoff / d)


Layer = Callable[[Sizes], nn.Module]
"""Makes a layer (h (N, F), r (E, 3), d (E, 1), rho (E, R), f (E, 1), edge_index (2, E)) -> (h, vectors
(N, 3) or None)."""


class PeerEGNN(nn.Module):
    """Energy (B,) float64 in units of the output scale, and with `forces = "direct"` forces (N, 3).

    Made from one of megagnn's models, with its sizes and a copy of its weights. Raises ValueError where the
    model has parts that the peers were not written for.
    """

    def __init__(self, ours: EGNN, layer: Layer) -> None:
        super().__init__()
        check_parts(ours.config)
        self.config, self.statistics = ours.config, ours.statistics
        self.element_index = ours.element_index
        self.basis = BesselBasis(ours.config.num_radial, ours.config.cutoff)
        width, depth = ours.config.width, ours.config.num_layers
        self.coordinate_scale = 1.0 / depth if ours.config.depth_scaling else 1.0
        node_scale = depth**-0.5 if ours.config.depth_scaling else 1.0
        self.branches = [ours.layers[k].vector_branch for k in range(depth)]  # type: ignore[index]
        radial, neighbours = ours.config.num_radial, ours.statistics.mean_neighbours
        sizes = [Sizes(width, radial, neighbours, node_scale, branch) for branch in self.branches]
        self.embedding = nn.Embedding(len(ours.statistics.elements), width)
        self.layers = nn.ModuleList(layer(size) for size in sizes)
        self.head = nn.Sequential(
            nn.RMSNorm(width, eps=1e-6), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )
        self.to(ours.precision.parameters)
        self.load_state_dict(concatenated(dict(ours.named_parameters())))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """See the class; `batch` as in megagnn.data.keys."""
        edge_index, x = batch[keys.EDGE_INDEX], batch[keys.POSITIONS]
        shifts = self.shifts(batch)
        h = self.embedding(self.element_index[batch[keys.ATOMIC_NUMBERS]])
        r, d, rho = self.geometry(x, edge_index, shifts)
        f = envelope(d.squeeze(-1), self.config.cutoff).unsqueeze(-1)
        vectors = None
        for layer, branch in zip(self.layers, self.branches, strict=True):
            h, vectors = layer(h, r, d, rho, f, edge_index)
            if branch == "coordinates":
                x = x + vectors * self.coordinate_scale
                r, d, rho = self.geometry(x, edge_index, shifts)
        scale = self.statistics.output_scale
        atoms = self.head(h).squeeze(-1).double() * scale
        energy = atoms.new_zeros(len(batch[keys.NUM_ATOMS])).index_add(0, batch[keys.BATCH], atoms)
        outputs = {keys.ENERGY: energy}
        if vectors is not None and self.branches[-1] == "forces":
            outputs[keys.FORCES] = vectors * scale
        return outputs

    def shifts(self, batch: dict[str, Tensor]) -> Tensor:
        """Lattice translations of the senders, Å, (E, 3)."""
        cells = batch[keys.CELL].index_select(0, batch[keys.BATCH].index_select(0, batch[keys.EDGE_INDEX][0]))
        return torch.bmm(batch[keys.CELL_SHIFTS].unsqueeze(1), cells).squeeze(1)

    def geometry(self, x: Tensor, edge_index: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """r (E, 3), d (E, 1) and the radial basis (E, R) of coordinates (N, 3)."""
        r = x.index_select(0, edge_index[1]) + shifts - x.index_select(0, edge_index[0])
        d = (r.square().sum(-1) + DISTANCE_EPSILON**2).sqrt()
        return r, d.unsqueeze(-1), self.basis(d)


def check_parts(config: EGNNConfig) -> None:
    """Raises ValueError unless the configuration differs from the default in sizes only."""
    for name, wanted in PARTS.items():
        if getattr(config, name) != wanted:
            raise ValueError(
                f"peers: model.{name} must be {wanted!r}, got {getattr(config, name)!r}; the peers are "
                "written for the default model"
            )


def concatenated(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """megagnn's parameters (or their gradients) by name, as the peers name and lay them out."""
    names = {
        "element_embedding.weight": "embedding.weight",
        "energy_head.norm.gain_F": "head.0.weight",
        "energy_head.hidden": "head.1",
        "energy_head.out": "head.3",
        "norm.gain_F": "norm.weight",
        "message.out": "edge_mlp.2",
        "vector.hidden": "vector_mlp.0",
        "vector.out": "vector_mlp.2",
        "node_update.out": "node_mlp.2",
        "message.from_destination.bias": "edge_mlp.0.bias",
        "node_update.from_node.bias": "node_mlp.0.bias",
    }
    blocks = {
        "edge_mlp.0.weight": [f"message.from_{x}.weight" for x in ("destination", "source", "distance")],
        "node_mlp.0.weight": [f"node_update.from_{x}.weight" for x in ("node", "messages")],
    }
    out = {}
    for name, tensor in ours.items():
        prefix = ".".join(name.split(".")[:2]) + "." if name.startswith("layers.") else ""
        rest = name.removeprefix(prefix)
        for joined, parts in blocks.items():
            if rest == parts[0]:
                out[prefix + joined] = torch.cat([ours[prefix + part] for part in parts], dim=1)
        for mine, theirs in names.items():
            if rest == mine or rest.startswith(mine + "."):
                out[prefix + theirs + rest.removeprefix(mine)] = tensor
                break
    return {name: tensor.detach().clone() for name, tensor in out.items()}
