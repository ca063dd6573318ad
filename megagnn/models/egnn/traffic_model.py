"""What a rank sends, derived from the layout, and the plan that sends less.

Elements of a layer in a pass, exactly as `parallel.context.Traffic` counts them; tests compare the
two. With t ranks, u = (t-1)/t, P planes (1 for values, 2 for pairs of value and tangent), N atoms, n of them
this rank's rows under `edge`, E edges, widths F (node), H (hidden of phi_e), M (message), K (hidden of
phi_x), D (hidden of phi_h), R distance features:

    channel, forward  u P E M      with phi_x also  u P E K + 2u P E
    channel, backward the same, and u P E (M + K) where the products are recomputed
    edge, forward     P (N-n) H/t + u P N H + u P n M + u W     with phi_x also  3 (t-1) P n
    edge, backward    P (N-n) M/t + u P n H + u P N H + 2 u W   and P (N-n) H/t + u P N H recomputed

    atoms, forward    u P N (F + D + F) + 2u P N                gather h; scatter D and F; sum of squares
    atoms, backward   the same, and 2u 3P N for the coordinates that the layer moved

W are the weights of the edge products, M H + K M + H R and biases. A recomputed layer sends its
forward once more, except the last scatter of F; together with `recompute` blocks only its atoms' part.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megagnn.data import keys
from megagnn.models.costs import Pass, Setting
from megagnn.models.egnn.config import EGNNConfig
from megagnn.models.egnn.edge.operation import Plan
from megagnn.models.family import PlanChoice
from megagnn.parallel.context import ParallelContext


@dataclass(frozen=True)
class Widths:
    """Sizes of a layer, see the module."""

    F: int
    H: int
    M: int
    K: int
    D: int
    R: int
    normed: bool
    vector_bias: bool

    @classmethod
    def of(cls, config: EGNNConfig) -> Widths:
        width = config.width
        return cls(
            F=width,
            H=config.message_hidden or width,
            M=config.message_width or width,
            K=config.coordinate_hidden or width,
            D=config.node_hidden or width,
            R=config.num_radial if config.distance_feature in ("bessel", "gaussian") else 1,
            normed=config.normalisation == "rms",
            vector_bias=config.coordinate_bias,
        )

    def weights(self, vector: bool) -> int:
        """W: elements that the plan `edge` gathers."""
        return self.M * self.H + self.H * self.R + self.M + (self.K * (self.M + 2) if vector else 0)


def edge_elements(plan: Plan, s: Setting, w: Widths, vector: bool) -> Pass:
    """Elements that a layer's edge operation sends."""
    u, t, P, N, n, E = s.u, s.ranks, s.planes, s.num_atoms, s.own_atoms, s.num_edges
    K = w.K if vector else 0
    if plan == "channel":
        scalar = 2 * u * P * E if vector else 0
        forward = u * P * E * (w.M + K) + scalar
        backward = forward + (u * P * E * (w.M + K) if s.blocks_again else 0)
    else:
        inputs = P * (N - n) * Fraction(w.H, t) + u * P * N * w.H
        weights = u * w.weights(vector)
        forward = inputs + u * P * n * w.M + weights + (3 * (t - 1) * P * n if vector else 0)
        backward = P * (N - n) * Fraction(w.M, t) + u * P * (n + N) * w.H + weights
        backward += inputs if s.blocks_again else 0
        if s.weights_wanted:
            backward += weights + (2 * u if vector and w.vector_bias else 0)
    if (
        s.layers_again and not s.blocks_again
    ):  # whole weights are held from the second forward to the backward
        backward += forward - (u * w.weights(vector) if plan == "edge" else 0)
    return Pass(Fraction(forward), Fraction(backward))


def has_vector(config: EGNNConfig, layer: int) -> bool:
    """Whether a layer has a coordinate branch or the force head."""
    if layer == config.num_layers - 1:
        return config.forces == "direct"
    return config.update_coordinates


def atom_elements(s: Setting, w: Widths, first: bool = False) -> Pass:
    """Elements that a layer's atoms send; `first`: no gradient reaches the features before the layer."""
    u, P, N = s.u, s.planes, s.num_atoms
    norm, entry = 2 * u * P * N if w.normed else Fraction(0), u * P * N * w.F
    forward = norm + entry + u * P * N * (w.D + w.F)
    backward = u * P * N * (w.D + w.F) + (0 if first else norm + entry)
    if s.layers_again:
        backward += norm + entry + u * P * N * w.D
    return Pass(forward, backward)


def head_elements(s: Setting, w: Widths) -> Pass:
    """Elements that the energy head sends."""
    u, P, N = s.u, s.planes, s.num_atoms
    norm = 2 * u * P * N if w.normed else Fraction(0)
    return Pass(norm + u * P * N * w.F + 2 * u * P * N, norm + u * P * N * w.F)


def layer_elements(config: EGNNConfig, layer: int, plan: Plan, setting: Setting) -> Pass:
    """Elements that a layer sends, or the energy head; see `Model.traffic`."""
    s = setting
    w, last = Widths.of(config), layer == config.num_layers - 1
    if layer == config.num_layers:
        return head_elements(s, w)
    vector = has_vector(config, layer)
    edges = edge_elements(plan, s, w, vector)
    atoms = atom_elements(s, w, first=layer == 0 and not s.weights_wanted)
    moved = 2 * s.u * s.planes * 3 * s.num_atoms if vector and not last else 0
    return Pass(edges.forward + atoms.forward, edges.backward + atoms.backward + moved)


def edge_total(plan: Plan, config: EGNNConfig, ranks: int, num_atoms: int, num_edges: int) -> Fraction:
    """Elements that the edge operations of a training step send, with rows of equal size on every rank."""
    w, total = Widths.of(config), Fraction(0)
    planes = (1, 2) if config.forces == "conservative" else (1,)
    for count in planes:
        s = Setting(
            ranks,
            count,
            num_atoms,
            Fraction(num_atoms, ranks),
            num_edges,
            config.edge_memory == "recompute",
            config.recompute_layers,
            weights_wanted=count == planes[-1],
        )
        vectors = sum(has_vector(config, layer) for layer in range(config.num_layers))
        total += vectors * sum(edge_elements(plan, s, w, vector=True))
        total += (config.num_layers - vectors) * sum(edge_elements(plan, s, w, vector=False))
    return total


def least_plan(config: EGNNConfig, choice: PlanChoice, ranks: int, num_atoms: int, num_edges: int) -> Plan:
    """The plan that is chosen, for `auto` the one whose edges send less."""
    if choice != "auto":
        return choice
    plans: tuple[Plan, Plan] = ("edge", "channel")
    return min(plans, key=lambda plan: edge_total(plan, config, ranks, num_atoms, num_edges))


def choose_plan(
    choice: PlanChoice, config: EGNNConfig, batch: dict[str, Any], context: ParallelContext
) -> Plan | None:
    """The plan for a batch, the same on every rank of the group; None on one rank."""
    if context.tp_size == 1:
        return None
    if choice != "auto":
        return choice
    sizes = (context.tp_size, len(batch[keys.ATOMIC_NUMBERS]), batch[keys.EDGE_INDEX].shape[1])
    return least_plan(config, choice, *sizes)
