"""PaiNN as a model family: Schütt, Unke, Gastegger, "Equivariant message passing for the prediction of
tensorial properties and molecular spectra", ICML 2021.

An atom has scalars h (F) and vectors v (3, F). For edges e from j to i with unit vector u_e, per layer:

    x = phi(h)              W_e = (W rho(d_e) + b) f_c(d_e)                      three of each: h, u and v
    h_i <- h_i + a/A sum_e W^h_e x^h_j
    v_i <- v_i + a/A sum_e W^u_e x^u_j u_e + W^v_e x^v_j v_j                                 (eqs. 7 and 8)
    p = P v,  q = Q v,  y = psi(h, |p|)                                          three outputs: h, pq and v
    h <- h + a (y^h + y^pq p.q),    v <- v + a y^v q                                        (eqs. 9 and 10)

with phi and psi of two Linears and a SiLU between them. Products of channels with channels are all per atom:
over tensor-parallel ranks the edges are divided by channels and send nothing. Generic operations only.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megagnn.data import keys
from megagnn.models.family import Field, Model, State, Work
from megagnn.models.painn import costs
from megagnn.models.painn.config import PaiNNConfig
from megagnn.models.painn.costs import head_width
from megagnn.models.parts import branch_rate, graph_of, laws, refuse_edge_plan
from megagnn.models.radial import DistanceFeature, cosine_cutoff, envelope
from megagnn.ops import Segments, dual
from megagnn.ops.dual import T
from megagnn.parallel.context import ParallelContext
from megagnn.tensor_parallel.layers import ColumnLinear, RowLinear, gather_channels


@dataclass(frozen=True)
class Edges:
    """The edges of a batch as all layers share them, in the type of the features."""

    destination: Segments
    source: Segments
    basis_ER: Any
    """Functions of the distance."""
    envelope_E1: Any
    direction_EC1: Any
    """Unit vectors from the receiver to the sender, (E, 3, 1)."""


class Branches(nn.Module):
    """Linear of one or more inputs, SiLU, and a Linear for each branch: shared (N, F) to sharded (N, F/tp).

    Args:
        names: of the branches.
        num_inputs: as if they were concatenated.
    """

    def __init__(
        self,
        config: PaiNNConfig,
        names: Iterable[str],
        num_inputs: int,
        context: ParallelContext,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.context, width = context, config.width
        at = laws(config, width, rate=branch_rate(config))
        self.hidden = nn.ModuleList(
            ColumnLinear(width, width, context, at, dtype, bias=k == 0) for k in range(num_inputs)
        )
        self.out = nn.ModuleDict({name: ColumnLinear(width, width, context, at, dtype) for name in names})

    def forward(self, *inputs: Any) -> dict[str, Any]:
        hidden_NF = self.hidden[0](inputs[0])
        for linear, x_NF in zip(self.hidden[1:], inputs[1:], strict=True):
            hidden_NF = hidden_NF + linear(x_NF)
        hidden_NF = gather_channels(dual.silu(hidden_NF), self.context)
        return {name: linear(hidden_NF) for name, linear in self.out.items()}


class PaiNNLayer(nn.Module):
    """Messages and the update of each atom; state `h` (N, F/tp) and, behind the first, `v` (N, 3, F/tp).

    Without a branch that nothing would read: the first layer has no vectors to pass on, the last one's would
    reach no output but direct forces, which it returns as `forces` (N, 3).
    """

    def __init__(
        self,
        config: PaiNNConfig,
        number: int,
        mean_neighbours: float,
        context: ParallelContext,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.context, self.norm_epsilon, width = context, config.norm_epsilon, config.width
        is_last = number == config.num_layers - 1
        names = message_branches(number)
        rate = branch_rate(config)
        radial, mixing = laws(config, config.num_radial, "input", rate=rate), laws(config, width, rate=rate)
        self.filters = nn.ModuleDict(
            {name: ColumnLinear(config.num_radial, width, context, radial, dtype) for name in names}
        )
        self.message = Branches(config, names, 1, context, dtype)
        self.p = ColumnLinear(width, width, context, mixing, dtype, bias=False)
        self.q = ColumnLinear(width, width, context, mixing, dtype, bias=False)
        self.update = Branches(config, update_branches(config, number), 2, context, dtype)
        self.force_head = None
        if is_last and config.forces == "direct":
            out = laws(config, width, "output", scale=0.1)
            self.force_head = RowLinear(width, 1, context, out, dtype, bias=False)
        self.scale = config.num_layers**-0.5 if config.depth_scaling else 1.0
        self.message_scale = self.scale / (
            mean_neighbours if config.message_aggregation == "constant" else 1.0
        )

    def forward(self, state: State, edges: Edges) -> State:
        h_NF, v_NCF = self.add_messages(state["h"], state.get("v"), edges)
        all_NCF = gather_channels(v_NCF, self.context)
        p_NCF, q_NCF = self.p(all_NCF), self.q(all_NCF)
        square_NF = (p_NCF * p_NCF).sum(-2) + self.norm_epsilon
        norm_NF = square_NF * dual.rsqrt(square_NF)
        y = self.update(gather_channels(h_NF, self.context), gather_channels(norm_NF, self.context))
        h_NF = h_NF + (y["h"] + y["pq"] * (p_NCF * q_NCF).sum(-2)) * self.scale
        if "v" not in y:
            return {"h": h_NF}
        v_NCF = v_NCF + y["v"].unsqueeze(-2) * q_NCF * self.scale
        if self.force_head is None:
            return {"h": h_NF, "v": v_NCF}
        return {"h": h_NF, "forces": self.force_head(v_NCF).squeeze(-1)}

    def add_messages(self, h_NF: T, v_NCF: T | None, edges: Edges) -> tuple[T, T]:
        """Scalars and vectors with their sums over neighbours."""
        x = self.message(gather_channels(h_NF, self.context))

        def from_source(name: str) -> Any:
            filter_EF = self.filters[name](edges.basis_ER) * edges.envelope_E1
            return filter_EF * dual.gather(x[name], edges.source)

        m_ECF = from_source("u").unsqueeze(-2) * edges.direction_EC1
        if v_NCF is not None:
            m_ECF = m_ECF + from_source("v").unsqueeze(-2) * dual.gather(v_NCF, edges.source)
        h_NF = h_NF + dual.segment_sum(from_source("h"), edges.destination) * self.message_scale
        sum_NCF = dual.segment_sum(m_ECF, edges.destination) * self.message_scale
        return h_NF, sum_NCF if v_NCF is None else v_NCF + sum_NCF


def message_branches(number: int) -> tuple[str, ...]:
    """Names of the branches of a layer's messages."""
    return ("h", "u", "v") if number else ("h", "u")


