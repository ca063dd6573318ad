"""One layer of each implementation, for bench/edge_message.py: forward, backward, derivative of its forces.

The layer includes the geometry of its edges and, of the atoms, its norm and phi_h, which are a fortieth of
the products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megagnn.data import keys
from megagnn.models.egnn.config import EGNNConfig
from megagnn.models.egnn.layer import edge_vectors
from megagnn.models.egnn.model import EGNN
from megagnn.models.parts import edge_distances
from megagnn.models.potential import build_potential
from megagnn.models.radial import envelope
from tools.bench.peers.model import PeerEGNN, concatenated
from tools.bench.work import edge as edge_workload
from tools.bench.work.edge import MEMORY, NUM_RADIAL, Batch, peer_layers, statistics

PARTS = ("forward", "backward", "force gradient")
# Products of edge rows in units of a forward, see edge_workload.UNITS.
UNITS = {
    "forward": dict.fromkeys(edge_workload.UNITS["direct"], 1),
    "backward": edge_workload.UNITS["direct"],
    "force gradient": edge_workload.UNITS["create_graph"],
}

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class LayerWork:
    """The first layer of a model as a function of h (N, F) and x (N, 3), with fixed cotangents."""

    def __init__(self, model: nn.Module, evaluate: Evaluate, batch: Batch, width: int) -> None:
        generator = torch.Generator().manual_seed(0)
        num_atoms = len(batch[keys.POSITIONS])
        self.h = torch.randn(num_atoms, width, generator=generator).requires_grad_()
        self.x = batch[keys.POSITIONS].detach().clone().requires_grad_()
        self.bars = [torch.randn(num_atoms, n, generator=generator) for n in (width, 3, 3)]
        self.model, self.evaluate = model, evaluate
        named = [(name, p) for name, p in model.named_parameters() if name.startswith("layers.0.")]
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]

    def work(self, part: str) -> Callable[[], Any]:
        """The function to time; returns tensors in the peers' layout, the same for all implementations."""
        return {"forward": self.forward, "backward": self.backward, "force gradient": self.force_gradient}[
            part
        ]

    @torch.no_grad()
    def forward(self) -> list[Tensor]:
        """h and x after the layer."""
        return list(self.evaluate(self.h, self.x))

    def backward(self) -> list[Tensor]:
        """Forward, and gradients of h, x and the weights."""
        return self._gradients(self._scalar(), [self.h, self.x])

    def force_gradient(self) -> list[Tensor]:
        """Forward, the derivative g with respect to x, and the gradients of g . w."""
        (g,) = torch.autograd.grad(self._scalar(), self.x, create_graph=True)
        return self._gradients((g * self.bars[2]).sum(), [self.h, self.x])

    def _scalar(self) -> Tensor:
        h, x = self.evaluate(self.h, self.x)
        return (h * self.bars[0]).sum() + (x * self.bars[1]).sum()

    def _gradients(self, scalar: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        grads = torch.autograd.grad(scalar, [*inputs, *self.parameters], materialize_grads=True)
        weights = dict(zip(self.names, grads[len(inputs) :], strict=True))
        if isinstance(self.model, EGNN):
            weights = concatenated(weights)
        return [*grads[: len(inputs)], *(weights[name] for name in sorted(weights))]


def make_layer(name: str, batch: Batch, config: EGNNConfig) -> LayerWork | None:
    """The layer of an implementation, all with the same weights; None where it is not installed."""
    memory, _ = edge_workload.variant(name)
    if memory in MEMORY:
        config = dataclasses.replace(config, **MEMORY[memory])
        model = build_potential(config, statistics()).model
        return LayerWork(model, _ours(model, batch), batch, config.width)
    layer = peer_layers()[name]
    if layer is None:
        return None
    peer = PeerEGNN(build_potential(config, statistics()).model, layer)
    return LayerWork(peer, _peers(peer, batch), batch, config.width)


def _ours(model: EGNN, batch: Batch) -> Evaluate:
    edges = model.graph(batch)
    layer = next(iter(model.layers))

    def evaluate(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        r = edge_vectors(x, edges)
        f = envelope(edge_distances(r), model.config.cutoff)
        return layer(h, x, r, dataclasses.replace(edges, envelope_E=f))[:2]

    return evaluate


def _peers(model: PeerEGNN, batch: Batch) -> Evaluate:
    edge_index, shifts = batch[keys.EDGE_INDEX], model.shifts(batch)

    def evaluate(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        r, d, rho = model.geometry(x, edge_index, shifts)
        f = envelope(d.squeeze(-1), model.config.cutoff).unsqueeze(-1)
        h, vectors = model.layers[0](h, r, d, rho, f, edge_index)
        return h, x + vectors * model.coordinate_scale

    return evaluate


def flops(name: str, part: str, width: int, num_atoms: int, num_edges: int) -> float:
    """The matrix products of a part, multiply-adds counted as 2: what this formulation takes."""
    ours = name.startswith("megagnn")
    square = width * width
    edges = NUM_RADIAL * width + (2 if ours else 4) * square + width
    atoms = (5 if ours else 3) * square
    edge_units, atom_units = UNITS[part][edge_workload.variant(name)[0]], UNITS[part]["plain"]
    again = 0.0
    if part != "forward":
        forces = "direct" if part == "backward" else "conservative"
        again = edge_workload.radial_again(f"{name} create_graph", forces, width, num_edges, 1)
    return 2.0 * (edge_units * edges * num_edges + atom_units * atoms * num_atoms) + again
