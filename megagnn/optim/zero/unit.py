"""The parameters of one module in one flat buffer, and the share of it that a rank keeps.

[Note: stages] Of N parameters, with P data-parallel ranks, a rank keeps (Rajbhandari et al., "ZeRO", SC 2020,
section 5; numbers of float32 words, of which AdamW's two moments are two):

    stage   parameters   gradients   moments    together
      0         N            N          2N         4N
      1         N            N         2N/P      2N + 2N/P
      2         N           N/P        2N/P       N + 3N/P
      3        N/P          N/P        2N/P         4N/P

All stages lay a unit out alike, add gradients up in one order and update the same runs, so that what they
compute is the same bits. The layout has P *shards*; rank r keeps shard r. What is whole for a while
(gradients of stages 2 and 3, parameters of stage 3) is so one unit at a time.

[Note: whole matrices] Shards are equal runs of elements, wherever the borders fall, unless the update rule
needs some members as whole matrices. Then all members of the unit are dealt out whole, the dearest first,
each to the rank that has least to do by then over all units, so that N/P above holds within a matrix.
Tensor-parallel ranks divide the work in the same way: of a matrix that they divide, one has the rule's state
(optim/zero/matrices.py), while weights and gradients stay divided.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from megagnn.ops import square_sum
from megagnn.optim.flat import FlatLayout
from megagnn.optim.parts import FROZEN
from megagnn.optim.pieces import Piece
from megagnn.optim.rule import Rule, State
from megagnn.optim.zero.matrices import Matrix, Work, deal
from megagnn.optim.zero.offload import Storage
from megagnn.parallel import messages
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import Parameter, ParameterLayout, initial_values, is_deferred, layout_of


@dataclass(frozen=True)
class Member:
    """A parameter of a unit."""

    name: str
    """Its name in the model."""
    parameter: nn.Parameter
    group: int
    """Number of its parameter group."""
    seed: int
    """Seed of the initial values, where the parameter has no memory yet."""
    is_matrix: bool = False
    """Whether it is for the rule of matrices."""

    def values(self) -> Tensor:
        """What it begins with."""
        if is_deferred(self.parameter):
            assert isinstance(self.parameter, Parameter)
            return initial_values(self.name, self.parameter, self.seed)
        return self.parameter


@dataclass(frozen=True)
class Run:
    """Neighbouring elements of a rank's shard that are updated by one call."""

    begin: int
    end: int
    group: int


