"""Which part of whole tensors a rank's pieces are: boxes, and who writes which of what several ranks hold.

A checkpoint knows nothing of ranks: it is whole tensors, cut into boxes (offsets and sizes along every
dimension) that lie in some file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from megagnn.optim.pieces import Piece
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import ParameterLayout

_KEY = re.compile(r"(?P<name>.*)\[(?P<ranges>[0-9:,]*)\]")


@dataclass(frozen=True)
class Box:
    """A box of a whole tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def key(self, name: str) -> str:
        """Its name in a file: model/embedding.weight[0:8,16:32]."""
        ranges = zip(self.offsets, self.sizes, strict=True)
        return f"{name}[{','.join(f'{offset}:{offset + size}' for offset, size in ranges)}]"

    def overlap(self, other: Box) -> Box | None:
        """The common box of two boxes of one tensor; None where there is none."""
        begins = tuple(map(max, self.offsets, other.offsets))
        ends = (min(a, b) for a, b in zip(self._ends, other._ends, strict=True))
        sizes = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
        return Box(begins, sizes) if min(sizes, default=1) > 0 else None

    def slices_in(self, outer: Box) -> tuple[slice, ...]:
        """The slices of this box in a tensor that holds a box around it."""
        places = zip(self.offsets, self.sizes, outer.offsets, strict=True)
        return tuple(slice(a - first, a - first + size) for a, size, first in places)

    @property
    def _ends(self) -> tuple[int, ...]:
        return tuple(a + size for a, size in zip(self.offsets, self.sizes, strict=True))


def parse_key(key: str) -> tuple[str, Box]:
    """The inverse of `Box.key`; raises ValueError for anything else."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise ValueError(f"{key!r} is not the name of a box of a tensor")
    ranges = [part.split(":") for part in match["ranges"].split(",") if part]
    begins, ends = [int(begin) for begin, _ in ranges], [int(end) for _, end in ranges]
    return match["name"], Box(tuple(begins), tuple(e - b for b, e in zip(begins, ends, strict=True)))


@dataclass(frozen=True)
class Part:
    """A box of a whole tensor, and the memory that holds it or will."""

    box: Box
    values: Tensor
    """In the shape of the box."""
    full_shape: tuple[int, ...]


Parts = dict[str, list[Part]]
"""{"KIND/NAME": boxes}."""


def whole_parts(tensors: Mapping[str, Tensor]) -> Parts:
    """Whole tensors as parts."""
    return {
        name: [Part(Box((0,) * tensor.ndim, tuple(tensor.shape)), tensor, tuple(tensor.shape))]
        for name, tensor in tensors.items()
    }


def boxes_of_run(shape: Sequence[int], begin: int, end: int) -> list[Box]:
    """The boxes that elements [begin, end) of a tensor make, laid out row by row, in their order.

    At most one partial box per dimension on either side of the whole rows. Each box is a run, too.
    """
    if begin >= end:
        return []
    if not shape:
        return [Box((), ())]
    row = math.prod(shape[1:])
    first, last = -(-begin // row), end // row  # whole rows
    if first > last:  # within one row
        return _in_row(shape, last, begin - last * row, end - last * row)
    boxes = _in_row(shape, first - 1, begin - (first - 1) * row, row) if begin < first * row else []
    if first < last:
        zeros = (0,) * (len(shape) - 1)
        boxes.append(Box((first, *zeros), (last - first, *shape[1:])))
    return boxes + _in_row(shape, last, 0, end - last * row)


def _in_row(shape: Sequence[int], row: int, begin: int, end: int) -> list[Box]:
    inner = boxes_of_run(shape[1:], begin, end)
    return [Box((row, *box.offsets), (1, *box.sizes)) for box in inner]


def slice_box(layout: ParameterLayout) -> Box:
    """The tensor-parallel slice of a layout in the whole."""
    offsets, sizes = [0] * len(layout.full_shape), list(layout.full_shape)
    if layout.is_sharded:
        assert layout.dim is not None
        sizes[layout.dim] //= layout.num_slices
        offsets[layout.dim] = layout.index * sizes[layout.dim]
    return Box(tuple(offsets), tuple(sizes))


def parts_of(piece: Piece, begin: int, end: int) -> list[Part]:
    """The boxes in the whole of elements [begin, end) of the piece's slice, which lie in the piece."""
    whole, parts, at = slice_box(piece.layout), [], begin - piece.begin
    for box in boxes_of_run(whole.sizes, begin, end):
        values = piece.values[at : at + box.numel].view(box.sizes)
        at += box.numel
        offsets = tuple(a + b for a, b in zip(whole.offsets, box.offsets, strict=True))
        parts.append(Part(Box(offsets, box.sizes), values, piece.layout.full_shape))
    return parts


def parts_by_name(pieces: Iterable[Piece]) -> Parts:
    """All that a rank holds."""
    parts: Parts = {}
    for piece in pieces:
        parts.setdefault(f"{piece.kind}/{piece.name}", []).extend(parts_of(piece, piece.begin, piece.end))
    return parts


def share_of(pieces: Iterable[Piece], context: ParallelContext) -> Parts:
    """The part of its pieces that this rank writes: of what n ranks hold alike, an n-th of the bytes.

    All data-parallel ranks hold a replicated piece, all tensor-parallel ranks hold pieces of parameters that
    they do not divide. Pieces come in the same order on all ranks that hold them.
    """
    alike: dict[tuple[bool, bool], list[Piece]] = {}
    for piece in pieces:
        over_tp = not piece.layout.is_sharded and not piece.of_one_rank
        alike.setdefault((piece.replicated, over_tp), []).append(piece)
    parts: Parts = {}
    for (over_dp, over_tp), group in alike.items():
        num, index = 1, 0
        for shared, size, rank in (
            (over_dp, context.dp_size, context.dp_rank),
            (over_tp, context.tp_size, context.tp_rank),
        ):
            if shared:
                num, index = num * size, index * size + rank
        total, start = sum(p.values.nbytes for p in group), 0
        low, high = total * index // num, total * (index + 1) // num
        for piece in group:
            width = piece.values.element_size()
            begin, end = (
                min(max(piece.begin - (start - cut) // width, piece.begin), piece.end) for cut in (low, high)
            )
            start += piece.values.nbytes
            if begin < end:
                parts.setdefault(f"{piece.kind}/{piece.name}", []).extend(parts_of(piece, begin, end))
    return parts