def update_branches(config: PaiNNConfig, number: int) -> tuple[str, ...]:
    """Names of the branches of a layer's update of each atom."""
    reads_v = number < config.num_layers - 1 or config.forces == "direct"
    return ("h", "pq", "v") if reads_v else ("h", "pq")


class EnergyHead(nn.Module):
    """Atomic energy in units of the output scale: Linear, SiLU, Linear(-> 1).

    Scalars (N, F/tp), sharded, to (N,), replicated. The last Linear starts small: initial energies are the
    references.
    """

    def __init__(self, config: PaiNNConfig, context: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        width, hidden, names = config.width, head_width(config), ("model.width", "model.head_width")
        last = laws(config, hidden, "output", scale=0.1, zero_bias=True)
        self.hidden = RowLinear(width, hidden, context, laws(config, width), dtype, names=names)
        self.out = RowLinear(hidden, 1, context, last, dtype, names=(names[1], names[1]))

    def forward(self, h_NF: T) -> T:
        energy_N1: T = self.out(dual.silu(self.hidden(h_NF)))
        return energy_N1.squeeze(-1)


class PaiNN(Model):
    """See `Model`, and the module for the formulas.

    Raises ValueError for the plan `edge`: edges are divided by channels.
    """

    def build(self) -> None:
        refuse_edge_plan(self.plan, "PaiNN")
        config, context, dtype = self.config, self.context, self.precision.parameters
        self.radial = DistanceFeature(
            config.radial_basis, config.num_radial, config.cutoff, self.precision.edge
        )
        for k in self.part.layers:
            layer = PaiNNLayer(config, k, self.statistics.mean_neighbours, context, dtype)
            self.layers.add_module(str(k), layer)
        self.energy_head = EnergyHead(config, context, dtype) if self.part.head else None

    def fields(self, num_layers: int, batch: dict[str, Any]) -> dict[str, Field]:
        """Scalars `h` (N, F/tp) and, between layers, vectors `v` (N, 3, F/tp)."""
        num_atoms, width = len(batch[keys.ATOMIC_NUMBERS]), self.config.width // self.context.tp_size
        dtype = self.precision.parameters
        fields = {"h": Field((num_atoms, width), dtype)}
        if 0 < num_layers < self.config.num_layers:
            fields["v"] = Field((num_atoms, 3, width), dtype)
        return fields

    @staticmethod
    def work(config: PaiNNConfig, layer: int) -> Work:
        square = config.width**2
        if layer == config.num_layers:
            return Work(0, (config.width + 1) * head_width(config))
        messages, updates = len(message_branches(layer)), len(update_branches(config, layer))
        return Work(messages * config.num_radial * config.width, (1 + messages + 6 + 2 + updates) * square)

    traffic = staticmethod(costs.traffic)
    kept = staticmethod(costs.kept)

    def graph(self, batch: dict[str, Any]) -> Edges:
        """Distances and directions of all edges, of the input positions; every rank has them all."""
        edges, dtype = graph_of(batch, self.context), self.precision.parameters
        r_EC: Any = edges.r_EC
        square_E1 = dual.square_sum(r_EC) + self.config.distance_epsilon**2
        inverse_E1 = dual.rsqrt(square_E1)
        d_E = (square_E1 * inverse_E1).squeeze(-1)
        f_E = (cosine_cutoff if self.config.envelope == "cosine" else envelope)(d_E, self.config.cutoff)
        return Edges(
            edges.destination,
            edges.source,
            self.radial(d_E).to(dtype),
            f_E.unsqueeze(-1).to(dtype),
            (r_EC * inverse_E1).unsqueeze(-1).to(dtype),
        )
