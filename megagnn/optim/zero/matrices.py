"""Whole matrices of which a rank keeps a slice or nothing: who updates which, and what is sent for it.

The tensor-parallel ranks that divide a matrix send their slices of its gradient to the one of them that has
its state. That one finds the direction of the update and sends each rank's slice back. Both ways are one
all-to-all for the matrices of several units: gradients of the next ones and directions of the ones before
travel while these are updated.

Of a matrix of n elements, t ranks together send (t-1)/t n elements each way, and as owners take turns, each
rank 1/t of it; an all-gather for all ranks to update it alike would send (t-1) n, and take t times the work.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from megagnn.optim.rule import MatrixRule, Shape, State
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
        begin = buffer.storage_offset() + self.shard.start
        return buffer.as_strided(self.slice_shape, (self.slice_shape[1], 1), begin)

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
    """A matrix, and where its gradient's slice of this step is kept."""

    matrix: Matrix
    gradient: Tensor


class Gathering:
    """Gradients of matrices on their way to the ranks that update them; all ranks name them alike.

    grad_scale: factor of the gradients, which stay as they are; only what travels is copied ahead.
    """

    def __init__(self, work: Iterable[Work], grad_scale: float, context: ParallelContext) -> None:
        self.context, self.work, self.scale = context, list(work), grad_scale
        self.owned = [[w for w in self.work if w.matrix.owner == t] for t in range(context.tp_size)]
        self._pending = messages.done(torch.zeros(0))
        if self.travels:
            parts = [w.gradient.reshape(-1).to(context.device) for work in self.owned for w in work]
            leaving, sizes = torch.cat(parts).mul_(grad_scale), [_numel(work) for work in self.owned]
            own = [sizes[context.tp_rank]] * context.tp_size
            self._pending = messages.start_all_to_all(leaving, sizes, own, context, "tp")

    @property
    def travels(self) -> bool:
        """Whether directions come from other ranks: worth doing something else until they are awaited."""
        return any(self.owned)

    def update(
        self, rule: MatrixRule, groups: Sequence[Mapping[str, Any]], step: int
    ) -> Callable[[], dict[Matrix, Tensor]]:
        """Finds the directions and begins to send them: a function that awaits this rank's slice of each."""
        whole = self._whole_gradients()
        found: dict[Work, Tensor] = {}
        for number, of_group in by_group(whole).items():
            gradients, states = [whole[w] for w in of_group], [w.matrix.state for w in of_group]
            directions = self._directions(rule, gradients, states, groups[number], step)
            found |= zip(of_group, directions, strict=True)
        here = {w.matrix: found[w] for w in self.work if w.matrix.owner is None}
        returned = self._returned(found)
        every = [w.matrix for w in itertools.chain(*self.owned)]

        def arrived() -> dict[Matrix, Tensor]:
            parts = returned.wait().split([math.prod(m.slice_shape) for m in every])
            return here | {m: part.view(m.slice_shape) for m, part in zip(every, parts, strict=True)}

        return arrived

    def _directions(
        self, rule: MatrixRule, gradients: list[Tensor], states: Sequence[State], *rest: Any
    ) -> list[Tensor]:
        """Found on the model's device, to which state comes that lies on the host."""
        device = self.context.device
        if all(kept.device == device for kept in states[0].values()):
            return rule.directions(gradients, states, *rest)
        here = [{name: kept.to(device) for name, kept in state.items()} for state in states]
        found = rule.directions(gradients, here, *rest)
        for state, changed in zip(states, here, strict=True):
            for name, kept in state.items():
                kept.copy_(changed[name])
        return found

    def _whole_gradients(self) -> dict[Work, Tensor]:
        """Copies of those of the matrices that this rank updates."""
        mine = self.owned[self.context.tp_rank]
        received = self._pending.wait().view(self.context.tp_size, _numel(mine))
        self._pending = messages.done(torch.zeros(0))  # what came is kept no longer than its copies
        here = [w for w in self.work if w.matrix.owner is None]
        gradients = [w.gradient.to(self.context.device) for w in here]
        scaled = torch._foreach_mul(gradients, self.scale) if here else []
        return dict(zip([*mine, *here], [*_joined(received, mine), *scaled], strict=True))

    def _returned(self, found: Mapping[Work, Tensor]) -> messages.Pending:
        """Slices of the directions of all matrices that are divided, ordered by their owners."""
        empty = torch.zeros(0, dtype=self.work[0].gradient.dtype, device=self.context.device)
        if not self.travels:
            return messages.done(empty)
        tp, mine = self.context.tp_size, self.owned[self.context.tp_rank]
        parts = [found[w].chunk(tp, w.matrix.layout.dim or 0)[t].reshape(-1) for t in range(tp) for w in mine]
        leaving, sizes = torch.cat([empty, *parts]), [_numel(work) for work in self.owned]
        return messages.start_all_to_all(leaving, [_numel(mine)] * tp, sizes, self.context, "tp")


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
