"""The work of bench/edge_message.py: batches of dense matter, models, training steps, their arithmetic."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megagnn.data import keys
from megagnn.data.batch import build_graph, collate
from megagnn.models.egnn.config import EGNNConfig
from megagnn.models.egnn.model import EGNN
from megagnn.models.potential import Potential, build_potential
from megagnn.models.statistics import Statistics
from megagnn.objective.config import LossConfig
from megagnn.objective.gradient_methods import GRADIENT_METHODS
from megagnn.objective.loss import Loss, label_counts
from megagnn.optim.config import OptimConfig
from megagnn.optim.optimizer import make_optimizer
from megagnn.parallel.context import ParallelContext
from tools.bench import harness
from tools.bench.peers.model import PeerEGNN, concatenated
from tools.bench.peers.usual import UsualLayer, index_add, torch_scatter_sum

NEIGHBOURS = 30
DEPTH, NUM_RADIAL = 3, 16
ELEMENTS = (13, 29)
_ATOMS = 256  # of one structure: 4 x 4 x 4 cubic cells of a face-centred lattice
_DENSITY = 0.06  # atoms per Å^3, that of aluminium

Batch = dict[str, Tensor]


def dense_batch(num_edges: int, seed: int = 0, neighbours: int = NEIGHBOURS) -> tuple[Batch, float]:
    """A batch of periodic, liquid-like metal with `num_edges` edges to within 2 %, and the cutoff in Å.

    Structures of about 256 atoms off a face-centred lattice by 0.35 Å, N = num_edges / neighbours atoms in
    all. The cutoff is the one that gives so many edges, the same for all. Labels are random.
    """
    graphs, cutoff = dense_graphs(num_edges, seed, neighbours=neighbours)
    return collate(graphs), cutoff


def dense_graphs(
    num_edges: int, seed: int = 0, num_structures: int | None = None, neighbours: int = NEIGHBOURS
) -> tuple[list[dict[str, Any]], float]:
    """The structures of `dense_batch`, or, with the same number of edges in all, so many of equal size."""
    rng = np.random.default_rng(seed)
    num_atoms = round(num_edges / neighbours)
    num_structures = num_structures or max(1, round(num_atoms / _ATOMS))
    sizes = np.diff(np.linspace(0, num_atoms, num_structures + 1).round().astype(int))
    structures = [_liquid(int(size), rng) for size in sizes]
    low, high = 3.0, 8.0
    while True:
        cutoff = 0.5 * (low + high)
        graphs = [build_graph(*structure, cutoff) for structure in structures]
        found = sum(graph[keys.EDGE_INDEX].shape[1] for graph in graphs)
        if abs(found - num_edges) <= 0.02 * num_edges or high - low < 1e-3:
            break
        low, high = (cutoff, high) if found < num_edges else (low, cutoff)
    for graph in graphs:
        n = len(graph[keys.ATOMIC_NUMBERS])
        graph.update({keys.ENERGY: float(rng.normal(scale=n**0.5)), keys.FORCES: rng.normal(size=(n, 3))})
    return graphs, cutoff


def _liquid(size: int, rng: np.random.Generator) -> tuple[Any, ...]:
    """Atomic numbers, positions, cell and pbc of `size` atoms in a cube of the right density."""
    cells = 1
    while 4 * cells**3 < size:
        cells += 1
    corners = np.stack(np.meshgrid(*[np.arange(cells)] * 3), -1).reshape(-1, 1, 3)
    lattice = (corners + 0.5 * np.array([[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]])).reshape(-1, 3) / cells
    length = (size / _DENSITY) ** (1 / 3)
    sites = rng.permutation(len(lattice))[:size]
    positions = lattice[sites] * length + rng.normal(scale=0.35, size=(size, 3)) / 3**0.5
    return rng.choice(ELEMENTS, size), positions, np.eye(3) * length, np.ones(3, dtype=bool)


def model_config(
    width: int, forces: str, cutoff: float, num_layers: int = DEPTH, **values: Any
) -> EGNNConfig:
    """The default EGNN of this width, three layers where nothing else is said."""
    sizes = {"width": width, "num_layers": num_layers, "num_radial": NUM_RADIAL, "cutoff": cutoff}
    return EGNNConfig(**sizes, forces=forces, **values)  # type: ignore[arg-type] # checked by pydantic


def statistics() -> Statistics:
    """Two elements, no reference energies."""
    return Statistics(
        elements=ELEMENTS,
        sources=("metal",),
        levels=("none",),
        source_elements=(ELEMENTS,),
        source_levels=((0,),),
        references=((0.0, 0.0),),
        mean_energy=(0.0,),
        mean_neighbours=float(NEIGHBOURS),
        output_scale=1.0,
    )


# What of the edges is kept for the backward, by the name it goes by.
MEMORY: dict[str, dict[str, Any]] = {
    "save": {"edge_operation": "fused", "edge_memory": "save"},
    "recompute": {"edge_operation": "fused", "edge_memory": "recompute"},
    "layers": {"edge_operation": "fused", "edge_memory": "save", "recompute_layers": True},
    "both": {"edge_operation": "fused", "edge_memory": "recompute", "recompute_layers": True},
    "unfused": {"edge_operation": "unfused"},
    "unfused layers": {"edge_operation": "unfused", "recompute_layers": True},
}


def our_variants(forces: str = "direct") -> list[str]:
    """The variants of megagnn that are compared with others, the fastest first, by `our_name`."""
    names = [our_name(memory) for memory in ("save", "recompute", "unfused")]
    if forces == "conservative":
        names += [our_name(memory, "create_graph") for memory in ("save", "recompute")]
    return names


def our_name(memory: str, method: str = "one_backward") -> str:
    """The name of a variant: "megagnn", its memory, and the gradient method where it is not the default."""
    return f"megagnn {memory}" + (f" {method}" if method != "one_backward" else "")


def variant(name: str) -> tuple[str, str]:
    """Memory (a key of MEMORY) and gradient method of a name; a peer is "plain" and takes create_graph."""
    if not name.startswith("megagnn "):
        return "plain", "create_graph"
    memory = name.removeprefix("megagnn ")
    if memory.endswith(" create_graph"):
        return memory.removesuffix(" create_graph"), "create_graph"
    return memory, "one_backward"


def peer_layers() -> dict[str, Callable[..., nn.Module] | None]:
    """What makes each peer's layers, by the name it is reported as; None for one that is not installed."""
    layers: dict[str, Callable[..., nn.Module] | None] = {"usual index_add": UsualLayer}
    layers["usual torch_scatter"] = None
    layers["torch_geometric"] = None
    if harness.optional("torch_scatter"):
        layers["usual torch_scatter"] = lambda sizes: UsualLayer(sizes, torch_scatter_sum)
    if harness.optional("torch_geometric"):
        from tools.bench.peers.geometric import GeometricLayer

        layers["torch_geometric"] = GeometricLayer
    return layers


