"""The rows plan: any function of edges, divided over tensor-parallel ranks by rows of receivers.

Node features are divided by channels, (N, F/tp). Under this plan a rank works on the edges into its own
contiguous rows of atoms, with all channels: the receivers' features come to it by an all-to-all, those of the
senders and the weights by all-gathers, and what it sums for its rows goes back to channels. So a function
that mixes channels on edges sends nothing of the size of edges (docs/tensor-parallel.md). Tensors that depend
on the edges alone, as vectors and envelopes, are made for the rank's own edges and are not sent.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megagnn.data import keys
from megagnn.ops.segment import Segments
from megagnn.parallel import collectives, row_collectives
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.row_collectives import Rows, balanced_bounds


@dataclass(frozen=True)
class EdgeRows:
    """The edges into a rank's own rows of atoms."""

    rows: Rows
    edges: slice
    """This rank's among the edges of the batch."""
    destination: Segments
    """Receivers, counted from the first of the rank's rows."""
    source: Segments
    """Senders, among all atoms."""


def edge_rows(batch: dict[str, Tensor], context: ParallelContext) -> EdgeRows:
    """The edges of this rank, of contiguous rows with about as many edges on each rank."""
    index, ptr = batch[keys.EDGE_INDEX], batch[keys.ROW_PTR]
    rows = Rows(balanced_bounds(ptr, context.tp_size), context)
    begin, end = int(ptr[rows.own.start]), int(ptr[rows.own.stop])
    destination = Segments(
        index[0, begin:end] - rows.own.start, ptr[rows.own.start : rows.own.stop + 1] - begin
    )
    source = index[1, begin:end].contiguous()
    # The stable order by source of some of the edges is that of all, without the others.
    perm = batch[keys.SOURCE_PERM]
    perm = perm[(perm >= begin) & (perm < end)] - begin
    counts = torch.bincount(source, minlength=len(ptr) - 1)
    source_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return EdgeRows(rows, slice(begin, end), destination, Segments(source, source_ptr, perm))


def by_rows(
    function: Callable[..., Sequence[Tensor | None]],
    rows: Rows,
    receivers: Sequence[Tensor],
    senders: Sequence[Tensor],
    weights: Sequence[tuple[Tensor | None, int | None]],
    replicated: Collection[int] = (),
) -> list[Any]:
    """Sums over neighbours, (N, K/tp) each, of a function of whole channels and of this rank's edges.

    function: of the receivers' features (own, F), of the senders' (N, F) and of the whole weights; it returns
        sums for the rank's own rows (own, K), or None. Differentiable as often as the function is; of Dual
        numbers lift the whole (`ops.lift`).
    receivers, senders: (N, F/tp).
    weights: each with the dimension that the ranks divide; None where each holds the whole.
    replicated: numbers of the results that are too narrow to divide: they come whole, (N, K), on every rank.
    """
    context = rows.context
    if context.tp_size == 1:
        return list(function(*receivers, *senders, *(tensor for tensor, _ in weights)))
    whole = [
        tensor
        if tensor is None
        else collectives.copy(tensor, context)
        if dim is None
        else collectives.gather(tensor, dim, context)
        for tensor, dim in weights
    ]
    own = [row_collectives.to_rows(x, rows) for x in receivers]
    everyone = [collectives.gather(x, -1, context) for x in senders]
    sums = function(*own, *everyone, *whole)
    join, divide = row_collectives.join_rows, row_collectives.to_channels
    return [None if x is None else (join if k in replicated else divide)(x, rows) for k, x in enumerate(sums)]
