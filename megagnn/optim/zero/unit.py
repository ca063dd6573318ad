"""The parameters of one module in one flat buffer, and the share of it that a rank keeps.

[Note: stages] Of N parameters, with P data-parallel ranks, a rank keeps (Rajbhandari et al., "ZeRO", SC 2020,
section 5; numbers of float32 words, of which AdamW's two moments are two):

    stage   parameters   gradients   moments    together
      0         N            N          2N         4N
      1         N            N         2N/P      2N + 2N/P
      2         N           N/P        2N/P       N + 3N/P
      3        N/P          N/P        2N/P         4N/P

All stages lay a unit out alike, add gradients up in one order and update the same runs, so that what they
compute is the same bits. The layout has P equal *shards*; rank r keeps shard r. What is whole for a while
(gradients of stages 2 and 3, parameters of stage 3) is so one unit at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megagnn.ops import adamw_, square_sum
from megagnn.optim.flat import FlatLayout
from megagnn.optim.pieces import Piece
from megagnn.optim.zero.offload import Storage
from megagnn.parallel import messages
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import Parameter, initial_values, is_deferred, layout_of


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
    state_dtype: torch.dtype = field(init=False)
    """Type of gradients, moments and master copies: float32 beside bfloat16, else that of the parameters."""

    def __post_init__(self) -> None:
        self.members.sort(key=lambda member: member.group)  # each group one run; the sort is stable
        first = self.members[0].parameter
        self.dtype, self.device = first.dtype, first.device
        self.state_dtype = torch.float32 if self.dtype == torch.bfloat16 else self.dtype
        self.num_shards = self.context.dp_size if self.stage > 0 else 1
        shapes = [member.parameter.shape for member in self.members]
        self.layout = FlatLayout.of(shapes, first.element_size(), self.num_shards)
        self.shard = self.layout.shard(self.context.dp_rank if self.stage > 0 else 0)
        self.shard_size = self.shard.stop - self.shard.start
        self._make_buffers()

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
        self.exp_avg = self._new("exp_avg", self.state_dtype)
        self.exp_avg_sq = self._new("exp_avg_sq", self.state_dtype)
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

    def _new(self, kind: str, dtype: torch.dtype) -> Tensor:
        return self.storage.zeros(f"{self.name}.{kind}", self.shard_size, dtype, self.device)

    @property
    def kept(self) -> dict[str, Tensor]:
        """{name: buffer} of all that stays between steps."""
        kept = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "grad": self.grad_shard}
        kept["param"] = self.param_shard if self.stage == 3 else self.full
        if self.grad is not None and self.stage < 2:
            kept["grad"] = self.grad
        if self.master is not None:
            kept["master"] = self.master
        return kept

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
        rows = self.full.view(self.num_shards, self.shard_size)
        self._coming = messages.start_fill_rows(rows, self.context, "dp")

    def gather(self) -> None:
        """Makes them there, now."""
        self.start_gather()
        if self._coming is not None:
            self._coming.wait()
            self._coming, self.resident = None, True

    def free(self) -> None:
        """Stage 3: lets the whole parameters go; the shards stay.

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
        rows = self.full.view(self.num_shards, self.shard_size)
        return messages.start_fill_rows(rows, self.context, "dp")

    # Gradients

    def zero_grad(self) -> None:
        """Begins a step."""
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
    def rows_to_send(self) -> Tensor:
        """Gradients, (shards, elements of a shard); what has not arrived is zero."""
        grad = self._make_grad()
        for index in set(range(len(self.members))) - self._arrived:
            self.grad_views[index].zero_()
            self.members[index].parameter.grad = self._home(index)
        return grad.view(self.num_shards, self.shard_size)

    def let_gradients_go(self) -> None:
        """Stages 2 and 3: what was sent is kept no longer."""
        if self.stage >= 2:
            self.grad, self.grad_views = None, []
            self._arrived.clear()

    def columns(self, chunk: int) -> list[slice]:
        """The shard in runs of at most `chunk` elements: each travels in a message of its own."""
        return [slice(a, min(a + chunk, self.shard_size)) for a in range(0, self.shard_size, chunk)]

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

    def runs(self) -> list[Run]:
        """The shard cut where the parameter group changes; padding goes with what is before it."""
        runs: list[Run] = []
        for member, offset in zip(self.members, self.layout.offsets, strict=True):
            if runs and runs[-1].group == member.group:
                continue
            if runs:
                runs[-1] = Run(runs[-1].begin, offset, runs[-1].group)
            runs.append(Run(offset, self.layout.size, member.group))
        start, stop = self.shard.start, self.shard.stop
        cut = [Run(max(r.begin, start) - start, min(r.end, stop) - start, r.group) for r in runs]
        return [run for run in cut if run.begin < run.end]

    def update(self, groups: Sequence[dict[str, object]], step: int, grad_scale: float) -> None:
        """AdamW on this rank's shard; `groups` are the optimizer's."""
        # The step runs where the state lies, which offloading may have put on the host.
        weights = self.param_shard.to(self.exp_avg.device)
        grads = self.grad_shard.to(self.exp_avg.device)
        for run in self.runs():
            group, at = groups[run.group], slice(run.begin, run.end)
            adamw_(
                weights[at],
                grads[at],
                self.exp_avg[at],
                self.exp_avg_sq[at],
                None if self.master is None else self.master[at],
                lr=float(group["lr"]),  # type: ignore[arg-type]
                betas=group["betas"],  # type: ignore[arg-type]
                eps=group["eps"],  # type: ignore[arg-type]
                weight_decay=group["weight_decay"],  # type: ignore[arg-type]
                step=step,
                grad_scale=grad_scale,
            )
        if weights is not self.param_shard:
            self.param_shard.copy_(weights)

    def clear_gradients(self, groups: Collection[int]) -> None:
        """Zero this rank's gradients of some parameter groups."""
        found = [run for run in self.runs() if run.group in groups]
        for run in found:
            self.grad_shard[run.begin : run.end].zero_()
        if found:
            self.storage.release([self.grad_shard])

    def square_sum(self) -> Tensor:
        """Sum of squares of this rank's gradients; what tensor-parallel ranks share counts by its share."""
        total = square_sum(self.grad_shard)
        if self.context.tp_size == 1:
            return total
        for index, (begin, end) in self.overlaps():
            if not layout_of(self.members[index].parameter).is_sharded:
                start = self.layout.offsets[index] - self.shard.start
                share = square_sum(self.grad_shard[start + begin : start + end])
                total = total - (1 - 1 / self.context.tp_size) * share.to(total.device)
        return total

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
        found = []
        for index, (begin, end) in self.overlaps():
            start = self.layout.offsets[index] - self.shard.start
            member = self.members[index]
            found.append(
                Piece(
                    member.name,
                    kind,
                    layout_of(member.parameter),
                    begin,
                    end,
                    buffer[start + begin : start + end],
                    replicated=self.num_shards == 1,
                )
            )
        return found
