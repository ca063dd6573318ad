"""Collectives between rows and channels of a matrix, for ranks that own unequal numbers of rows.

Of a matrix (N, F), rank r of a tensor-parallel group holds either all rows of its F/tp channels ("channels"),
or all channels of its own rows ("rows"). Both are `sharded` in the sense of [Note: four kinds], and the way
there and the way back are each other's backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megagnn.ops.dispatch import linear_function
from megagnn.parallel import messages
from megagnn.parallel.context import ParallelContext


@dataclass(frozen=True)
class Rows:
    """Which contiguous rows each rank owns: rank r those from bounds[r] to bounds[r + 1]."""

    bounds: tuple[int, ...]
    context: ParallelContext

    @property
    def counts(self) -> list[int]:
        return [end - begin for begin, end in zip(self.bounds, self.bounds[1:], strict=False)]

    @property
    def own(self) -> slice:
        rank = self.context.tp_rank
        return slice(self.bounds[rank], self.bounds[rank + 1])


def start_to_rows(x: Tensor, rows: Rows) -> messages.Pending:
    """Channels (N, F/tp) to rows (own, F), outside of autograd."""
    width, own = x.shape[1], rows.counts[rows.context.tp_rank]
    ranks = rows.context.tp_size
    send = [count * width for count in rows.counts]
    pending = messages.start_all_to_all(
        x.contiguous().view(-1), send, [own * width] * ranks, rows.context, "tp"
    )
    return pending.then(lambda flat: flat.view(ranks, own, width).transpose(0, 1).reshape(own, ranks * width))


def start_to_channels(x: Tensor, rows: Rows) -> messages.Pending:
    """Rows (own, F) to channels (N, F/tp), outside of autograd."""
    ranks, own = rows.context.tp_size, x.shape[0]
    width = x.shape[1] // ranks
    parts = x.view(own, ranks, width).transpose(0, 1).contiguous().view(-1)
    receive = [count * width for count in rows.counts]
    pending = messages.start_all_to_all(parts, [own * width] * ranks, receive, rows.context, "tp")
    return pending.then(lambda flat: flat.view(-1, width))


def start_join(x: Tensor, rows: Rows) -> messages.Pending:
    """Rows (own, C) to all rows on every rank, (N, C), outside of autograd."""
    ranks, width = rows.context.tp_size, x.shape[1]
    send = [x.numel()] * ranks
    receive = [count * width for count in rows.counts]
    pending = messages.start_all_to_all(
        x.reshape(1, -1).repeat(ranks, 1).view(-1), send, receive, rows.context, "tp"
    )
    return pending.then(lambda flat: flat.view(-1, width))


def to_rows(x: Tensor, rows: Rows) -> Tensor:
    """Channels (N, F/tp) to rows (own, F); backward: `to_channels`."""
    out: Tensor = _ToRows.apply(x, rows)
    return out


def to_channels(x: Tensor, rows: Rows) -> Tensor:
    """Rows (own, F) to channels (N, F/tp); backward: `to_rows`."""
    out: Tensor = _ToChannels.apply(x, rows)
    return out


def join_rows(x: Tensor, rows: Rows) -> Tensor:
    """Rows (own, C), sharded, to all rows, replicated, (N, C); backward: `own_rows`."""
    out: Tensor = _JoinRows.apply(x, rows)
    return out


def own_rows(x: Tensor, rows: Rows) -> Tensor:
    """Replicated (N, C) to this rank's rows, sharded; backward: `join_rows`."""
    out: Tensor = _OwnRows.apply(x, rows)
    return out


_ToRows: Any = linear_function("_ToRows", lambda x, rows: start_to_rows(x, rows).wait(), lambda: _ToChannels)
_ToChannels: Any = linear_function(
    "_ToChannels", lambda x, rows: start_to_channels(x, rows).wait(), lambda: _ToRows
)
_JoinRows: Any = linear_function("_JoinRows", lambda x, rows: start_join(x, rows).wait(), lambda: _OwnRows)
_OwnRows: Any = linear_function("_OwnRows", lambda x, rows: x[rows.own].clone(), lambda: _JoinRows)


def balanced_bounds(row_ptr: Sequence[int] | Tensor, ranks: int) -> tuple[int, ...]:
    """Bounds of contiguous rows with about as many entries each: of a CSR pointer (N + 1,)."""
    ptr = torch.as_tensor(row_ptr).cpu()
    num_rows, total = len(ptr) - 1, int(ptr[-1])
    # Rows without entries are shared out as well: each counts as a small part of an entry.
    weight = ptr.double() + torch.arange(num_rows + 1) * (0.01 if total else 1.0)
    targets = torch.arange(1, ranks, dtype=torch.float64) * float(weight[-1]) / ranks
    inner = torch.searchsorted(weight, targets)
    closer = (weight[(inner - 1).clamp(min=0)] - targets).abs() < (
        weight[inner.clamp(max=num_rows)] - targets
    ).abs()
    inner = torch.where(closer, (inner - 1).clamp(min=0), inner).clamp(max=num_rows)
    return (0, *inner.tolist(), num_rows)
