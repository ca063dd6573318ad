"""Messages along the pipeline axis: several tensors at a time, in the order of a channel."""

import math
import weakref
from collections.abc import Sequence
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


class Channels:
    """Sends and receives along pp; messages of one kind from one rank to another keep their order.

    The kinds are tags where the back end has tags (gloo), and else (NCCL) each a group of its own, whose
    making is a collective along pp. A message is one buffer of bytes; one without bytes is not sent.

    Args:
        kinds: names of the channels, the same on every rank.
    """

    def __init__(self, context: ParallelContext, kinds: Sequence[str]) -> None:
        self.context, self.kinds = context, list(kinds)
        self._groups: dict[str, weakref.ref[Any]] = {}
        if context.pp_size == 1:
            return
        self._has_tags = dist.get_backend(context.group("pp")) == "gloo"
        if self._has_tags:
            return
        ranks = dist.get_process_group_ranks(context.group("pp"))
        for kind in self.kinds:
            group = dist.new_group(ranks, use_local_synchronization=True, group_desc=f"pipeline {kind}")
            self._groups[kind] = weakref.ref(group)

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
        return Sent(dist.isend(buffer, group_dst=target, **self._settings(kind)), buffer)

    def receive(self, expected: Sequence[Expected], kind: str, source: int) -> Incoming:
        """Expect these tensors from pp rank `source`."""
        buffer = torch.empty(_places(expected)[1], dtype=torch.uint8, device=self.context.device)
        if not buffer.numel():
            return Incoming(None, buffer, expected)
        return Incoming(dist.irecv(buffer, group_src=source, **self._settings(kind)), buffer, expected)

    def _settings(self, kind: str) -> dict[str, Any]:
        if self._has_tags:
            return {"group": self.context.group("pp"), "tag": self.kinds.index(kind)}
        return {"group": self._groups[kind](), "tag": 0}


def _places(expected: Sequence[Expected]) -> tuple[list[int], int]:
    """Where each tensor begins in the buffer, and its size, bytes."""
    places, end = [], 0
    for each in expected:
        places.append(end)
        end += -(-each.num_bytes // ALIGN_BYTES) * ALIGN_BYTES
    return places, end
