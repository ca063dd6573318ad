"""Collectives on buffers, outside of autograd; nothing is sent on one rank.

Every call counts what it sends (`context.Traffic`). Tensors must be contiguous: gloo reduces a strided view
wrongly and overwrites the memory beside it. A tensor without elements is no message.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megagnn.parallel.context import ParallelContext


class Pending:
    """A message under way; `wait` gives its result, once."""

    def __init__(self, work: "dist.Work | None", finish: Callable[[], Tensor]) -> None:
        self._work, self._finish = work, finish

    def wait(self) -> Tensor:
        """The result, when it is there."""
        if self._work is not None:
            self._work.wait()
        return self._finish()

    def then(self, function: Callable[[Tensor], Tensor]) -> "Pending":
        """The same message, with a function of its result as the result."""
        return Pending(None, lambda: function(self.wait()))


def done(tensor: Tensor) -> Pending:
    """A message that has arrived already."""
    return Pending(None, lambda: tensor)


def check_contiguous(operation: str, tensor: Tensor) -> None:
    """Raises ValueError for a tensor that gloo would corrupt."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"{operation} needs a contiguous tensor, got strides {tensor.stride()}; call .contiguous() first"
        )


def _count(context: ParallelContext, axis: str, kind: str, whole: int, times: int, element_size: int) -> None:
    ranks = context.size(axis)
    context.traffic.count(axis, kind, Fraction(times * whole * (ranks - 1), ranks), element_size)


def start_all_reduce(tensor: Tensor, context: ParallelContext, axis: str) -> Pending:
    """Sum over the ranks of an axis, in place."""
    check_contiguous("all_reduce", tensor)
    if context.size(axis) == 1 or tensor.numel() == 0:
        return done(tensor)
    _count(context, axis, "all_reduce", tensor.numel(), 2, tensor.element_size())
    work = dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=context.group(axis), async_op=True)
    return Pending(work, lambda: tensor)


def all_reduce(tensor: Tensor, context: ParallelContext, axis: str) -> Tensor:
    """Sum over the ranks of an axis, in place; returns the tensor."""
    return start_all_reduce(tensor, context, axis).wait()


def start_all_gather(tensor: Tensor, context: ParallelContext, axis: str) -> Pending:
    """The tensors of all ranks, all of one shape: (...) to (ranks, ...)."""
    check_contiguous("all_gather", tensor)
    ranks = context.size(axis)
    if ranks == 1:
        return done(tensor.unsqueeze(0))
    out = tensor.new_empty((ranks, *tensor.shape))
    if tensor.numel() == 0:
        return done(out)
    _count(context, axis, "all_gather", out.numel(), 1, tensor.element_size())
    work = _gather_into(out.view(-1), tensor.view(-1), group=context.group(axis), async_op=True)
    return Pending(work, lambda: out)


_SUM_TAG = 1  # other messages between two ranks have 0, and need not be in one order with these

# The names without `_single` are deprecated since PyTorch 2.13.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_sum = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def start_fill_rows(rows: Tensor, context: ParallelContext, axis: str) -> Pending:
    """Every rank's own row to all others, in place: (ranks, n), of which row r is there on rank r.

    An all-gather that needs no memory besides its result. Over gloo the rows travel point to point, which
    moves three to six times the bytes per second of its all-gather from a megabyte on.
    """
    check_contiguous("fill_rows", rows)
    ranks, rank = context.size(axis), getattr(context, f"{axis}_rank")
    if rows.ndim != 2 or rows.shape[0] != ranks:
        raise ValueError(f"fill_rows needs one row per rank, ({ranks}, n), got {tuple(rows.shape)}")
    if ranks == 1 or rows.numel() == 0:
        return done(rows)
    _count(context, axis, "all_gather", rows.numel(), 1, rows.element_size())
    group = context.group(axis)
    if dist.get_backend(group) != "gloo":
        work = _gather_into(rows.view(-1), rows[rank], group=group, async_op=True)
        return Pending(work, lambda: rows)
    works: list[Any] = []
    for shift in range(1, ranks):
        to, source = (rank + shift) % ranks, (rank - shift) % ranks
        works.append(dist.isend(rows[rank], group=group, group_dst=to))
        works.append(dist.irecv(rows[source], group=group, group_src=source))

    def finish() -> Tensor:
        for each in works:
            each.wait()
        return rows

    return Pending(None, finish)