@dataclass(eq=False)
class Unit:
    """See the module. Buffers are flat; `shard` and all `*_shard` have the length of one shard."""

    name: str
    members: list[Member]
    context: ParallelContext
    stage: int
    storage: Storage
    rule: Rule
    spent: Tensor
    """Cost of updates of the units before, (data-parallel, tensor-parallel ranks); this one's is added."""
    state_dtype: torch.dtype = field(init=False)
    """Type of gradients, moments and master copies: float32 beside bfloat16, else that of the parameters."""

    def __post_init__(self) -> None:
        # Matrices first, then each group one run; the sort is stable.
        self.members.sort(key=lambda member: (not member.is_matrix, member.group))
        first = self.members[0].parameter
        self.dtype, self.device = first.dtype, first.device
        self.state_dtype = torch.float32 if self.dtype == torch.bfloat16 else self.dtype
        self.num_shards = self.context.dp_size if self.stage > 0 else 1
        shapes = [member.parameter.shape for member in self.members]
        owners: list[tuple[int, int | None]] = []
        if self.members[0].is_matrix:
            assert self.rule.matrices is not None
            cost = self.rule.matrices.cost
            owners = deal([(m.parameter, cost if m.is_matrix else None) for m in self.members], self.spent)
            ranks = [rank for rank, _ in owners]
            self.layout = FlatLayout.dealt(shapes, first.element_size(), ranks, self.num_shards)
        else:
            self.layout = FlatLayout.of(shapes, first.element_size(), self.num_shards)
        self.shard = self.layout.shard(self.context.dp_rank if self.stage > 0 else 0)
        self.shard_size = self.shard.stop - self.shard.start
        self._make_buffers()
        self.matrices = self._make_matrices([owner for _, owner in owners])
        """Those in this rank's shard."""

    def _make_buffers(self) -> None:
        self.full = torch.zeros(self.layout.size, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            for member, view in zip(self.members, self.layout.views(self.full), strict=True):
                view.copy_(member.values())
                member.parameter.data = view
                member.parameter.grad = None
        self.resident = True
        self._coming: messages.Pending | None = None
        self.param_shard = self.full[self.shard]
        if self.stage == 3:
            self.param_shard = self._new("param", self.dtype)
            self.param_shard.copy_(self.full[self.shard])
        self.first = self.runs[0].begin if self.runs else self.shard_size
        """The elements' own place in the shard: behind the matrices."""
        names, size = self.rule.elements.state, self.shard_size - self.first
        self.state = {name: self._new(name, self.state_dtype, size) for name in names}
        """State of the elements, each (shard_size - first,)."""
        self.matrix_state: dict[str, Tensor] = {}
        """That of the matrices, flat."""
        self.master = None
        if self.state_dtype != self.dtype:
            self.master = self._new("master", self.state_dtype)
            self.master.copy_(self.full[self.shard])
        self.grad: Tensor | None = None
        """Gradients of the whole unit: always there in stages 0 and 1, else while they arrive."""
        self._arrived: set[int] = set()
        """Members of which `grad` holds something of this step; of the others what it holds is old."""
        if self.stage < 2:
            self.grad = torch.zeros(self.layout.size, dtype=self.state_dtype, device=self.device)
            self.grad_shard = self.grad[self.shard]
        else:
            self.grad_shard = self._new("grad", self.state_dtype)
        self.fresh = True
        """Whether the gradient shard holds nothing of this step, so that what comes is copied, not added."""
        self.grad_views = [] if self.grad is None else self.layout.views(self.grad)
        self.free()

    def _make_matrices(self, owners: Sequence[int | None]) -> list[Matrix]:
        found = []
        for index, _ in self.overlaps:
            member, begin = self.members[index], self.layout.offsets[index] - self.shard.start
            if member.is_matrix:
                place = slice(begin, begin + member.parameter.numel())
                layout = layout_of(member.parameter)
                found.append(Matrix(member.name, member.group, layout, owners[index], place, {}))
                found[-1].weight = found[-1].of(self.weight_shard)
        updated = [m for m in found if m.is_updated_by(self.context.tp_rank)]
        if updated:
            assert self.rule.matrices is not None
            shapes = [self.rule.matrices.state(m.layout.full_shape) for m in updated]
            for kind in shapes[0]:
                places = FlatLayout.of([of[kind] for of in shapes], self.state_dtype.itemsize)
                buffer = self._new(f"matrices.{kind}", self.state_dtype, places.size)
                self.matrix_state[kind] = buffer
                for matrix, view in zip(updated, places.views(buffer), strict=True):
                    matrix.state[kind] = view
        return found

    def _new(self, kind: str, dtype: torch.dtype, size: int | None = None) -> Tensor:
        size = self.shard_size if size is None else size
        return self.storage.zeros(f"{self.name}.{kind}", size, dtype, self.device)

    @property
    def kept(self) -> list[tuple[str, Tensor]]:
        """(kind, buffer) of all that stays between steps: of "param", "grad" and "state"."""
        kept = [("param", self.param_shard if self.stage == 3 else self.full)]
        kept.append(("grad", self.grad if self.grad is not None and self.stage < 2 else self.grad_shard))
        kept += [("state", b) for b in (*self.state.values(), *self.matrix_state.values())]
        return kept if self.master is None else [*kept, ("state", self.master)]

    @cached_property
    def matrix_numel(self) -> int:
        """Elements of the matrices of all shards, of all tensor-parallel ranks together."""
        return sum(layout_of(m.parameter).full_numel for m in self.members if m.is_matrix)

    @property
    def weight_shard(self) -> Tensor:
        """The shard's weights in the widest type in which they are kept."""
        return self.param_shard if self.master is None else self.master

    # Parameters

    def start_gather(self) -> None:
        """Begins to make all parameters of the unit there."""
        if self.resident or self._coming is not None:
            return
        self.full.untyped_storage().resize_(self.full.numel() * self.full.element_size())
        self.full[self.shard].copy_(self.param_shard)
        self.storage.release([self.param_shard])
        self._coming = messages.start_fill_rows(self.layout.rows(self.full), self.context, "dp")

    def gather(self) -> None:
        self.start_gather()
        if self._coming is not None:
            self._coming.wait()
            self._coming, self.resident = None, True

    def free(self) -> None:
        """Stage 3: frees the whole parameters; the shards stay.

        The tensors, which autograd may have saved, keep their storage object, and `gather` fills it again.
        """
        if self.stage == 3:
            if self._coming is not None:
                self.gather()  # a message under way writes into the storage
            self.full.untyped_storage().resize_(0)
            self.resident = False

    def weights_changed(self) -> messages.Pending:
        """The shards were written: the whole parameters follow; in stage 3 when they are next needed."""
        torch.autograd.graph.increment_version([member.parameter for member in self.members])
        if self.stage == 3:
            self.free()
        if self.stage == 3 or self.num_shards == 1:
            return messages.done(self.full)
        return messages.start_fill_rows(self.layout.rows(self.full), self.context, "dp")

    # Gradients

    def zero_grad(self) -> None:
        self.fresh = True
        self._arrived.clear()
        for member in self.members:
            member.parameter.grad = None

    def _home(self, index: int) -> Tensor | None:
        """Where autograd may add to at once, from a step's second backward on."""
        return self.grad_views[index] if self.stage < 2 and self.state_dtype == self.dtype else None

    @torch.no_grad()
    def take_gradient(self, index: int) -> None:
        """Moves a parameter's `.grad`, which a backward has just left, into the unit's gradients."""
        parameter = self.members[index].parameter
        if parameter.grad is None or parameter.grad is self._home(index):
            return
        self._make_grad()
        if index in self._arrived:
            self.grad_views[index].add_(parameter.grad)
        else:
            self.grad_views[index].copy_(parameter.grad)
        self._arrived.add(index)
        parameter.grad = self._home(index)

    def _make_grad(self) -> Tensor:
        if self.grad is None:
            self.grad = torch.zeros(self.layout.size, dtype=self.state_dtype, device=self.device)
            self.grad_views = self.layout.views(self.grad)
        return self.grad

    @torch.no_grad()
    def rows_to_send(self) -> list[Tensor]:
        """Gradients, one row for each shard; what has not arrived is zero."""
        grad = self._make_grad()
        for index in set(range(len(self.members))) - self._arrived:
            self.grad_views[index].zero_()
            self.members[index].parameter.grad = self._home(index)
        return self.layout.rows(grad)

    def let_gradients_go(self) -> None:
        """Stages 2 and 3: what was sent is kept no longer."""
        if self.stage >= 2:
            self.grad, self.grad_views = None, []
            self._arrived.clear()

    def columns(self, chunk: int) -> list[slice]:
        """Every shard in runs of at most `chunk` elements: each travels in a message of its own."""
        longest = self.layout.longest
        return [slice(a, min(a + chunk, longest)) for a in range(0, longest, chunk)]

    def take_reduced(self, columns: slice, values: Tensor, fresh: bool) -> None:
        """Sums over the data-parallel ranks for a part of this rank's shard; `fresh`: the step's first.

        In stage 1 they are there already.
        """
        if self.stage < 2:
            return
        own = self.grad_shard[columns]
        if fresh:
            own.copy_(values)
        else:
            own.add_(values)
        self.storage.release([self.grad_shard])

    # Step

    @cached_property
    def runs(self) -> list[Run]:
        """The elements of the shard, cut where the parameter group changes; padding goes with what is before
        it."""
        runs: list[Run] = []
        for index, (begin, _) in self.overlaps:
            member, at = self.members[index], self.layout.offsets[index] + begin - self.shard.start
            if member.is_matrix or (runs and runs[-1].group == member.group):
                continue
            if runs:
                runs[-1] = Run(runs[-1].begin, at, runs[-1].group)
            runs.append(Run(at, self.shard_size, member.group))
        return runs

    def update_elements(self, groups: Sequence[Mapping[str, Any]], step: int, grad_scale: float) -> None:
        """The rule of elements on this rank's shard; `groups` are the optimizer's."""
        for group, weights, grads, state, master in self._elements:
            # The step runs where the state lies, which offloading may have put on the host.
            device = next(iter(state.values()), weights).device
            moved, rest = weights.to(device), (groups[group], step, grad_scale)
            self.rule.elements.update(moved, grads.to(device), state, master, *rest)
            if moved is not weights:
                weights.copy_(moved)

    @cached_property
    def _elements(self) -> list[tuple[int, Tensor, Tensor, State, Tensor | None]]:
        """(group, weights, gradients, state, masters) of each run, as views of the buffers."""
        found: list[tuple[int, Tensor, Tensor, State, Tensor | None]] = []
        for run in self.runs:
            at, own = slice(run.begin, run.end), slice(run.begin - self.first, run.end - self.first)
            state = {name: buffer[own] for name, buffer in self.state.items()}
            master = None if self.master is None else self.master[at]
            found.append((run.group, self.param_shard[at], self.grad_shard[at], state, master))
        return found

    def round_matrices(self) -> None:
        """The parameters follow the master copies of the matrices, if there are any."""
        if self.master is not None:
            self.param_shard[: self.first].copy_(self.master[: self.first])

    def work(self, groups: Sequence[Mapping[str, Any]]) -> list[Work]:
        """The matrices of the shard that are not frozen."""
        moving = [m for m in self.matrices if not groups[m.group].get(FROZEN)]
        return [Work(m, m.of(self.grad_shard)) for m in moving]

    def clear_gradients(self, groups: Collection[int]) -> None:
        """Zero this rank's gradients of some parameter groups."""
        found = [slice(run.begin, run.end) for run in self.runs if run.group in groups]
        found += [matrix.shard for matrix in self.matrices if matrix.group in groups]
        for elements in found:
            self.grad_shard[elements].zero_()
        if found:
            self.storage.release([self.grad_shard])

    def square_sum(self) -> Tensor:
        """Sum of squares of this rank's gradients; what tensor-parallel ranks share counts by its share."""
        total = square_sum(self.grad_shard)
        if self.context.tp_size == 1:
            return total
        for index, (begin, end) in self.overlaps:
            if not layout_of(self.members[index].parameter).is_sharded:
                start = self.layout.offsets[index] - self.shard.start
                share = square_sum(self.grad_shard[start + begin : start + end])
                total = total - (1 - 1 / self.context.tp_size) * share.to(total.device)
        return total

    @cached_property
    def overlaps(self) -> list[tuple[int, tuple[int, int]]]:
        """(index of a member, (begin, end) of its elements) of all that lie, in part, in the shard."""
        found = []
        for index, (member, offset) in enumerate(zip(self.members, self.layout.offsets, strict=True)):
            begin = max(self.shard.start - offset, 0)
            end = min(self.shard.stop - offset, member.parameter.numel())
            if begin < end:
                found.append((index, (begin, end)))
        return found

    def pieces(self, kind: str, buffer: Tensor) -> list[Piece]:
        """What of a buffer of the shard's length belongs to which parameter."""
        return [self._piece(kind, buffer, 0, *overlap) for overlap in self.overlaps]

    def state_pieces(self) -> list[Piece]:
        """The state that this rank keeps."""
        elements = [(i, part) for i, part in self.overlaps if not self.members[i].is_matrix]
        found = [
            self._piece(kind, b, self.first, *part) for kind, b in self.state.items() for part in elements
        ]
        for matrix in self.matrices:
            for kind, whole in matrix.state.items():
                layout, run, alike = ParameterLayout(tuple(whole.shape)), whole.view(-1), self.num_shards == 1
                alone = matrix.owner is not None
                found.append(Piece(matrix.name, kind, layout, 0, len(run), run, alike, alone))
        return found

    def _piece(self, kind: str, buffer: Tensor, first: int, index: int, part: tuple[int, int]) -> Piece:
        member, (begin, end) = self.members[index], part
        start = self.layout.offsets[index] - self.shard.start - first
        values, replicated = buffer[start + begin : start + end], self.num_shards == 1
        return Piece(member.name, kind, layout_of(member.parameter), begin, end, values, replicated)
