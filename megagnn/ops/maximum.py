"""Segment maximum over sorted rows (CSR), with a deterministic subgradient.

No layer uses it: it serves the benchmarks of scatter kernels.
"""

from typing import Any

import torch
from torch import Tensor

from megagnn.ops import extension, reference
from megagnn.ops.dispatch import below_autograd, check_values, has_kernels
from megagnn.ops.segment import Segments

_OPS = torch.ops.megagnn


def segment_max(values: Tensor, segments: Segments) -> Tensor:
    """Largest entry of each row, per column: values (E, ...) to (N, ...). Rows without entries are zero.

    values: float32, float64 or bfloat16; a NaN counts as largest. Where several entries are equal, the
    gradient goes to the first of them, in the order of ptr and perm, alone: a subgradient, deterministic.
    Raises ValueError for another type, or where values does not have one row per entry.
    """
    check_values("segment_max", values, segments.index.size(0), "entry of index")
    if not has_kernels(values):
        largest = reference.segment_max_entry(values, segments.index, segments.num_rows, segments.perm)
        return pick_entries(values, largest)
    if torch.compiler.is_compiling():
        return _OPS.segment_max(values, segments.index, segments.ptr, segments.perm)[0]
    return _SegmentMax.apply(values, segments.index, segments.ptr, segments.perm)[0]


def pick_entries(values: Tensor, entry: Tensor) -> Tensor:
    """values[entry[i, c], c], 0 where entry is -1: values (E, ...) and entry (N, ...) int64 to (N, ...)."""
    if values.size(0) == 0:
        return values.new_zeros(entry.shape) + values.sum()  # zero, and still a function of values
    return values.gather(0, entry.clamp(min=0)).masked_fill(entry < 0, 0)


def spread_entries(values: Tensor, entry: Tensor, num_entries: int) -> Tensor:
    """Transpose of `pick_entries`: values (N, ...) to (num_entries, ...), zero where no entry was picked."""
    out = values.new_zeros((num_entries, *values.shape[1:]))
    if num_entries == 0:
        return out
    return out.scatter_add(0, entry.clamp(min=0), values.masked_fill(entry < 0, 0))


class _SegmentMax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, index: Tensor, ptr: Tensor, perm: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with below_autograd():
            out, entry = _OPS.segment_max.default(values, index, ptr, perm)
        ctx.entry, ctx.num_entries = entry, index.size(0)
        ctx.mark_non_differentiable(entry)
        ctx.set_materialize_grads(False)
        return out, entry

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if grads[0] is None:
            return None, None, None, None
        return spread_entries(grads[0], ctx.entry, ctx.num_entries), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor, None]:
        return pick_entries(tangents[0], ctx.entry), None


def _keep_entry(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.num_entries = inputs[1].shape[0]


def _segment_max_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    return spread_entries(grad, ctx.saved_tensors[0], ctx.num_entries), None, None, None


def _largest(values: Tensor, index: Tensor, ptr: Tensor, perm: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (ptr.shape[0] - 1, *values.shape[1:])
    return values.new_empty(shape), values.new_empty(shape, dtype=torch.int64)


if extension.module is not None:
    torch.library.register_fake("megagnn::segment_max", _largest)
    torch.library.register_autograd("megagnn::segment_max", _segment_max_backward, setup_context=_keep_entry)
