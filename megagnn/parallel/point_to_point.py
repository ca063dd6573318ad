"""Messages along the pipeline axis: several tensors at a time, in the order of a channel."""

import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megagnn.parallel.context import ParallelContext

ALIGN_BYTES = 16


class Expected(NamedTuple):
    """A tensor on its way."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Sent:
    """A message that was started; its buffer lives as long as this."""

    def __init__(self, work: Any, buffer: Tensor | None) -> None:
        self._work, self._buffer = work, buffer

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
        self._work = self._buffer = None


class Incoming:
    """A message that is expected; its buffer is there from the beginning."""

    def __init__(self, work: Any, buffer: Tensor, expected: Sequence[Expected]) -> None:
        self._work, self._buffer, self._expected = work, buffer, expected

    def wait(self) -> tuple[Tensor, ...]:
        if self._work is not None:
            self._work.wait()
        places, _ = _places(self._expected)
        return tuple(
            self._buffer[begin : begin + e.num_bytes].view(e.dtype).view(e.shape)
            for begin, e in zip(places, self._expected, strict=True)
        )


Channel = tuple[int, int, str]
"""Source rank and target rank along pp, and the kind of message."""


class Channels:
    """Sends and receives along pp; the messages of a channel keep their order.

    Where the back end has tags (gloo), kinds are tags. Elsewhere (NCCL) the two ranks of a pair do what they
    were told under one group one after the other, so that a send would wait for a receive that was posted
    before it, and the first call of a pair waits until the other rank comes. There each kind and direction
    is a group of its own, and every channel carries a byte before it carries a message, in an order in which
    no two ranks wait for each other. Both take all ranks along pp.

    A message is one buffer of bytes; one without bytes is not sent.

    Args:
        channels: all that are used, the same on every rank.
    """

    def __init__(self, context: ParallelContext, channels: Iterable[Channel]) -> None:
        self.context, ordered = context, sorted(channels)
        self.opened = set(ordered)
        self.kinds = sorted({kind for _, _, kind in ordered})
        self._groups: dict[tuple[str, bool], weakref.ref[Any]] = {}
        if context.pp_size == 1:
            return
        self._has_tags = dist.get_backend(context.group("pp")) == "gloo"
        if self._has_tags:
            return
        ranks = dist.get_process_group_ranks(context.group("pp"))
        for kind, rises in sorted({(kind, target > source) for source, target, kind in ordered}):
            name = f"pipeline {kind} {'down' if rises else 'up'}"
            group = dist.new_group(ranks, use_local_synchronization=True, group_desc=name)
            self._groups[kind, rises] = weakref.ref(group)
        for channel in ordered:
            self._open(*channel)

    def _open(self, source: int, target: int, kind: str) -> None:
        """Where this rank is one end: the pair meets."""
        byte = torch.zeros(1, dtype=torch.uint8, device=self.context.device)
        settings, work = self._settings(kind, target > source), None
        if self.context.pp_rank == source:
            work = dist.isend(byte, group_dst=target, **settings)
        elif self.context.pp_rank == target:
            work = dist.irecv(byte, group_src=source, **settings)
        if work is not None:
            work.wait()

    def send(self, tensors: Sequence[Tensor], kind: str, target: int) -> Sent:
        """Start to send to pp rank `target`. The tensors may change afterwards."""
        places, num_bytes = _places([Expected(tuple(t.shape), t.dtype) for t in tensors])
        if not num_bytes:
            return Sent(None, None)
        buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=self.context.device)
        for begin, tensor in zip(places, tensors, strict=True):
            size = tensor.numel() * tensor.element_size()
            buffer[begin : begin + size].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
            self.context.traffic.count("pp", f"send {kind}", tensor.numel(), tensor.element_size())
        settings = self._settings(kind, target > self.context.pp_rank)
        return Sent(dist.isend(buffer, group_dst=target, **settings), buffer)

    def receive(self, expected: Sequence[Expected], kind: str, source: int) -> Incoming:
        """Expect these tensors from pp rank `source`."""
        buffer = torch.empty(_places(expected)[1], dtype=torch.uint8, device=self.context.device)
        if not buffer.numel():
            return Incoming(None, buffer, expected)
        settings = self._settings(kind, self.context.pp_rank > source)
        return Incoming(dist.irecv(buffer, group_src=source, **settings), buffer, expected)

    def _settings(self, kind: str, rises: bool) -> dict[str, Any]:
        if self._has_tags:
            return {"group": self.context.group("pp"), "tag": self.kinds.index(kind)}
        return {"group": self._groups[kind, rises](), "tag": 0}


def _places(expected: Sequence[Expected]) -> tuple[list[int], int]:
    """Where each tensor begins in the buffer, and its size, bytes."""
    places, end = [], 0
    for each in expected:
        places.append(end)
        end += -(-each.num_bytes // ALIGN_BYTES) * ALIGN_BYTES
    return places, end
