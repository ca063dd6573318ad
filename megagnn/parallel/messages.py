"""Collectives on buffers, outside of autograd; nothing is sent on one rank.

Every call counts what it sends (`context.Traffic`). Tensors must be contiguous: gloo reduces a strided view
wrongly and overwrites the memory beside it. A tensor without elements is no message.
"""

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor

from megagnn.parallel.context import ParallelContext


class Pending:
    """A message under way; `wait` gives its result, once."""

    def __init__(self, work: "dist.Work | None", finish: Callable[[], Tensor]) -> None:
        self._work, self._finish = work, finish

    def wait(self) -> Tensor:
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


def start_fill_rows(rows: Sequence[Tensor], context: ParallelContext, axis: str) -> Pending:
    """Every rank's own row to all others, in place: one row per rank, of which row r is there on rank r.

    An all-gather that needs no memory besides its result; rows may differ in length. Over gloo, and where
    they do, they travel point to point, which over gloo moves three to six times the bytes per second of its
    all-gather from a megabyte on. The result is this rank's row.
    """
    ranks, rank = context.size(axis), getattr(context, f"{axis}_rank")
    _check_rows("fill_rows", rows, range(len(rows)), ranks)
    whole = sum(row.numel() for row in rows)
    if ranks == 1 or whole == 0:
        return done(rows[rank])
    _count(context, axis, "all_gather", whole, 1, rows[0].element_size())
    if dist.get_backend(context.group(axis)) != "gloo" and _lie_together(rows):
        together = rows[0].as_strided((whole,), (1,))
        work = _gather_into(together, rows[rank], group=context.group(axis), async_op=True)
        return Pending(work, lambda: rows[rank])
    own = rows[rank]
    return _exchanged([own] * ranks, rows, context, axis, tag=0).then(lambda _: own)


def start_sum_rows(rows: Sequence[Tensor], context: ParallelContext, axis: str) -> Pending:
    """Row r becomes the sum over ranks on rank r, in place: one row per rank, the same lengths on all ranks.

    A reduce-scatter that needs memory for what arrives only: rows leave from where they are, and must not
    be written before the result is there. The result is this rank's row; the others are as they were. Over
    gloo, and where lengths differ, point to point, added up in the ranks' order: no bit depends on how the
    whole is cut into messages.
    """
    ranks, rank = context.size(axis), getattr(context, f"{axis}_rank")
    _check_rows("sum_rows", rows, [rank], ranks)
    own, whole = rows[rank], sum(row.numel() for row in rows)
    if ranks == 1 or whole == 0:
        return done(own)
    _count(context, axis, "reduce_scatter", whole, 1, own.element_size())
    group = context.group(axis)
    if dist.get_backend(group) != "gloo" and len({row.numel() for row in rows}) == 1:
        stacked, out = torch.stack(list(rows)), torch.empty_like(own)
        work = _scatter_sum(out, stacked.view(-1), op=dist.ReduceOp.SUM, group=group, async_op=True)
        return Pending(work, lambda: own.copy_(out))
    received = own.new_empty(ranks - 1, own.numel())  # of the others, in their order

    def summed(_: Tensor) -> Tensor:
        for row in received[1:rank]:
            received[0].add_(row)
        for row in (*received[: min(rank, 1)], *received[rank:]):
            own.add_(row)
        return own

    return _exchanged(rows, [*received[:rank], own, *received[rank:]], context, axis, _SUM_TAG).then(summed)


def _check_rows(operation: str, rows: Sequence[Tensor], contiguous: Iterable[int], ranks: int) -> None:
    if len(rows) != ranks or any(row.ndim != 1 for row in rows):
        raise ValueError(
            f"{operation} needs one row (n,) per rank, {ranks}, got {[tuple(row.shape) for row in rows]}"
        )
    for index in contiguous:
        check_contiguous(operation, rows[index])


def _lie_together(rows: Sequence[Tensor]) -> bool:
    """Whether rows are those of one contiguous (ranks, n)."""
    step = rows[0].numel() * rows[0].element_size()
    return all(
        row.numel() == rows[0].numel() and row.data_ptr() == rows[0].data_ptr() + k * step
        for k, row in enumerate(rows)
    )


def _exchanged(
    leaving: Sequence[Tensor], arriving: Sequence[Tensor], context: ParallelContext, axis: str, tag: int
) -> Pending:
    """Point to point, to and from every other rank of an axis; what has no elements is no message."""
    ranks, rank = context.size(axis), getattr(context, f"{axis}_rank")
    operations = []
    for shift in range(1, ranks):
        to, source = (rank + shift) % ranks, (rank - shift) % ranks
        for call, tensor, peer in ((dist.isend, leaving[to], to), (dist.irecv, arriving[source], source)):
            if tensor.numel():
                operations.append(
                    dist.P2POp(call, tensor, group=context.group(axis), tag=tag, group_peer=peer)
                )
    works = dist.batch_isend_irecv(operations) if operations else []

    def finish() -> Tensor:
        for work in works:
            work.wait()
        return leaving[rank]

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
