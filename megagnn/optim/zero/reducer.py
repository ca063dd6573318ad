"""Gradients summed over the data-parallel ranks, each rank its shard, while the backward goes on.

A unit leaves when all its gradients are there and the units after it in the model have left: every rank
sends in one order. It travels in messages of half a bucket, of which two are under way at most, so that what
is packed, sent and received takes no more than two buckets. In stages 0 and 1 a unit leaves in the last
backward of a step alone, as with `bucket_reducer.GradientReducer`; in stages 2 and 3, which have no room
for whole gradients, in every one. With several backwards, stage 1 adds up over backwards first and over ranks
then, stages 2 and 3 the other way round: the same sums, rounded differently.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megagnn.optim.zero.unit import Unit
from megagnn.parallel import messages
from megagnn.parallel.context import ParallelContext

MESSAGES_UNDER_WAY = 2


class ShardedReducer:
    """See the module. Used as the other: start(), the last backward, finish().

    Args:
        units: in the order of the model.
        by_arrival: send a unit when its last gradient has arrived; else the owner says so by `complete`.
    """

    def __init__(
        self, units: Sequence[Unit], context: ParallelContext, bucket_bytes: int, by_arrival: bool
    ) -> None:
        if bucket_bytes < 1:
            raise ValueError(f"ShardedReducer: bucket_bytes must be at least 1, got {bucket_bytes}")
        self.context, self.bucket_bytes, self.by_arrival = context, bucket_bytes, by_arrival
        self.units = list(reversed(units))
        self.stage = units[0].stage
        self._under_way: deque[tuple[Callable[[Tensor], None], messages.Pending]] = deque()
        self._last = self._in_backward = self._inputs_only = False
        self._next = 0  # of `units`, the one to leave next
        self._waiting = [set(range(len(unit.members))) for unit in self.units]
        self._sent = False  # stages 0 and 1: whether this step's gradients have left
        for number, unit in enumerate(self.units):
            for index, member in enumerate(unit.members):
                member.parameter.register_post_accumulate_grad_hook(self._arrival(number, index))

    def start(self) -> None:
        """The backward that follows is the last of the step.

        Raises RuntimeError where the `finish` of an earlier start is missing.
        """
        if self._last:
            raise RuntimeError("ShardedReducer: start() after start(); call finish() between them")
        self._last = True

    def finish(self) -> None:
        """Sends what has not left yet and waits: every rank's gradient shards are sums over the ranks."""
        if any(unit.fresh for unit in self.units) if self.stage >= 2 else not self._sent:
            self._last = True
            self._end_of_backward()
        while self._under_way:
            self._collect()
        self._last = self._sent = False

    @contextmanager
    def inputs_only(self) -> Iterator[None]:
        """Within the context a backward goes to inputs alone, and completes no unit: another one, to the
        parameters, will."""
        self._inputs_only = True
        try:
            yield
        finally:
            self._inputs_only = False

    def complete(self, unit: Unit) -> None:
        """The backward is through with this unit; what has not arrived counts as zero."""
        if self._inputs_only:
            return
        self._waiting[self.units.index(unit)].clear()
        self._leave()

    def _arrival(self, number: int, index: int) -> Callable[[Any], None]:
        # Weak, for Python cannot see circles that go through a tensor's hooks, and would never free them.
        reducer = weakref.ref(self)

        def arrived(_: Any) -> None:
            alive = reducer()
            if alive is not None:
                alive._arrived(number, index)

        return arrived

    def _arrived(self, number: int, index: int) -> None:
        unit = self.units[number]
        if (self._sent or number < self._next) and self._sends:
            raise RuntimeError(
                f"ShardedReducer: a gradient of {unit.name} ({unit.members[index].name}) arrived after the "
                "unit had left; only one backward, the last of a step, may run between start() and finish()"
            )
        if not self._in_backward:
            self._in_backward = True
            # autograd's own word for "when this backward is over"; PyTorch's DDP and FSDP use it, too
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)
        unit.take_gradient(index)
        self._waiting[number].discard(index)
        if self.by_arrival:
            self._leave()

    @property
    def _sends(self) -> bool:
        return self._last or self.stage >= 2

    def _leave(self) -> None:
        while self._sends and self._next < len(self.units) and not self._waiting[self._next]:
            self._send(self.units[self._next])
            self._next += 1

    def _end_of_backward(self) -> None:
        self._in_backward = False
        if self._sends:
            for waiting in self._waiting:
                waiting.clear()
            self._leave()
            self._sent, self._next = self._last, 0
        self._waiting = [set(range(len(unit.members))) for unit in self.units]

    @torch.no_grad()
    def _send(self, unit: Unit) -> None:
        fresh, unit.fresh = unit.fresh, False
        rows = unit.rows_to_send()
        if self.context.dp_size == 1:
            unit.take_reduced(slice(0, unit.shard_size), rows[0], fresh)
        else:
            chunk = max(1, self._message_bytes // rows[0].element_size() // len(rows))
            for columns in unit.columns(chunk):
                self._launch(unit, columns, [row[columns] for row in rows], fresh)
        unit.let_gradients_go()

    @property
    def _message_bytes(self) -> int:
        return self.bucket_bytes if self.stage == 0 else self.bucket_bytes // 2

    def _launch(self, unit: Unit, columns: slice, rows: list[Tensor], fresh: bool) -> None:
        if self.stage == 0:  # in place: it takes no memory, however many are under way
            pending = messages.start_all_reduce(rows[0], self.context, "dp")
            self._under_way.append((lambda _: None, pending))
            return
        while len(self._under_way) >= MESSAGES_UNDER_WAY:
            self._collect()
        all_at_once = columns.stop - columns.start == unit.layout.longest
        # In stages 2 and 3 the unit frees its buffer at once, which a part of it would keep.
        leaving = rows if self.stage == 1 or all_at_once else [row.clone() for row in rows]
        pending = messages.start_sum_rows(leaving, self.context, "dp")
        self._under_way.append((lambda values: unit.take_reduced(columns, values, fresh), pending))

    @torch.no_grad()
    def _collect(self) -> None:
        take, pending = self._under_way.popleft()
        take(pending.wait())
