"""Segment sum and mean over sorted rows (CSR), their transpose, the gather, and the segment maximum.

The first three are linear and one another's backward, so they can be differentiated any number of times, in
reverse and forward mode. Sums are deterministic: on a CPU the order in which a row is summed depends on the
row alone, not on the number of threads.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megagnn.ops import extension, reference
from megagnn.ops.dispatch import below_autograd, check_values, has_kernels, kernel, linear_function

_OPS = torch.ops.megagnn


@dataclass(frozen=True)
class Segments:
    """Which row each of E entries belongs to, in the two forms the operations need.

    index: (E,) int64, the row of each entry.
    ptr: (N+1,) int64, rising from 0 to E.
    perm: (E,) int64 or None. The entries of row i are perm[ptr[i]:ptr[i+1]]; without it they are
        ptr[i]:ptr[i+1], that is, index is sorted.

    Edges by destination: Segments(edge_index[0], row_ptr). Edges by source: Segments(edge_index[1],
    source_ptr, source_perm). Atoms by structure: Segments(batch, graph_ptr).

    Raises ValueError where shapes, types or devices do not fit; `validate` also looks at the contents.
    """

    index: Tensor
    ptr: Tensor
    perm: Tensor | None = None

    def __post_init__(self) -> None:
        for name, tensor in (("index", self.index), ("ptr", self.ptr), ("perm", self.perm)):
            if tensor is not None:
                self._check_vector(name, tensor)
        if self.ptr.shape[0] < 1:
            raise ValueError("Segments: ptr must have one element more than there are rows, got none")
        if self.perm is not None and self.perm.shape != self.index.shape:
            raise ValueError(
                f"Segments: perm must have one element per entry, got {self.perm.shape[0]} "
                f"for {self.num_entries} entries"
            )

    def _check_vector(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype != torch.int64 or tensor.dim() != 1:
            raise ValueError(
                f"Segments: {name} must be a vector of int64, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}"
            )
        if tensor.device != self.index.device:
            raise ValueError(
                f"Segments: {name} must be on the device of index, {self.index.device}, got {tensor.device}"
            )

    @property
    def num_rows(self) -> int:
        return self.ptr.shape[0] - 1

    @property
    def num_entries(self) -> int:
        return self.index.shape[0]

    def validate(self) -> None:
        """Raises ValueError unless ptr, perm and index agree; reads their contents, waiting for a GPU."""
        counts = self.ptr.diff()
        first, last, falls = int(self.ptr[0]), int(self.ptr[-1]), bool((counts < 0).any())
        if first != 0 or last != self.num_entries or falls:
            raise ValueError(
                f"Segments: ptr must rise from 0 to the number of entries, {self.num_entries}, "
                f"got {first} to {last}{', falling on the way' if falls else ''}"
            )
        entries = torch.arange(self.num_entries, device=self.ptr.device)
        if self.perm is not None and not torch.equal(self.perm.sort().values, entries):
            raise ValueError(
                "Segments: perm must name every entry once, got one that repeats or leaves some out"
            )
        rows = torch.repeat_interleave(torch.arange(self.num_rows, device=self.ptr.device), counts)
        if not torch.equal(self.index if self.perm is None else self.index[self.perm], rows):
            raise ValueError(
                "Segments: index must name the rows that ptr and perm give, got others; "
                "sort the entries by row, or pass perm = argsort(index, stable=True)"
            )


def segment_sum(values: Tensor, segments: Segments) -> Tensor:
    """Sum over the entries of each row: values (E, ...) to (N, ...).

    values: float32, float64 or bfloat16 (summed in float32, rounded once). Rows without entries are zero.
    Raises ValueError for another type, or where values does not have one row per entry.
    """
    check_values("segment_sum", values, segments.index.size(0), "entry of index")
    if not has_kernels(values):
        return reference.segment_sum(values, segments.index, segments.num_rows)
    if torch.compiler.is_compiling():
        return _OPS.segment_sum(values, segments.index, segments.ptr, segments.perm)
    return _SegmentSum.apply(values, segments.index, segments.ptr, segments.perm)


def segment_mean(values: Tensor, segments: Segments) -> Tensor:
    """Mean over the entries of each row: values (E, ...) to (N, ...). Rows without entries are zero.

    Types and errors as `segment_sum`; the division is in the accumulator's type, before the one rounding.
    """
    check_values("segment_mean", values, segments.index.size(0), "entry of index")
    if not has_kernels(values):
        return reference.segment_mean(values, segments.index, segments.num_rows)
    if torch.compiler.is_compiling():
        return _OPS.segment_mean(values, segments.index, segments.ptr, segments.perm)
    return _SegmentMean.apply(values, segments.index, segments.ptr, segments.perm)


def gather(values: Tensor, segments: Segments) -> Tensor:
    """The row of each entry, values[index]: values (N, ...) to (E, ...); the transpose of `segment_sum`.

    Its backward sums in the order of ptr and perm: by source that is the transposed gather, without atomics.
    Raises ValueError for a type other than float32, float64 or bfloat16, or where values has not N rows.
    """
    check_values("gather", values, segments.ptr.size(0) - 1, "row of ptr")
    if not has_kernels(values):
        return reference.gather(values, segments.index)
    if torch.compiler.is_compiling():
        return _OPS.gather(values, segments.index, segments.ptr, segments.perm)
    return _Gather.apply(values, segments.index, segments.ptr, segments.perm)


# [Note: two ways into autograd]
# The operations carry registered formulas (below), which torch.compile, torch.export and opcheck see. Their
# dispatch passes through Python twice, which shows in a small batch's step. In eager mode the functions above
# therefore enter by these Functions, which call the kernels below autograd; the formulas are the same.
# Forward mode is known to the Functions alone.
_SegmentSum: Any = linear_function("_SegmentSum", kernel("segment_sum"), lambda: _Gather)
_Gather: Any = linear_function("_Gather", kernel("gather"), lambda: _SegmentSum)


class _SegmentMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, ptr: Tensor, perm: Tensor | None) -> Tensor:
        ctx.segments = (index, ptr, perm)
        return kernel("segment_mean")(values, index, ptr, perm)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _Gather.apply(_over_counts(grads[0], ctx.segments[1]), *ctx.segments), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return _SegmentMean.apply(tangents[0], *ctx.segments)


def _over_counts(values: Tensor, ptr: Tensor) -> Tensor:
    """Each row of values (N, ...) over its number of entries; rows without any as they are."""
    counts = ptr.diff().clamp(min=1).to(values.dtype)
    return values / counts.view(-1, *(1,) * (values.dim() - 1))


def _keep_segments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, ptr, perm = inputs
    ctx.save_for_backward(index, ptr, perm)


def _segment_mean_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return _OPS.gather(_over_counts(grad, ctx.saved_tensors[1]), *ctx.saved_tensors), None, None, None


def _reduced(values: Tensor, index: Tensor, ptr: Tensor, perm: Tensor | None) -> Tensor:
    return values.new_empty((ptr.shape[0] - 1, *values.shape[1:]))


def _gathered(values: Tensor, index: Tensor, ptr: Tensor, perm: Tensor | None) -> Tensor:
    return values.new_empty((index.shape[0], *values.shape[1:]))


if extension.module is not None:
    for _name, _fake, _backward in (
        ("segment_sum", _reduced, lambda ctx, g: (_OPS.gather(g, *ctx.saved_tensors), None, None, None)),
        ("segment_mean", _reduced, _segment_mean_backward),
        ("gather", _gathered, lambda ctx, g: (_OPS.segment_sum(g, *ctx.saved_tensors), None, None, None)),
    ):
        torch.library.register_fake(f"megagnn::{_name}", _fake)
        torch.library.register_autograd(f"megagnn::{_name}", _backward, setup_context=_keep_segments)


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
