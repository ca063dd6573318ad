"""E(n)-equivariant graph network for atomic structures: embedding, layers, heads."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from megagnn.data import keys
from megagnn.models.egnn.config import ModelConfig
from megagnn.models.egnn.edge.partition import partition_edges
from megagnn.models.egnn.edge.plan_rows import WeightRing
from megagnn.models.egnn.heads import EnergyHead
from megagnn.models.egnn.layer import Edges, EGNNLayer, edge_distances, edge_vectors
from megagnn.models.egnn.traffic_model import PlanChoice, choose_plan
from megagnn.models.precision import Precision
from megagnn.models.radial import DistanceFeature, envelope
from megagnn.models.statistics import Statistics
from megagnn.ops import Segments, dual, gather, segment_sum
from megagnn.ops.recompute import recomputed
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import deferred_parameters, initialise, num_parameters
from megagnn.tensor_parallel.layers import Embedding, share

NUM_ATOMIC_NUMBERS = 119  # atomic numbers 0..118; 0 stands for none


@dataclass(frozen=True)
class Part:
    """What a model holds of the whole, under the names that it has there."""

    layers: tuple[int, ...]
    """Numbers of the layers, rising."""
    embedding: bool = True
    head: bool = True
    """The energy head."""


class EGNN(nn.Module):
    """Energy and, with `forces = "direct"`, forces of every structure of a batch.

    Calling it on a batch (megagnn/data/keys.py) returns a dict with `energy` (B,) float64, total energies in
    eV, and with direct forces `forces` (N, 3) in eV/Å, in the type of the positions, the same on all
    tensor-parallel ranks. Conservative
    forces and stress are derivatives: see `models.potential`. With positions and cell as `ops.dual.Dual`
    numbers the results are Dual ones.

    Attributes:
        wants_atomic_energies: also return `atomic_energies` (N,) float64, eV, which add up to `energy`: the
            network's share of each atom and the constants of its element. Not with Dual numbers.

    Args:
        config: sizes and parts.
        statistics: elements, references and scales of the training split.
        precision: types of parameters and activations, and of the geometry: that of the batch's positions.
        context: ranks that divide the parameters and the work.
        plan: how the edge products are divided over tensor-parallel ranks; `auto` takes for each batch the
            plan that sends less (models/egnn/traffic_model.py).
        part: what of it is here, the whole by default; a part is run by `run_layers` (pipeline_parallel/).
    """

    element_index: Tensor
    references: Tensor

    def __init__(
        self,
        config: ModelConfig,
        statistics: Statistics,
        precision: Precision = Precision(),  # noqa: B008 (frozen)
        context: ParallelContext | None = None,
        plan: PlanChoice = "auto",
        part: Part | None = None,
    ) -> None:
        super().__init__()
        self.part = part = part or Part(tuple(range(config.num_layers)))
        self.config, self.statistics, self.precision, self.plan = config, statistics, precision, plan
        self.wants_atomic_energies = False
        dtype = precision.parameters
        self.context = context = context or ParallelContext()
        self.distance_feature = DistanceFeature(
            config.distance_feature, config.num_radial, config.cutoff, precision.edge
        )
        elements, levels = len(statistics.elements), len(statistics.levels)
        self.element_embedding = Embedding(elements, config.width, context, dtype) if part.embedding else None
        has_levels = part.embedding and config.level_embedding and levels > 1
        self.level_embedding = Embedding(levels, config.width, context, dtype) if has_levels else None
        self.layers: Iterable[EGNNLayer] = nn.ModuleList()  # type: ignore[assignment] # a list of EGNNLayer
        for k in part.layers:
            branch, neighbours = self.vector_branch(k), statistics.mean_neighbours
            layer = EGNNLayer(config, self.distance_feature, neighbours, branch, context, dtype)
            self.layers.add_module(str(k), layer)  # type: ignore[attr-defined]
        self.energy_head = EnergyHead(config, context, dtype) if part.head else None
        self.ring = None
        if context.tp_size > 1:
            self.ring = WeightRing(context, [layer.edge_weights for layer in self.layers])
            for index, layer in enumerate(self.layers):
                layer.edge_operation.join_ring(self.ring, index)
        element_index = torch.full((NUM_ATOMIC_NUMBERS,), -1)
        element_index[list(statistics.elements)] = torch.arange(len(statistics.elements))
        self.register_buffer("element_index", element_index, persistent=False)
        references = torch.tensor(statistics.baseline(), dtype=torch.float64)
        self.register_buffer("references", references, persistent=False)

    def vector_branch(self, layer: int) -> str:
        """The last layer's coordinates would reach no output, so its branch is the force head or left out."""
        if layer == self.config.num_layers - 1:
            return "forces" if self.config.forces == "direct" else "none"
        return "coordinates" if self.config.update_coordinates else "none"

    def reset_parameters(self, seed: int = 0) -> None:
        """Initial weights that pass on variances of order one, last Linears small (docs/model.md).

        They depend on the seed and the parameters' names only, not on the layout (parallel/parameter.py).
        """
        initialise(self, seed)

    def stages(self) -> list[tuple[str, nn.Module]]:
        """The modules that hold the parameters, with their names, in the order in which they run."""
        layers = [(f"layers.{k}", self.get_submodule(f"layers.{k}")) for k in self.part.layers]
        first = [("element_embedding", self.element_embedding), ("level_embedding", self.level_embedding)]
        found = [*first, *layers, ("energy_head", self.energy_head)]
        return [(name, module) for name, module in found if module is not None]

    def num_parameters(self) -> int:
        """Trainable parameters of the whole model, or of the part that is here."""
        return num_parameters(self)

    def edges(self, batch: dict[str, Any]) -> Edges:
        """This rank's edges of the batch; the lattice translation follows the cell's gradient."""
        plan = choose_plan(self.plan, self.config, batch, self.context)
        partition = partition_edges(batch, self.context, plan)
        own = partition.edges
        structure_E = batch[keys.BATCH][batch[keys.EDGE_INDEX][0, own]]
        cell_B33 = share(batch[keys.CELL], self.context)
        shift_EC = dual.lattice_shift(cell_B33, batch[keys.CELL_SHIFTS][own], structure_E)
        degree_N1 = batch[keys.ROW_PTR].diff().clamp(min=1).unsqueeze(-1)
        return Edges(partition, shift_EC, self.distance_feature.centres_R, degree_N1=degree_N1)

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        """See the class."""
        h_NF, _, forces_NC = self.run_layers(self.layers, batch, self.embed(batch), batch[keys.POSITIONS])
        return self.outputs(batch, h_NF, forces_NC)

    def run_layers(
        self, layers: Iterable[EGNNLayer], batch: dict[str, Any], h_NF: Any, x_NC: Any
    ) -> tuple[Any, Any, Any]:
        """(h, x) -> (h, x, forces or None) through some layers that follow one another.

        x are the coordinates that the layers before have moved; the batch's own positions, which the envelope
        sees in every layer, where they have moved none.
        """
        edges, x0_NC = self.edges(batch), batch[keys.POSITIONS]
        self._check_geometry(x0_NC)
        r_EC = edge_vectors(share(x0_NC, self.context), edges)
        if self.config.envelope:
            edges = replace(edges, envelope_E=envelope(edge_distances(r_EC), self.config.cutoff))
        if x_NC is not x0_NC:
            r_EC = edge_vectors(share(x_NC, self.context), edges)
        forces_NC = None
        for layer in layers:
            run = recomputed if self.config.recompute_layers and torch.is_grad_enabled() else _run
            h_NF, x_new_NC, forces_NC = run(layer, h_NF, x_NC, r_EC, edges)
            if layer.vector_branch == "coordinates":
                x_NC = x_new_NC
                r_EC = edge_vectors(share(x_NC, self.context), edges)
        return h_NF, x_NC, forces_NC

    def outputs(self, batch: dict[str, Any], h_NF: Any, forces_NC: Any) -> dict[str, Any]:
        """What the model predicts, from the last layer's results."""
        assert self.energy_head is not None
        atoms = Segments(batch[keys.BATCH], batch[keys.GRAPH_PTR])
        energy_N = self.energy_head(h_NF).double() * self.statistics.output_scale
        outputs = {keys.ENERGY: dual.segment_sum(energy_N, atoms) + self.reference_energy(batch)}
        if self.wants_atomic_energies:
            outputs[keys.ATOMIC_ENERGIES] = energy_N + self.atom_references(batch)
        if forces_NC is not None:
            outputs[keys.FORCES] = forces_NC * self.statistics.output_scale
        return outputs

    def _check_geometry(self, x_NC: Any) -> None:
        if x_NC.dtype != self.precision.geometry:
            raise ValueError(
                f"the batch's positions must be {self.precision.geometry}, as the model's geometry, got "
                f"{x_NC.dtype}; make the batch with dtype = model.precision.geometry"
            )

    def embed(self, batch: dict[str, Any]) -> Any:
        """The first node features, of the element and the level of theory, (N, F/tp); a Dual with Dual
        positions, its tangent zero.
        """
        assert self.element_embedding is not None
        h_NF: Tensor = self.element_embedding(self.element_index[batch[keys.ATOMIC_NUMBERS]])
        if self.level_embedding is not None:
            atoms = Segments(batch[keys.BATCH], batch[keys.GRAPH_PTR])
            h_NF = h_NF + gather(self.level_embedding(batch[keys.LEVEL]), atoms)
        if isinstance(batch[keys.POSITIONS], dual.Dual):
            return dual.Dual(h_NF, torch.zeros_like(h_NF))
        return h_NF

    def reference_energy(self, batch: dict[str, Any]) -> Tensor:
        """Sum of the elements' references and the source's shifts of each structure, eV, (B,) float64: the
        "per-element" baseline."""
        return segment_sum(self.atom_references(batch), Segments(batch[keys.BATCH], batch[keys.GRAPH_PTR]))

    def atom_references(self, batch: dict[str, Any]) -> Tensor:
        """The constant part of each atom's energy, eV, (N,) float64: the reference of its element, and the
        shift of its source."""
        element_N = self.element_index[batch[keys.ATOMIC_NUMBERS]]
        return self.references[batch[keys.SOURCE][batch[keys.BATCH]], element_N]


def parameter_names(config: ModelConfig, statistics: Statistics) -> list[str]:
    """Names of the parameters of the whole model, for which no memory is taken."""
    with deferred_parameters():
        return [name for name, _ in EGNN(config, statistics).named_parameters()]


def _run(layer: EGNNLayer, *arguments: Any) -> Any:
    return layer(*arguments)
