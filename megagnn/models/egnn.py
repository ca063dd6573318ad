"""E(n)-equivariant graph network for atomic structures: embedding, layers, heads."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from megagnn.config import ModelConfig
from megagnn.data import keys
from megagnn.models.heads import EnergyHead
from megagnn.models.layer import Edges, EGNNLayer, edge_distances, edge_vectors
from megagnn.models.radial import DistanceFeature, envelope
from megagnn.models.statistics import Statistics
from megagnn.ops import EdgeGraph, Segments, segment_sum
from megagnn.ops.backends import aggregation_backend

NUM_ATOMIC_NUMBERS = 119  # atomic numbers 0..118; 0 stands for none


class EGNN(nn.Module):
    """Energy and, with `forces = "direct"`, forces of every structure of a batch.

    Calling it on a batch (megagnn/data/keys.py) returns a dict with `energy` (B,) float64, total energies in
    eV, and with direct forces `forces` (N, 3) in eV/Å. Conservative forces and stress are derivatives: see
    `models.potential`.

    Args:
        config: sizes and parts.
        statistics: elements, references and scales of the training split.
        dtype: of parameters and activations; must be that of the batch's positions.
    """

    element_index: Tensor
    references: Tensor

    def __init__(
        self, config: ModelConfig, statistics: Statistics, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.config, self.statistics, self.dtype = config, statistics, dtype
        self.backend = aggregation_backend(config.aggregation_backend)
        self.distance_feature = DistanceFeature(
            config.distance_feature, config.num_radial, config.cutoff, dtype
        )
        self.element_embedding = nn.Embedding(len(statistics.elements), config.width, dtype=dtype)
        has_levels = config.level_embedding and len(statistics.levels) > 1
        self.level_embedding = (
            nn.Embedding(len(statistics.levels), config.width, dtype=dtype) if has_levels else None
        )
        self.layers: Iterable[EGNNLayer] = nn.ModuleList(  # type: ignore[assignment] # a list of EGNNLayer
            EGNNLayer(
                config,
                self.distance_feature,
                statistics.mean_neighbours,
                self._vector_branch(k),
                dtype,
            )
            for k in range(config.num_layers)
        )
        self.energy_head = EnergyHead(config, dtype)
        element_index = torch.full((NUM_ATOMIC_NUMBERS,), -1)
        element_index[list(statistics.elements)] = torch.arange(len(statistics.elements))
        self.register_buffer("element_index", element_index, persistent=False)
        references = torch.tensor(statistics.references, dtype=torch.float64)
        self.register_buffer("references", references, persistent=False)
        self.reset_parameters()

    def _vector_branch(self, layer: int) -> str:
        """The last layer's coordinates would reach no output, so its branch is the force head or left out."""
        if layer == self.config.num_layers - 1:
            return "forces" if self.config.forces == "direct" else "none"
        return "coordinates" if self.config.update_coordinates else "none"

    def reset_parameters(self) -> None:
        """Initial weights that pass on variances of order one, last Linears small (docs/model.md)."""
        if self.config.initialisation == "lecun":
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=module.in_features**-0.5)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        for layer in self.layers:
            layer.reset_parameters()
        self.energy_head.reset_parameters()

    def num_parameters(self) -> int:
        """Trainable parameters."""
        return sum(p.numel() for p in self.parameters())

    def edges(self, batch: dict[str, Tensor]) -> Edges:
        """The batch's edges; the lattice translation follows the cell's gradient."""
        destination = Segments(batch[keys.EDGE_INDEX][0], batch[keys.ROW_PTR])
        source = Segments(batch[keys.EDGE_INDEX][1], batch[keys.SOURCE_PTR], batch[keys.SOURCE_PERM])
        cell_E33 = batch[keys.CELL][batch[keys.BATCH][destination.index]]
        shift_EC = (batch[keys.CELL_SHIFTS].unsqueeze(-1) * cell_E33).sum(1)
        graph = EdgeGraph(destination, source)
        return Edges(graph, shift_EC, self.distance_feature.centres_R, backend=self.backend)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """See the class."""
        edges = self.edges(batch)
        x_NC = batch[keys.POSITIONS]
        r_EC = edge_vectors(x_NC, edges)
        if self.config.envelope:
            edges = replace(edges, envelope_E=envelope(edge_distances(r_EC), self.config.cutoff))
        element_N = self.element_index[batch[keys.ATOMIC_NUMBERS]]
        h_NF = self.element_embedding(element_N)
        if self.level_embedding is not None:
            h_NF = h_NF + self.level_embedding(batch[keys.LEVEL])[batch[keys.BATCH]]
        forces_NC = None
        for layer in self.layers:
            h_NF, x_new_NC, forces_NC = layer(h_NF, x_NC, r_EC, edges)
            if x_new_NC is not x_NC:
                x_NC = x_new_NC
                r_EC = edge_vectors(x_NC, edges)
        atoms = Segments(batch[keys.BATCH], batch[keys.GRAPH_PTR])
        energy_N = self.energy_head(h_NF).double() * self.statistics.output_scale
        outputs = {keys.ENERGY: segment_sum(energy_N, atoms) + self.reference_energy(batch)}
        if forces_NC is not None:
            outputs[keys.FORCES] = forces_NC * self.statistics.output_scale
        return outputs

    def reference_energy(self, batch: dict[str, Tensor]) -> Tensor:
        """Sum of the elements' references of each structure, eV, (B,) float64: the "per-element" baseline."""
        element_N = self.element_index[batch[keys.ATOMIC_NUMBERS]]
        reference_N = self.references[batch[keys.SOURCE][batch[keys.BATCH]], element_N]
        return segment_sum(reference_N, Segments(batch[keys.BATCH], batch[keys.GRAPH_PTR]))
