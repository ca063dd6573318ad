"""Tensors of many shapes in one flat buffer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
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
    borders: tuple[int, ...]
    """Elements at which the shards begin, and the end of the last."""

    @classmethod
    def of(cls, shapes: Iterable[tuple[int, ...]], element_size: int, num_shards: int = 1) -> FlatLayout:
        """Tensors in this order, cut into shards of equal length wherever the borders fall.

        element_size: in bytes, of the narrowest buffer.
        """
        shapes = tuple(tuple(shape) for shape in shapes)
        align = ALIGN_BYTES // element_size
        *offsets, end = itertools.accumulate((_room(shape, align) for shape in shapes), initial=0)
        length = _round_up(end, align * num_shards) // num_shards
        return cls(shapes, tuple(offsets), tuple(length * k for k in range(num_shards + 1)))

    @classmethod
    def dealt(
        cls, shapes: Iterable[tuple[int, ...]], element_size: int, owners: Sequence[int], num_shards: int
    ) -> FlatLayout:
        """Whole tensors, each in its owner's shard, in this order there; shards differ in length."""
        shapes = tuple(tuple(shape) for shape in shapes)
        align = ALIGN_BYTES // element_size
        offsets, borders, end = [0] * len(shapes), [0], 0
        for shard in range(num_shards):
            for index in (i for i, owner in enumerate(owners) if owner == shard):
                offsets[index] = end
                end += _room(shapes[index], align)
            borders.append(end)
        return cls(shapes, tuple(offsets), tuple(borders))

    @property
    def size(self) -> int:
        return self.borders[-1]

    @property
    def num_shards(self) -> int:
        return len(self.borders) - 1

    @property
    def longest(self) -> int:
        return max(end - begin for begin, end in itertools.pairwise(self.borders))

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
        """The elements of one of the shards: contiguous, beginning at a multiple of 64 bytes."""
        if not 0 <= rank < self.num_shards:
            raise ValueError(f"FlatLayout: rank must lie in [0, {self.num_shards}), got {rank}")
        return slice(self.borders[rank], self.borders[rank + 1])

    def rows(self, buffer: Tensor) -> list[Tensor]:
        """The shards of a buffer (size,), as views."""
        return [buffer[self.shard(rank)] for rank in range(self.num_shards)]


def _room(shape: tuple[int, ...], align: int) -> int:
    return _round_up(torch.Size(shape).numel(), align)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
