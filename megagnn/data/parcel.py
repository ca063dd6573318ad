"""A batch as one piece of memory: how it comes from a process that made it, and goes to a device.

Some thirty tensors would be as many pieces of shared memory, each opened and mapped by the training process,
and as many copies to a GPU. In one piece they lie one after another, and what arrives are views of it. Memory
that both processes have mapped once and for all (`Slots`) spares the opening, too; it is copied on arrival.

Narrow, both ends of edges and their order travel as int32 and lattice shifts as int8 where they fit, and are
widened on arrival, for the operations read int64 and floats: 15 bytes an edge in place of 36 or 48. That is
for the way to a GPU. Between processes of one machine memory is shared and nothing travels: there widening
would be one pass over the edges more (docs/loading.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megagnn.data import keys

# Views begin at multiples of this, as tensors of their own do.
_ALIGNMENT = 64
_ENDS = (keys.EDGE_INDEX, keys.SOURCE_PERM)


class _Part(NamedTuple):
    key: str
    begin: int
    sent: torch.dtype
    wanted: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Parcel:
    """A batch on its way; `batch` unpacks it."""

    memory: Tensor | None
    """(bytes,) uint8; None where it lies in a slot."""
    parts: tuple[_Part, ...]
    slot: int = 0

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], narrow: bool = False, slot: Tensor | None = None) -> Parcel:
        """Copies a batch of CPU tensors, to a slot's memory if it is given and large enough."""
        sent = {key: _narrowed(key, value) if narrow else value for key, value in batch.items()}
        parts, at = [], 0
        for key, value in sent.items():
            parts.append(_Part(key, at, value.dtype, batch[key].dtype, tuple(value.shape)))
            at += -(-value.numel() * value.element_size() // _ALIGNMENT) * _ALIGNMENT
        fits = slot is not None and at <= len(slot)
        memory = slot if slot is not None and fits else torch.empty(at, dtype=torch.uint8)
        for part, value in zip(parts, sent.values(), strict=True):
            _view(memory, part).copy_(value)
        return cls(None if fits else memory, tuple(parts))

    def pin_memory(self) -> Parcel:
        """For copies to a GPU beside its work; a DataLoader calls it by this name."""
        assert self.memory is not None
        return Parcel(self.memory.pin_memory(), self.parts)

    def batch(self, device: torch.device | None = None) -> dict[str, Tensor]:
        """The batch on a device, but for entries named `keys.STAYS`: views of one piece of memory, and what
        is widened."""
        assert self.memory is not None
        memory = self.memory if device is None else self.memory.to(device, non_blocking=True)
        return {
            part.key: _view(self.memory if keys.STAYS in part.key else memory, part).to(part.wanted)
            for part in self.parts
        }


class Slots:
    """Memory for batches on their way, mapped by all processes that have it: a ring of `num` pieces.

    Args:
        num_bytes: of each; the system's shared memory (/dev/shm) has room for all of them at once.
    """

    def __init__(self, num: int, num_bytes: int) -> None:
        self.memory = torch.empty(num, num_bytes, dtype=torch.uint8).share_memory_()

    def send(self, batch: Mapping[str, Tensor], number: int) -> Parcel:
        """A parcel in the slot of a number; in memory of its own if the slot is too small."""
        slot = number % len(self.memory)
        return replace(Parcel.of(batch, slot=self.memory[slot]), slot=slot)

    def receive(self, parcel: Parcel) -> Parcel:
        """The parcel in memory of its own; its slot is free."""
        if parcel.memory is not None:
            return parcel
        end = max((part.begin + _size(part) for part in parcel.parts), default=0)
        return replace(parcel, memory=self.memory[parcel.slot, :end].clone())


def _size(part: _Part) -> int:
    return math.prod(part.shape) * part.sent.itemsize


def _view(memory: Tensor, part: _Part) -> Tensor:
    flat = memory[part.begin : part.begin + _size(part)].view(part.sent)
    return flat if len(part.shape) == 1 else flat.view(part.shape)


def _narrowed(key: str, value: Tensor) -> Tensor:
    if key in _ENDS and value.shape[-1] < 2**31:  # neither atoms nor edges are more
        return value.to(torch.int32)
    if key == keys.CELL_SHIFTS and (not len(value) or float(value.abs().max()) <= 127):
        return value.to(torch.int8)
    return value
