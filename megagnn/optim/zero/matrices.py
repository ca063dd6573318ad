"""Whole matrices of which a rank keeps a slice or nothing: who updates which, and what is sent for it.

The tensor-parallel ranks that divide a matrix send their slices of its gradient to the one of them that has
its state. That one finds the direction of the update and sends each rank's slice back. Both ways are one
all-to-all for the matrices of several units; that of the next ones travels while these are updated.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from megagnn.optim.rule import MatrixRule, Shape
from megagnn.parallel import messages
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import ParameterLayout, layout_of


@dataclass(eq=False)
class Matrix:
    """A matrix in this data-parallel rank's shard."""

    name: str
    group: int
    layout: ParameterLayout
    owner: int | None
    """The tensor-parallel rank that updates it; None where all do, for they do not divide it."""
    shard: slice
    """Its elements, or those of this rank's slice of it, in the shard."""
    state: dict[str, Tensor]
    """That of the whole matrix; nothing where another rank updates it."""
    weight: Tensor = field(init=False)
    """This rank's slice of it, in the widest type in which it is kept."""

    def of(self, buffer: Tensor) -> Tensor:
        """This rank's slice in a buffer of the shard's length, in its shape."""
        return buffer.as_strided(self.slice_shape, (self.slice_shape[1], 1), self.shard.start)

    @cached_property
    def slice_shape(self) -> Shape:
        shape = list(self.layout.full_shape)
        if self.layout.is_sharded:
            assert self.layout.dim is not None
            shape[self.layout.dim] //= self.layout.num_slices
        return tuple(shape)

    def is_updated_by(self, tp_rank: int) -> bool:
        """Whether this rank has its state."""
        return self.owner is None or self.owner == tp_rank


def deal(
    members: Sequence[tuple[nn.Parameter, Callable[[Shape], float] | None]], spent: Tensor
) -> list[tuple[int, int | None]]:
    """(data-parallel rank, tensor-parallel rank) that updates each member, the dearest dealt first.

    members: with the cost of a matrix of a shape; without one for what is updated element by element.
    spent: (data-parallel, tensor-parallel ranks), cost by now; the members' is added. The second rank is None
    where all tensor-parallel ranks update what they have.
    """
    costs = [p.numel() if cost is None else cost(layout_of(p).full_shape) for p, cost in members]
    owners: list[tuple[int, int | None]] = [(0, None)] * len(members)
    for index in sorted(range(len(members)), key=lambda i: -costs[i]):
        parameter, cost = members[index]
        if cost is not None and layout_of(parameter).is_sharded:
            rank, owner = divmod(int(spent.argmin()), spent.shape[1])
            spent[rank, owner] += costs[index]
            owners[index] = (rank, owner)
        else:
            rank = int(spent.sum(1).argmin())
            spent[rank] += costs[index]
            owners[index] = (rank, None)
    return owners


@dataclass(frozen=True, eq=False)
class Work:
    """A matrix, and its gradient's slice in this step."""

    matrix: Matrix
    gradient: Tensor


class Gathering:
    """Gradients of matrices on their way to the ranks that update them; all ranks name them alike."""

    def __init__(self, work: Iterable[Work], context: ParallelContext) -> None:
        self.context, self.work = context, list(work)
        self.owned = [[w for w in self.work if w.matrix.owner == t] for t in range(context.tp_size)]
        self._pending = messages.done(torch.zeros(0))
        if any(self.owned):
            leaving = [w.gradient.reshape(-1) for work in self.owned for w in work]
            sizes = [_numel(work) for work in self.owned]
            own = [sizes[context.tp_rank]] * context.tp_size
            self._pending = messages.start_all_to_all(torch.cat(leaving), sizes, own, context, "tp")

    def directions(self, rule: MatrixRule, groups: Sequence[Mapping[str, Any]], step: int) -> list[Tensor]:
        """Of each matrix this rank's slice of the update's direction, in their order."""
        received = self._pending.wait()
        mine = self.owned[self.context.tp_rank]
        received = received.view(self.context.tp_size, _numel(mine))
        whole = dict(zip(mine, _joined(received, mine), strict=True))
        whole |= {w: w.gradient for w in self.work if w.matrix.owner is None}
        found: dict[Work, Tensor] = {}
        for number, of_group in by_group(whole).items():
            gradients, states = [whole[w] for w in of_group], [w.matrix.state for w in of_group]
            found |= zip(of_group, rule.directions(gradients, states, groups[number], step), strict=True)
        found |= zip(itertools.chain(*self.owned), self._returned(found), strict=True)
        return [found[w] for w in self.work]

    def _returned(self, found: Mapping[Work, Tensor]) -> list[Tensor]:
        """Slices of the directions of all matrices that are divided, ordered by their owners."""
        if not any(self.owned):
            return []
        tp, mine = self.context.tp_size, self.owned[self.context.tp_rank]
        parts = [found[w].chunk(tp, w.matrix.layout.dim or 0)[t].reshape(-1) for t in range(tp) for w in mine]
        leaving = torch.cat(parts) if parts else self.work[0].gradient.new_empty(0)
        sizes = [_numel(work) for work in self.owned]
        arriving = messages.start_all_to_all(leaving, [_numel(mine)] * tp, sizes, self.context, "tp").wait()
        every = list(itertools.chain(*self.owned))
        split = arriving.split([w.gradient.numel() for w in every])
        return [part.view(w.gradient.shape) for part, w in zip(split, every, strict=True)]


def by_group(work: Iterable[Work]) -> dict[int, list[Work]]:
    """The matrices of each parameter group."""
    found: dict[int, list[Work]] = {}
    for w in work:
        found.setdefault(w.matrix.group, []).append(w)
    return found


def _numel(work: Iterable[Work]) -> int:
    return sum(w.gradient.numel() for w in work)


def _joined(received: Tensor, work: Sequence[Work]) -> list[Tensor]:
    """Whole gradients of slices that came from each rank, (ranks, elements of all)."""
    if not work:
        return []
    columns = received.split([w.gradient.numel() for w in work], dim=1)
    return [
        torch.cat([row.view(w.gradient.shape) for row in rows], dim=w.matrix.layout.dim or 0)
        for rows, w in zip(columns, work, strict=True)
    ]
