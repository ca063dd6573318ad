"""Energies and forces of the pair potentials beneath a network, which models/pair_fit.py fits."""

from typing import Any

import torch
from torch import Tensor, nn

from megagnn.data import keys
from megagnn.models.pair_fit import pair_index, pair_splines
from megagnn.models.parts import edge_distances, graph_of
from megagnn.models.radial import envelope
from megagnn.models.statistics import Statistics
from megagnn.ops import Segments, dual, segment_sum
from megagnn.parallel.context import ParallelContext


class PairPotentials(nn.Module):
    """Half of the pair potentials between an atom and its neighbours, less the constant of its element in
    the source.

    They are constants of the model, as the references are: no parameter. Every rank makes them in full, of
    positions that are not shared, for a gradient that is not summed over tensor-parallel ranks.

    Args:
        statistics: with `pair_weights`.
        cutoff: Å.
        element_index: (119,) number of each element.
    """

    weights: Tensor
    constants: Tensor
    element_index: Tensor

    def __init__(self, statistics: Statistics, cutoff: float, element_index: Tensor) -> None:
        super().__init__()
        weights = torch.tensor(statistics.pair_weights, dtype=torch.float64)
        self.splines, self.cutoff = pair_splines(weights.shape[-1], cutoff), cutoff
        self.register_buffer("weights", weights, persistent=False)
        constants = torch.tensor(statistics.pair_constants, dtype=torch.float64)
        self.register_buffer("constants", constants, persistent=False)
        self.register_buffer("element_index", element_index, persistent=False)

    def energies(self, batch: dict[str, Any]) -> Any:
        """Of each atom, eV, (N,) float64, a Dual with Dual positions."""
        edges, (kind_N, level_N) = graph_of(batch, ParallelContext()), self._kinds(batch)
        r_EC: Any = edges.r_EC
        phi_E: Any = self._of_edges(edge_distances(r_EC), self._rows(edges, kind_N, level_N))
        constants_N = self.constants[batch[keys.SOURCE][batch[keys.BATCH]], kind_N]
        return dual.segment_sum(phi_E.double() * 0.5, edges.destination) + constants_N.neg()

    def forces(self, batch: dict[str, Tensor]) -> Tensor:
        """F_i = sum_j phi'(d_ij) r_ij/d_ij, eV/Å, (N, 3), in the type of the positions."""
        edges = graph_of(batch, ParallelContext())
        r_EC: Any = edges.r_EC
        d_E, rows_E = edge_distances(r_EC), self._rows(edges, *self._kinds(batch))
        _, slope_E = self._value_and_slope(d_E, rows_E)
        return segment_sum((slope_E / d_E).unsqueeze(-1) * r_EC, edges.destination)

    def _of_edges(self, d_E: Any, rows_E: Tensor) -> Any:
        """phi of each edge, eV, (E,); rows: of each edge's potential among all of all levels.

        Of Dual numbers a constant, which a loss differentiates in no direction: no parameter is in it.
        """
        if not isinstance(d_E, dual.Dual):
            return self._of_distances(d_E, rows_E)
        phi_E, slope_E = self._value_and_slope(d_E.value, rows_E)
        return dual.Dual(phi_E, slope_E * d_E.tangent)

    def _value_and_slope(self, d_E: Tensor, rows_E: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            moved_E = d_E.detach().clone().requires_grad_()
            phi_E = self._of_distances(moved_E, rows_E.clone())
            (slope_E,) = torch.autograd.grad(phi_E.sum(), moved_E)
        return phi_E.detach(), slope_E

    def _of_distances(self, d_E: Tensor, rows_E: Tensor) -> Tensor:
        values_E4, first_E = self.splines(d_E)
        columns_E4 = first_E.unsqueeze(-1) + torch.arange(4, device=rows_E.device)
        weights_E4 = self.weights.flatten(0, 1)[rows_E.unsqueeze(-1), columns_E4].to(values_E4.dtype)
        return (values_E4 * weights_E4).sum(-1) * envelope(d_E, self.cutoff)

    def _kinds(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Number of each atom's element, and of its level of theory where they differ in it, (N,) each."""
        level_B = batch[keys.LEVEL] if len(self.weights) > 1 else torch.zeros_like(batch[keys.LEVEL])
        return self.element_index[batch[keys.ATOMIC_NUMBERS]], level_B[batch[keys.BATCH]]

    def _rows(self, edges: Any, kind_N: Tensor, level_N: Tensor) -> Tensor:
        ends: tuple[Segments, Segments] = (edges.destination, edges.source)
        pair_E = pair_index(*(kind_N[end.index] for end in ends))
        rows_E: Tensor = level_N[edges.destination.index] * self.weights.shape[1] + pair_E
        return rows_E
