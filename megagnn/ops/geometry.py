"""Vectors along edges and lattice translations, in one pass over the edges where the kernels serve.

As chains of gathers, products and sums each writes and reads (E, 3) three to five times, which in a small
model's step shows beside the edge operation. Both are linear, so their derivatives are sums and they again.
"""

from typing import Any

import torch
from torch import Tensor

from megagnn.ops import extension
from megagnn.ops.dispatch import below_autograd, kernel, linear_function
from megagnn.ops.segment import Segments, gather, segment_sum

_OPS = torch.ops.megagnn


def edge_difference(
    to_NC: Tensor, from_MC: Tensor, shift_EC: Tensor | None, destination: Segments, source: Segments
) -> Tensor:
    """r_e = from[j] + shift_e - to[i] for the edges e from j to i: (E, 3).

    to_NC: (N, 3), a row for each of destination; from_MC: (M, 3), a row for each of source.
    shift_EC: (E, 3), or None for zero.
    Can be differentiated any number of times, in reverse and forward mode.

    Raises:
        ValueError: positions without one row per row of the segments.
        RuntimeError: other sizes or types that do not fit, with the names.
    """
    for name, x, segments in (("to", to_NC, destination), ("from", from_MC, source)):
        if x.dim() != 2 or x.shape[0] != segments.num_rows:
            raise ValueError(
                f"edge_difference: {name} must be a matrix of one row per row of its segments, "
                f"{segments.num_rows}, got shape {tuple(x.shape)}"
            )
    if not _has_kernels(to_NC):
        return edge_difference_reference(to_NC, from_MC, shift_EC, destination, source)
    return _Difference.apply(to_NC, from_MC, shift_EC, destination, source)


def edge_difference_reference(
    to_NC: Tensor, from_MC: Tensor, shift_EC: Tensor | None, destination: Segments, source: Segments
) -> Tensor:
    """`edge_difference` by gathers."""
    sender_EC = gather(from_MC, source)
    return (sender_EC if shift_EC is None else sender_EC + shift_EC) - gather(to_NC, destination)


def lattice_shift(cell_B33: Tensor, shifts_EC: Tensor, structure_E: Tensor) -> Tensor:
    """sum_k shifts[e, k] cell[b, k], Å: the translation of each edge's sender, (E, 3).

    cell_B33: lattice vectors of B structures, one per row, Å; shifts_EC: (E, 3), how many of each.
    structure_E: (E,) int64, the structure of each edge.
    Can be differentiated any number of times, in reverse and forward mode.
    Raises RuntimeError for sizes or types that do not fit, with the names.
    """
    if not _has_kernels(cell_B33) or shifts_EC.requires_grad:
        return lattice_shift_reference(cell_B33, shifts_EC, structure_E)
    out: Tensor = _Translation.apply(cell_B33, shifts_EC, structure_E, cell_B33.shape[0])
    return out


def lattice_shift_reference(cell_B33: Tensor, shifts_EC: Tensor, structure_E: Tensor) -> Tensor:
    """`lattice_shift` by a gather of cells."""
    return (cell_B33[structure_E] * shifts_EC.unsqueeze(-1)).sum(-2)


def _has_kernels(values: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return extension.has_cpu and values.is_cpu and values.dtype in (torch.float32, torch.float64)


class _Difference(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, to: Tensor, sender: Tensor, shift: Tensor | None, destination: Segments, source: Segments
    ) -> Tensor:
        ctx.destination, ctx.source = destination, source
        ctx.like = to.new_empty(0)  # of the type of what a missing tangent stands for
        ctx.rows = to.shape[0], sender.shape[0]
        with below_autograd():
            return _OPS.edge_difference.default(to, sender, shift, destination.index, source.index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        by_to = -segment_sum(grad, ctx.destination) if ctx.needs_input_grad[0] else None
        by_sender = segment_sum(grad, ctx.source) if ctx.needs_input_grad[1] else None
        return by_to, by_sender, grad if ctx.needs_input_grad[2] else None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        to, sender = (
            ctx.like.new_zeros(rows, 3) if t is None else t
            for t, rows in zip(tangents[:2], ctx.rows, strict=True)
        )
        return _Difference.apply(to, sender, tangents[2], ctx.destination, ctx.source)


def _cell_gradient(grad: Tensor, shifts: Tensor, structure: Tensor, num_cells: int) -> Tensor:
    """The transpose: sum over the edges of a structure of shifts[e, k] grad[e], (B, 3, 3)."""
    outer = shifts.unsqueeze(-1) * grad.unsqueeze(-2)
    return grad.new_zeros(num_cells, 3, 3).index_add_(0, structure, outer)


def _translated(cell: Tensor, shifts: Tensor, structure: Tensor, num_cells: int) -> Tensor:
    return kernel("lattice_shift")(cell, shifts, structure)


_Translation: Any = linear_function("_Translation", _translated, lambda: _CellGradient)
_CellGradient: Any = linear_function("_CellGradient", _cell_gradient, lambda: _Translation)