def slower_scatter(batch: Batch, width: int) -> str:
    """The name of the usual way's scatter that is the slower one here, forward and backward."""
    if not harness.optional("torch_scatter"):
        return "usual torch_scatter"
    index, rows = batch[keys.EDGE_INDEX][0], len(batch[keys.POSITIONS])
    values = torch.randn(len(index), width, requires_grad=True)
    bar = torch.randn(rows, width)

    def work(scatter: Any) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(scatter(values, index, rows), values, bar)

    works = {"usual index_add": work(index_add), "usual torch_scatter": work(torch_scatter_sum)}
    case = harness.Case("scatter", {}, "float32", dict(works))
    ours, other = harness.compare(case, argparse.Namespace(rounds=3, seconds=0.0))
    return ours.impl if (other.ratio_to_ours or 0) < 1 else other.impl


class TrainingStep:
    """Forward, loss on energies and forces, backward, AdamW: of one model on one batch.

    A peer steps by torch's fused AdamW, a model of ours by the one that comes with it.
    """

    def __init__(self, model: Potential | PeerEGNN, batch: Batch, gradient_method: str) -> None:
        self.model, self.batch = model, batch
        self.conservative = (
            model.forces == "conservative"
            if isinstance(model, Potential)
            else (model.config.forces == "conservative")
        )
        self.gradient_method = GRADIENT_METHODS[gradient_method]
        has_forces = not isinstance(model, Potential) or model.forces != "none"
        self.loss = Loss(LossConfig(energy="mse", forces="mse", force_weight=float(has_forces)))
        self.counts = label_counts(batch, ParallelContext())
        rate = 1e-9  # so small that the timed function stays the one that was checked
        self.optimizer: torch.optim.Optimizer
        if isinstance(model, Potential):
            self.optimizer = make_optimizer(model, OptimConfig(learning_rate=rate))
        else:
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)

    def use(self, batch: Batch) -> TrainingStep:
        """The same step on another batch from here on."""
        self.batch, self.counts = batch, label_counts(batch, ParallelContext())
        return self

    def __call__(self) -> Tensor:
        """One step; returns the loss."""
        self.optimizer.zero_grad()
        loss = self.gradients()
        self.optimizer.step()
        return loss

    def gradients(self) -> Tensor:
        """Leaves the gradients in the parameters; returns the loss."""
        if isinstance(self.model, Potential):
            return self.gradient_method(self.model, self.batch, self.loss, self.counts)[0]
        loss = self.loss(self.outputs(), self.batch, self.counts)[0]
        loss.backward()
        return loss.detach()

    def outputs(self) -> Batch:
        """Energies and forces, ready to be differentiated."""
        if isinstance(self.model, Potential):
            return self.model(self.batch, create_graph=True)
        if not self.conservative:
            return self.model(self.batch)
        positions = self.batch[keys.POSITIONS].detach().requires_grad_()
        energy = self.model({**self.batch, keys.POSITIONS: positions})[keys.ENERGY]
        (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
        return {keys.ENERGY: energy, keys.FORCES: -gradient}

    def results(self) -> Batch:
        """Loss, and every parameter gradient in the peers' layout, to compare one step with another."""
        self.optimizer.zero_grad()
        loss = self.gradients()
        model = self.model.model if isinstance(self.model, Potential) else self.model
        named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad()
        gradients = concatenated(named) if isinstance(model, EGNN) else named
        return {"loss": loss, **gradients}


def make_step(
    name: str, batch: Batch, config: EGNNConfig, fitted: Statistics | None = None
) -> TrainingStep | None:
    """The step of an implementation, all of them with the same weights; None where it is not installed.

    fitted: of the batch's data set, where it is not a dense batch.
    """
    memory, method = variant(name)
    if memory in MEMORY:
        config = dataclasses.replace(config, **MEMORY[memory])
        return TrainingStep(build_potential(config, fitted or statistics()), batch, method)
    layer = peer_layers()[name]
    if layer is None:
        return None
    return TrainingStep(PeerEGNN(build_potential(config, statistics()).model, layer), batch, method)


def check_equal(steps: dict[str, TrainingStep], tolerance: float = 1e-4) -> float:
    """The largest difference of a loss or gradient from the first step's, relative to that gradient.

    Gradients far below the largest are taken relative to 1e-3 of it: rounding in float32 leaves that much.
    Raises ValueError above `tolerance`: a wrong step has no speed.
    """
    (first, wanted), *others = ((name, step.results()) for name, step in steps.items())
    largest, worst = max(float(want.abs().max()) for want in wanted.values()), 0.0
    for name, got in others:
        if set(got) != set(wanted):
            odd = sorted(set(got) ^ set(wanted))
            raise ValueError(f"{name}: gradients must be those of {first}, only one of them has {odd}")
        for key, want in wanted.items():
            scale = max(float(want.abs().max()), 1e-3 * largest)
            error = float((got[key] - want).abs().max()) / scale
            worst = max(worst, error)
            if not error <= tolerance:
                raise ValueError(
                    f"{name}: {key} must equal that of {first} to {tolerance:g}, got {error:.2g}"
                )
    return worst


# Products of edge rows that a training step takes, in units of those of one forward pass.
#   Direct forces, or none: forward 1, backward to inputs 1 and to weights 1.
#   One backward, in blocks: forward 1, backward to positions 1, pair forward 2, pair backward 4; where blocks
#   or layers are recomputed, 1 more for the first backward and 2 for the other.
#   One backward, each intermediate a tensor: the pair's tangent is a derivative of the backward, so that the
#   backward is made once more: 1. Made again as a layer 16, for that derivative runs within the layer.
#   create_graph, each intermediate a tensor: forward 1, backward to positions 1, and the backward through
#   both, to inputs and weights of each, 4; a layer is recomputed by each of the two backwards, 2.
#   create_graph, in blocks: nothing of the first backward is kept, so that the backward through it makes
#   value and tangent again, 2, for its 4; then the backward of the forward, 2. Recomputed blocks 2 more.
UNITS = {
    "direct": dict(zip(("plain", *MEMORY), (3, 3, 4, 4, 4, 3, 4), strict=True)),
    "one_backward": dict(zip(MEMORY, (8, 11, 11, 11, 9, 16), strict=True)),
    "create_graph": dict(zip(("plain", *MEMORY), (6, 10, 12, 12, 12, 6, 8), strict=True)),
}
# The same of atom rows, which only a layer recomputes, and of which no backward drops anything.
ATOM_UNITS = {"direct": (3, 4), "one_backward": (8, 11), "create_graph": (6, 8)}
# Products of distance features beyond UNITS: a block is kept without its first layer, which is recomputed.
RADIAL_AGAIN = {"direct": 1, "one_backward": 3, "create_graph": 2}


def step_flops(
    name: str, forces: str, width: int, num_atoms: int, num_edges: int, num_layers: int = DEPTH
) -> float:
    """The matrix products of a step, multiply-adds counted as 2: what this formulation takes."""
    edges, atoms = 0.0, float(width * width + width)
    for layer in range(num_layers):
        vector = layer < num_layers - 1 or forces == "direct"
        branch = width * width + width if vector else 0
        first = NUM_RADIAL * width + (0 if name.startswith("megagnn") else 2 * width * width)
        edges += first + width * width + branch
        atoms += (5 if name.startswith("megagnn") else 3) * width * width
    memory, method = variant(name)
    method = method if forces == "conservative" else "direct"
    layers_again = memory in ("layers", "both", "unfused layers")
    units, atom_units = UNITS[method][memory], ATOM_UNITS[method][layers_again]
    again = radial_again(name, forces, width, num_edges, num_layers)
    return 2.0 * (units * edges * num_edges + atom_units * atoms * num_atoms) + again


def radial_again(name: str, forces: str, width: int, num_edges: int, num_layers: int = DEPTH) -> float:
    """Of `step_flops` the products of distance features that kept blocks recompute."""
    memory, method = variant(name)
    if memory not in ("save", "layers"):
        return 0.0
    again = RADIAL_AGAIN[method if forces == "conservative" else "direct"]
    return 2.0 * again * NUM_RADIAL * width * num_edges * num_layers


def step_evaluations(forces: str, width: int, num_edges: int) -> float:
    """Evaluations of SiLU on edges in each of forward and backward of a direct step, for every formulation.

    Three for each channel and edge of a layer: hidden layer, message, vector branch. 0 for conservative
    forces, whose formulations differ in how often they evaluate what.
    """
    return 3.0 * DEPTH * width * num_edges if forces == "direct" else 0.0
