"""Cartesian tensors up to l = 2 as a model family.

An atom has scalars h (F), vectors v (3, F1) and symmetric traceless tensors t (five components, F2); behind
the embedding v = t = 0. A layer, with x one of h, v and t, L layers and A neighbours on average:

    n_x = gamma_x x / sigma       sigma^2 = mean over h, v, t of the mean square of a component, and epsilon
    a_x = U_x n_x,    r_x = R_x n_x,    g_x = G_x n_h                                       F_x, or F, to Fe
    u_x = r_x + A^(-1/2) sum_j m_x(a_j, rh_ij, w(d_ij))        14 paths, channel by channel: messages.py
    c   = 1 / sqrt(1 + q)                                      q the mean square of u, as sigma^2 of n
    y_h = [ SiLU(g_h + k_h u_h) u_h,      c u_v . u_v,               c u_t . u_t ]
    y_v = [ sigmoid(g_v + k_v u_h) u_v,   c T u_v ]                             T the matrix of u_t
    y_t = [ sigmoid(g_t + k_t u_h) u_t,   c sym0(u_v (x) u_v),       c sym0(T T) ]
    x  <- x + L^(-1/2) O_x y_x

with sym0 the symmetric traceless part. The weight of a path is a linear combination of Bessel functions, or
of splines, of the distance times the envelope. One norm for all degrees leaves small what is still near zero;
c lets the products of an atom's sums with themselves, which add one to the body order each layer, grow
linearly.

All products of channels with channels are per atom: over tensor-parallel ranks the edges are divided by
channels and send nothing. The messages and their sums are one operation (edge.py); norm, gates and products
are three (atoms.py).
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megagnn.data import keys
from megagnn.models.cartesian import costs, messages
from megagnn.models.cartesian.atoms import gates_and_products, mean_square, parts_of
from megagnn.models.cartesian.config import CartesianConfig
from megagnn.models.cartesian.costs import reads_of, writes_of
from megagnn.models.cartesian.edge import has_kernels, neighbour_sums, planes_of
from megagnn.models.cartesian.messages import COMPONENTS, Edges, direction_matrices, paths_of
from megagnn.models.cartesian.parts import (
    EnergyHead,
    MergedNorm,
    PathWeights,
    RowSum,
    splines_of,
    width_key,
)
from megagnn.models.family import Field, Model, State, Work
from megagnn.models.parts import DISTANCE_EPSILON, branch_rate, graph_of, laws, refuse_edge_plan
from megagnn.models.radial import DistanceFeature, envelope
from megagnn.ops import dual
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import Constant, make_parameter
from megagnn.tensor_parallel.layers import ColumnLinear, RowLinear, gather_channels


class CartesianLayer(nn.Module):
    """State `h` (N, F/tp) and, behind the first layer, `v` (N, 3, F1/tp) and `t` (N, 5, F2/tp) to the next.

    The last layer changes what outputs read: `h`, and `v` of which direct forces are, which it returns as
    `forces` (N, 3).
    """

    def __init__(
        self,
        config: CartesianConfig,
        number: int,
        mean_neighbours: float,
        context: ParallelContext,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.context, self.reads, self.writes = context, reads_of(config, number), writes_of(config, number)
        self.paths, rate = paths_of(config.paths, self.reads), branch_rate(config)
        edge, self.edge_widths = config.message_width, dict.fromkeys(config.widths, config.message_width)

        def column(name: str) -> ColumnLinear:
            inputs = config.widths[name]
            law = laws(config, inputs, rate=rate, width=config.width)
            return ColumnLinear(inputs, edge, context, law, dtype, bias=name == "h", name="model.edge_width")

        self.norm = MergedNorm(config, self.reads, context, dtype)
        self.up = nn.ModuleDict({name: column(name) for name in self.reads})
        self.residual = nn.ModuleDict({name: column(name) for name in self.reads})
        self.gates = nn.ModuleDict({name: column("h") for name in self.writes})
        self.gate_slopes = nn.ParameterDict(
            {
                name: make_parameter((edge,), 0, context, Constant(1.0), dtype, "model.edge_width", rate)
                for name in self.writes
            }
        )
        scale = mean_neighbours**-0.5
        self.path_weights = PathWeights(config, self.paths, scale, context, dtype)
        self.down = nn.ModuleDict({name: RowSum(config, name, context, dtype) for name in self.writes})
        self.force_head = None
        if number == config.num_layers - 1 and config.forces == "direct":
            width = config.widths["v"]
            out = laws(config, width, "output", scale=0.1, width=config.width)
            names = (width_key("v"), width_key("v"))
            self.force_head = RowLinear(width, 1, context, out, dtype, bias=False, names=names)
        self.scale = config.num_layers**-0.5 if config.depth_scaling else 1.0

    def forward(self, state: State, edges: Edges) -> State:
        """See the class."""
        planes = edges.basis_planes
        fused = planes is not None and planes.is_cpu  # a GPU has the chain
        state = {name: state[name] for name in self.reads}
        n = {name: gather_channels(x, self.context) for name, x in self.norm(state, fused).items()}
        made = {name: self.products_of(name, x) for name, x in n.items()}
        a = {name: parts[0] for name, parts in made.items()}
        residual = {name: parts[1] for name, parts in made.items()}
        sums = neighbour_sums(self.paths, self.path_weights(), a, edges)
        u, square_N1 = mean_square(sums, self.edge_widths, self.context, fused, residual)
        gates = (made["h"][2], self.gate_slopes)
        y = gates_and_products(u, square_N1, *gates, edges.tensor_basis, fused)
        for name in self.writes:
            change = self.down[name](y[name])
            state[name] = dual.add(state.get(name), change, self.scale)
        if self.force_head is None:
            return {name: state[name] for name in self.writes}
        return {"h": state["h"], "forces": self.force_head(state["v"]).squeeze(-1)}

    def products_of(self, name: str, n: Any) -> list[Any]:
        """All Linears of a field in one product: what is sent, the residual and, of scalars, the gates."""
        linears = [self.up[name], self.residual[name], *(self.gates.values() if name == "h" else ())]
        weight = torch.cat([linear.weight for linear in linears])
        bias = torch.cat([linear.bias for linear in linears]) if name == "h" else None
        edge = linears[0].weight.shape[0]
        return dual.split(dual.linear(n, weight, bias), [edge, edge, len(weight) - 2 * edge][: len(linears)])


class Cartesian(Model):
    """See `Model`, and the module for the formulas.

    Raises ValueError for the plan `edge`: edges are divided by channels.
    """

    tensor_basis: Tensor | None

    def build(self) -> None:
        """See `Model`."""
        refuse_edge_plan(self.plan, "the Cartesian family")
        config, context, dtype = self.config, self.context, self.precision.parameters
        self.radial = DistanceFeature("bessel", config.num_radial, config.cutoff, self.precision.edge)
        for k in self.part.layers:
            layer = CartesianLayer(config, k, self.statistics.mean_neighbours, context, dtype)
            self.layers.add_module(str(k), layer)
        self.energy_head = EnergyHead(config, context, dtype) if self.part.head else None
        basis = messages.tensor_basis().to(dtype) if "t" in config.widths else None
        self.register_buffer("tensor_basis", basis, persistent=False)

    def fields(self, num_layers: int, batch: dict[str, Any]) -> dict[str, Field]:
        """`h` (N, F/tp) and, between layers, `v` (N, 3, F1/tp) and `t` (N, 5, F2/tp)."""
        num_atoms, dtype = len(batch[keys.ATOMIC_NUMBERS]), self.precision.parameters
        tp, widths = self.context.tp_size, self.config.widths
        names = widths if 0 < num_layers < self.config.num_layers else ("h",)
        return {
            name: Field((num_atoms, *([] if name == "h" else [COMPONENTS[name]]), widths[name] // tp), dtype)
            for name in names
        }

    @staticmethod
    def work(config: CartesianConfig, layer: int) -> Work:
        """Multiply-adds of the Linears, of the paths' weights and messages, or of the head's two products."""
        if layer == config.num_layers:
            return Work(0, config.width * (config.width + 1))
        edge, widths, size = config.message_width, config.widths, COMPONENTS
        reads, writes = reads_of(config, layer), writes_of(config, layer)
        up = 2 * sum(size[name] * widths[name] for name in reads) + len(writes) * config.width
        down = sum(size[name] * widths[name] * len(parts_of(config.widths, name)) for name in writes)
        # between five components and 3 x 3 matrices, of one field and back of two products
        changes = 45 * (("v" in writes) + 2 * ("t" in writes)) if "t" in widths else 0
        paths = paths_of(config.paths, reads)
        products, channelwise = messages.work(paths)
        functions = 4 if config.num_splines else config.num_radial  # that are not zero
        per_edge = edge * (len(paths) * functions + products + channelwise)
        return Work(per_edge, edge * (up + down + changes), edge * channelwise)

    traffic = staticmethod(costs.traffic)
    kept = staticmethod(costs.kept)

    def graph(self, batch: dict[str, Any]) -> Edges:
        """Distances and directions of all edges, of the input positions; every rank has them all."""
        edges, dtype = graph_of(batch, self.context), self.precision.parameters
        r_EC: Any = edges.r_EC
        square_E1 = dual.square_sum(r_EC) + DISTANCE_EPSILON**2
        inverse_E1 = dual.rsqrt(square_E1)
        d_E = (square_E1 * inverse_E1).squeeze(-1)
        unit_EC = r_EC * inverse_E1
        splines = splines_of(self.config)
        functions_ER, first_E = splines(d_E) if splines else (self.radial(d_E), None)
        basis_ER: Any = functions_ER * envelope(d_E, self.config.cutoff).unsqueeze(-1)
        ends, basis = (edges.destination, edges.source), self.tensor_basis
        shared: dict[str, Any] = {"tensor_basis": basis, "first_E": first_E}
        if self.config.edge_operation == "fused" and has_kernels(edges.source.index.device, dtype):
            planes = (planes_of(basis_ER, dtype), planes_of(unit_EC, dtype))
            return Edges(*ends, basis_planes=planes[0], unit_planes=planes[1], **shared)
        found = Edges(*ends, basis_ER.to(dtype), unit_EC.unsqueeze(-1).to(dtype), **shared)
        if basis is None:
            return found
        matrix_E5C, tensor_E51 = (x.to(dtype) for x in direction_matrices(unit_EC))
        return replace(found, matrix_E5C=matrix_E5C, tensor_E51=tensor_E51)