def start_sum_rows(rows: Tensor, context: ParallelContext, axis: str) -> Pending:
    """Row r becomes the sum over ranks on rank r, in place: (ranks, n), rows that each lie in one piece.

    A reduce-scatter that needs memory for what arrives only: rows leave from where they are, and must not be
    written before the result is there. The result is this rank's row; the others are as they were. Over gloo
    point to point, added up in the ranks' order: no bit depends on how the whole is cut into messages.
    """
    ranks, rank = context.size(axis), getattr(context, f"{axis}_rank")
    if rows.ndim != 2 or rows.shape[0] != ranks:
        raise ValueError(f"sum_rows needs one row per rank, ({ranks}, n), got {tuple(rows.shape)}")
    check_contiguous("sum_rows", rows[rank])
    if ranks == 1 or rows.numel() == 0:
        return done(rows[rank])
    _count(context, axis, "reduce_scatter", rows.numel(), 1, rows.element_size())
    group = context.group(axis)
    if dist.get_backend(group) != "gloo":
        stacked, out = rows.contiguous(), torch.empty_like(rows[rank])
        work = _scatter_sum(out, stacked.view(-1), op=dist.ReduceOp.SUM, group=group, async_op=True)
        return Pending(work, lambda: rows[rank].copy_(out))
    arriving = iter(rows.new_empty(ranks - 1, rows.shape[1]))
    others = {source: next(arriving) for source in range(ranks) if source != rank}
    works: list[Any] = []
    for shift in range(1, ranks):
        to, source = (rank + shift) % ranks, (rank - shift) % ranks
        works.append(dist.isend(rows[to], group=group, group_dst=to, tag=_SUM_TAG))
        works.append(dist.irecv(others[source], group=group, group_src=source, tag=_SUM_TAG))

    def finish() -> Tensor:
        for each in works:
            each.wait()
        own, before = rows[rank], [others[source] for source in range(rank)]
        for row in before[1:]:
            before[0].add_(row)
        for row in before[:1] + [others[source] for source in range(rank + 1, ranks)]:
            own.add_(row)
        return own

    return Pending(None, finish)


def start_reduce_scatter(stacked: Tensor, context: ParallelContext, axis: str) -> Pending:
    """Part r of the sum over ranks to rank r: (ranks, ...) to (...).

    Over gloo, whose own reduce-scatter is several times slower, an all-to-all and a sum in the ranks' order.
    """
    check_contiguous("reduce_scatter", stacked)
    ranks = context.size(axis)
    if stacked.shape[0] != ranks:
        raise ValueError(f"reduce_scatter needs one part per rank, {ranks}, got {stacked.shape[0]}")
    if ranks == 1 or stacked.numel() == 0:
        return done(stacked[0])
    _count(context, axis, "reduce_scatter", stacked.numel(), 1, stacked.element_size())
    group = context.group(axis)
    if dist.get_backend(group) == "gloo":
        parts = torch.empty_like(stacked)
        work = dist.all_to_all_single(parts, stacked, group=group, async_op=True)
        return Pending(work, lambda: parts.sum(0))
    out = stacked.new_empty(stacked.shape[1:])
    work = _scatter_sum(out.view(-1), stacked.view(-1), op=dist.ReduceOp.SUM, group=group, async_op=True)
    return Pending(work, lambda: out)


def start_all_to_all(
    tensor: Tensor,
    send: Sequence[int],
    receive: Sequence[int],
    context: ParallelContext,
    axis: str,
) -> Pending:
    """Parts of a flat tensor to each rank, `send[r]` elements to rank r, and theirs back, in their order.

    Always a message: that one rank has nothing to send does not mean that all have nothing.
    """
    check_contiguous("all_to_all", tensor)
    if context.size(axis) == 1:
        return done(tensor)
    rank = getattr(context, f"{axis}_rank")
    leaving = sum(send) - send[rank]
    context.traffic.count(axis, "all_to_all", leaving, tensor.element_size())
    out = tensor.new_empty(sum(receive))
    work = dist.all_to_all_single(
        out, tensor, list(receive), list(send), group=context.group(axis), async_op=True
    )
    return Pending(work, lambda: out)
