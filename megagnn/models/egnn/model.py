"""E(n)-equivariant graph network for atomic structures (docs/model.md), as a model family."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from megagnn.data import keys
from megagnn.models.egnn import kept
from megagnn.models.egnn.config import EGNNConfig
from megagnn.models.egnn.edge.ahead import EdgePlanner
from megagnn.models.egnn.edge.operation import partition_edges
from megagnn.models.egnn.edge.plan_rows import WeightRing
from megagnn.models.egnn.layer import (
    Activation,
    Edges,
    EGNNLayer,
    FusedAtoms,
    edge_vectors,
    fuses_edges,
    make_norm,
    normed_linears,
)
from megagnn.models.egnn.traffic_model import Widths, choose_plan, has_vector, layer_elements, least_plan
from megagnn.models.family import Field, Model, State, Work
from megagnn.models.parts import edge_distances, laws
from megagnn.models.radial import DistanceFeature, envelope
from megagnn.ops import dual, extension, node
from megagnn.ops.dispatch import accumulator_type
from megagnn.ops.dual import T
from megagnn.parallel.context import ParallelContext
from megagnn.tensor_parallel.layers import ColumnLinear, RowLinear, gather_channels, share


class EnergyHead(nn.Module):
    """Atomic energy in units of the output scale: norm, Linear, activation, Linear(-> 1).

    Node features (N, F/tp), sharded, to (N,), replicated. The last Linear starts small: initial energies are
    the references.
    """

    def __init__(self, config: EGNNConfig, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        width, self.context = config.width, context
        last = laws(config, width, "output", scale=0.1, zero_bias=True)
        self.fused_atoms = FusedAtoms(config, context)
        self.norm = make_norm(config, context, dtype)
        self.hidden = ColumnLinear(width, width, context, laws(config, width), dtype)
        self.activation = Activation(config)
        self.out = RowLinear(width, 1, context, last, dtype)

    def forward(self, h_NF: T) -> T:
        plain_NF = self.fused_atoms.served(h_NF, self.out.weight)
        if plain_NF is not None:
            (u_NF,) = normed_linears(self.norm, plain_NF, [self.hidden])
            energy_N: T = node.silu_linear(u_NF, self.out.weight, self.out.bias).squeeze(-1)  # type: ignore[assignment]
            return energy_N
        normed_NF = gather_channels(self.norm(h_NF), self.context)
        energy_N1: T = self.out(self.activation(self.hidden(normed_NF)))
        return energy_N1.squeeze(-1)


class EGNN(Model):
    """See `Model`. The plan `auto` takes for each batch what sends less (traffic_model.py)."""

    def build(self) -> None:
        config, context, part = self.config, self.context, self.part
        dtype, neighbours = self.precision.parameters, self.statistics.mean_neighbours
        self.distance_feature = DistanceFeature(
            config.distance_feature, config.num_radial, config.cutoff, self.precision.edge
        )
        for k in part.layers:
            branch = self.vector_branch(k)
            layer = EGNNLayer(config, self.distance_feature, neighbours, branch, context, dtype)
            self.layers.add_module(str(k), layer)
        self.energy_head = EnergyHead(config, context, dtype) if part.head else None
        self.ring = None
        if context.tp_size > 1:
            layers: Any = self.layers
            self.ring = WeightRing(context, [layer.edge_weights for layer in layers])
            for index, layer in enumerate(layers):
                layer.edge_operation.join_ring(self.ring, index)

    def vector_branch(self, layer: int) -> str:
        """The last layer's coordinates would reach no output, so its branch is the force head or left out."""
        if layer == self.config.num_layers - 1:
            return "forces" if self.config.forces == "direct" else "none"
        return "coordinates" if self.config.update_coordinates else "none"

    def fields(self, num_layers: int, batch: dict[str, Any]) -> dict[str, Field]:
        """Features `h` (N, F/tp), and latent coordinates `x` (N, 3) once a layer has moved them."""
        num_atoms = len(batch[keys.ATOMIC_NUMBERS])
        width = self.config.width // self.context.tp_size
        fields = {"h": Field((num_atoms, width), self.precision.parameters)}
        if any(self.vector_branch(k) == "coordinates" for k in range(num_layers)):
            fields["x"] = Field((num_atoms, 3), batch[keys.POSITIONS].dtype)
        return fields

    @staticmethod
    def work(config: EGNNConfig, layer: int) -> Work:
        w = Widths.of(config)
        if layer == config.num_layers:
            return Work(0, w.F * (w.F + 1))
        per_edge = w.H * w.R + w.M * w.H + (w.K * (w.M + 1) if has_vector(config, layer) else 0)
        return Work(per_edge, 2 * w.F * w.H + w.D * (w.F + w.M) + w.D * w.F)

    traffic = staticmethod(layer_elements)
    kept = staticmethod(kept.kept)
    edge_plan = staticmethod(least_plan)

    def read_ahead(self, prepare: Callable[[int], None]) -> None:
        """See `Model`: the plan `edge` gathers the next layer's weights while one layer runs."""
        if self.ring is not None:
            self.ring.prepare = prepare

    def graph(self, batch: dict[str, Any]) -> Edges:
        """This rank's edges of the batch; the lattice translation follows the cell's gradient."""
        plan = choose_plan(self.plan, self.config, batch, self.context)
        partition = partition_edges(batch, self.context, plan)
        own = partition.edges
        structure_E = batch[keys.BATCH][batch[keys.EDGE_INDEX][0, own]]
        cell_B33 = share(batch[keys.CELL], self.context)
        shift_EC = dual.lattice_shift(cell_B33, batch[keys.CELL_SHIFTS][own], structure_E)
        degree_N1 = batch[keys.ROW_PTR].diff().clamp(min=1).unsqueeze(-1)
        return Edges(partition, shift_EC, self.distance_feature.centres_R, degree_N1=degree_N1)

    def planner(self) -> EdgePlanner | None:
        """See `Model`: blocks of the edge operation, where its kernels run and one rank has them all."""
        config, on_cpu = self.config, self.element_index.is_cpu
        there = extension.has_cpu if on_cpu else extension.has_cuda
        if self.context.tp_size > 1 or not fuses_edges(config) or not there:
            return None
        w = Widths.of(config)
        planes = (1, 2) if config.forces == "conservative" else (1,)
        size = accumulator_type(self.precision.parameters).itemsize
        return EdgePlanner((w.M, w.H), size, config.edge_block, planes, on_cpu, torch.get_num_threads())

    def run_layers(self, numbers: Sequence[int], batch: dict[str, Any], state: State) -> State:
        """See `Model`. `x` are the coordinates that the layers before have moved; where they have moved none,
        the batch's own positions, which the envelope sees in every layer."""
        edges, x0_NC = self.graph(batch), batch[keys.POSITIONS]
        self.check_geometry(x0_NC)
        h_NF, x_NC = state["h"], state.get("x", x0_NC)
        r_EC = edge_vectors(share(x0_NC, self.context), edges)
        if self.config.envelope:
            edges = replace(edges, envelope_E=envelope(edge_distances(r_EC), self.config.cutoff))
        if x_NC is not x0_NC:
            r_EC = edge_vectors(share(x_NC, self.context), edges)
        forces_NC = None
        for layer in map(self.layer, numbers):
            h_NF, x_new_NC, forces_NC = self.run_layer(layer, h_NF, x_NC, r_EC, edges)
            if layer.vector_branch == "coordinates":
                x_NC = x_new_NC
                r_EC = edge_vectors(share(x_NC, self.context), edges)
        return {"h": h_NF, "x": x_NC, "forces": forces_NC}
