"""Tensors of many shapes in one flat buffer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGN_BYTES = 64


@dataclass(frozen=True)
class FlatLayout:
    """Where each tensor lies: a function of the shapes and the type alone, so every rank computes the same.

    Tensors begin at multiples of 64 bytes, and buffers of wider types (moments, master copies) share the
    layout of the narrowest. What lies between is padding: zero, and it stays zero.
    """

    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    """Element at which each tensor begins."""
    size: int
    """Elements in all, padding included: a multiple of 64 bytes times the number of shards."""
    num_shards: int

    @classmethod
    def of(cls, shapes: Iterable[tuple[int, ...]], element_size: int, num_shards: int = 1) -> FlatLayout:
        """The layout of tensors in this order; element_size, in bytes, is that of the narrowest buffer."""
        shapes = tuple(tuple(shape) for shape in shapes)
        align, offsets, end = ALIGN_BYTES // element_size, [], 0
        for shape in shapes:
            offsets.append(end)
            end += _round_up(torch.Size(shape).numel(), align)
        return cls(shapes, tuple(offsets), _round_up(end, align * num_shards), num_shards)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The tensors in their shapes, as views of `buffer` (size,)."""
        if buffer.shape != (self.size,):
            raise ValueError(
                f"FlatLayout: the buffer must have shape ({self.size},), got {tuple(buffer.shape)}"
            )
        return [
            buffer[offset : offset + torch.Size(shape).numel()].view(shape)
            for shape, offset in zip(self.shapes, self.offsets, strict=True)
        ]

    def shard(self, rank: int) -> slice:
        """The elements of one of the equal shards: contiguous, beginning at a multiple of 64 bytes."""
        if not 0 <= rank < self.num_shards:
            raise ValueError(f"FlatLayout: rank must lie in [0, {self.num_shards}), got {rank}")
        length = self.size // self.num_shards
        return slice(rank * length, (rank + 1) * length)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
