"""What a rank sends in a pass through the whole EGNN, by formulas.

With those of edges in models/egnn/traffic_model.py, and its letters, per layer:

    atoms, forward    u P N (F + D + F) + 2u P N                gather h; scatter D and F; sum of squares
    atoms, backward   the same, and 2u 3P N for the coordinates that the layer moved

A layer that is run again sends its forward once more, except the last scatter of F; together with `recompute`
blocks only its atoms' part.
"""

from fractions import Fraction

from megagnn.models.egnn.config import EGNNConfig
from megagnn.models.egnn.edge.operation import Plan
from megagnn.models.egnn.traffic_model import Pass, Setting, Widths, edge_elements, has_vector


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


def pass_elements(config: EGNNConfig, plan: Plan, s: Setting, positions: int = 0) -> Pass:
    """Elements that the whole model sends, once forward and once backward.

    positions: elements of positions, and of cells under stress, that require grad: 3N (+ 9B), or 0.
    """
    w, moved = Widths.of(config), 2 * s.u * s.planes * 3 * s.num_atoms
    forward = backward = Fraction(0)
    for layer in range(config.num_layers):
        vector, last = has_vector(config, layer), layer == config.num_layers - 1
        parts = (
            edge_elements(plan, s, w, vector),
            atom_elements(s, w, first=layer == 0 and not s.weights_wanted),
        )
        forward += sum(part.forward for part in parts)
        backward += sum(part.backward for part in parts) + (moved if vector and not last else 0)
    head = head_elements(s, w)
    return Pass(forward + head.forward, backward + head.backward + 2 * s.u * positions)
