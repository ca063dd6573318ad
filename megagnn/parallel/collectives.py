"""Collectives that autograd sees, as conjugate pairs.

[Note: four kinds] Over the ranks of a group, a tensor's value and its gradient are of a kind each:

    replicated  the same value everywhere, and the same (whole) gradient everywhere
    shared      the same value everywhere, but used by each rank for its own part: gradients are partial
    partial     the value is the sum over ranks; the gradient is shared
    sharded     each rank has its own slice of both

Replicated and sharded tensors have gradients of their own kind, shared and partial ones of each other's. So
every collective's backward is another one of this list, and its tangent is itself:

    copy            replicated -> shared      value stays      backward: reduce
    reduce          partial -> replicated     all-reduce       backward: copy
    gather          sharded -> shared         all-gather       backward: reduce_scatter
    reduce_scatter  partial -> sharded        reduce-scatter   backward: gather
    split           replicated -> sharded     own slice        backward: join
    join            sharded -> replicated     all-gather       backward: split
    unshare         shared -> replicated      value stays      backward: single
    single          replicated -> partial     rank 0 keeps it  backward: unshare

Each backward *applies the other Function*, so that it can be differentiated again. The textbook form, which
calls the collective inside `backward` where autograd does not see it, gives right energies, forces and
losses, and parameter gradients of a force loss that are wrong by tens of per cent.
"""

from typing import Any

import torch
from torch import Tensor

from megagnn.ops.dispatch import linear_function
from megagnn.parallel import messages
from megagnn.parallel.context import ParallelContext


def copy(x: Tensor, context: ParallelContext, axis: str = "tp") -> Tensor:
    """Replicated to shared (Megatron-LM's f); [Note: four kinds]."""
    return x if context.size(axis) == 1 else _Copy.apply(x, context, axis)


def reduce(x: Tensor, context: ParallelContext, axis: str = "tp") -> Tensor:
    """Partial to replicated, the sum over ranks (Megatron-LM's g); [Note: four kinds]."""
    return x if context.size(axis) == 1 else _Reduce.apply(x, context, axis)


def gather(x: Tensor, dim: int, context: ParallelContext, axis: str = "tp") -> Tensor:
    """Sharded along `dim` to shared; [Note: four kinds]."""
    return x if context.size(axis) == 1 else _Gather.apply(x, _negative(dim, x), context, axis)


def reduce_scatter(x: Tensor, dim: int, context: ParallelContext, axis: str = "tp") -> Tensor:
    """Partial to sharded along `dim`, whose size the ranks must divide; [Note: four kinds]."""
    return x if context.size(axis) == 1 else _ReduceScatter.apply(x, _negative(dim, x), context, axis)


def split(x: Tensor, dim: int, context: ParallelContext, axis: str = "tp") -> Tensor:
    """Replicated to sharded along `dim`, whose size the ranks must divide; [Note: four kinds]."""
    return x if context.size(axis) == 1 else _Split.apply(x, _negative(dim, x), context, axis)


def join(x: Tensor, dim: int, context: ParallelContext, axis: str = "tp") -> Tensor:
    """Sharded along `dim` to replicated; [Note: four kinds]."""
    return x if context.size(axis) == 1 else _Join.apply(x, _negative(dim, x), context, axis)


def unshare(x: Tensor, context: ParallelContext, axis: str = "tp") -> Tensor:
    """Shared to replicated: what follows is done alike on every rank, and counts once; [Note: four kinds]."""
    return x if context.size(axis) == 1 else _Unshare.apply(x, context, axis)


def single(x: Tensor, context: ParallelContext, axis: str = "tp") -> Tensor:
    """Replicated to partial: the first rank's counts, the others hold zeros; [Note: four kinds]."""
    return x if context.size(axis) == 1 else _Single.apply(x, context, axis)


def _negative(dim: int, x: Tensor) -> int:
    return dim if dim < 0 else dim - x.dim()


def start_gather_along(x: Tensor, dim: int, context: ParallelContext, axis: str) -> messages.Pending:
    """All-gather of equal slices along a dimension, outside of autograd."""
    return messages.start_all_gather(x.contiguous(), context, axis).then(lambda parts: unstack(parts, dim))


def start_reduce_scatter_along(x: Tensor, dim: int, context: ParallelContext, axis: str) -> messages.Pending:
    """Reduce-scatter of equal slices along a dimension, outside of autograd."""
    return messages.start_reduce_scatter(stack(x, dim, context.size(axis)), context, axis)


def unstack(parts: Tensor, dim: int) -> Tensor:
    """(ranks, ..., n, ...) to (..., ranks n, ...), parts side by side along `dim` (negative)."""
    moved = parts.movedim(0, parts.dim() - 1 + dim)
    return moved.flatten(moved.dim() + dim - 1, moved.dim() + dim)


def stack(whole: Tensor, dim: int, ranks: int) -> Tensor:
    """The inverse of `unstack`, contiguous. Raises ValueError where the ranks do not divide the size."""
    if whole.shape[dim] % ranks:
        raise ValueError(f"{ranks} ranks do not divide dimension {dim} of size {whole.shape[dim]}")
    parts = whole.unflatten(dim, (ranks, whole.shape[dim] // ranks))
    return parts.movedim(dim - 1, 0).contiguous()


def _first_keeps(x: Tensor, context: ParallelContext, axis: str) -> Tensor:
    return x.clone() if getattr(context, f"{axis}_rank") == 0 else torch.zeros_like(x)


def _own_slice(x: Tensor, dim: int, context: ParallelContext, axis: str) -> Tensor:
    return stack(x, dim, context.size(axis))[getattr(context, f"{axis}_rank")].clone()


def _all_reduce(x: Tensor, context: ParallelContext, axis: str) -> Tensor:
    return messages.all_reduce(x.clone(memory_format=torch.contiguous_format), context, axis)


def _all_gather(x: Tensor, dim: int, context: ParallelContext, axis: str) -> Tensor:
    return start_gather_along(x, dim, context, axis).wait()


def _sum_slices(x: Tensor, dim: int, context: ParallelContext, axis: str) -> Tensor:
    return start_reduce_scatter_along(x, dim, context, axis).wait()


def _same(x: Tensor, context: ParallelContext, axis: str) -> Tensor:
    return x.view_as(x)


_Copy: Any = linear_function("_Copy", _same, lambda: _Reduce)
_Reduce: Any = linear_function("_Reduce", _all_reduce, lambda: _Copy)
_Gather: Any = linear_function("_Gather", _all_gather, lambda: _ReduceScatter)
_ReduceScatter: Any = linear_function("_ReduceScatter", _sum_slices, lambda: _Gather)
_Split: Any = linear_function("_Split", _own_slice, lambda: _Join)
_Join: Any = linear_function("_Join", _all_gather, lambda: _Split)
_Unshare: Any = linear_function("_Unshare", _same, lambda: _Single)
_Single: Any = linear_function("_Single", _first_keeps, lambda: _Unshare)
