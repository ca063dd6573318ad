"""Segment sum over sorted rows (CSR), and its transpose, the gather."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megagnn.ops import reference


@dataclass(frozen=True)
class Segments:
    """Which row every entry belongs to.

    index (E,) int64 row of each entry; ptr (N+1,) int64; perm (E,) int64 or None:
    the entries of row i are perm[ptr[i]:ptr[i+1]], or ptr[i]:ptr[i+1] where perm is None (index is sorted).
    """

    index: Tensor
    ptr: Tensor
    perm: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows, N."""
        return self.ptr.shape[0] - 1

    @property
    def num_entries(self) -> int:
        """Number of entries, E."""
        return self.index.shape[0]


def segment_sum(values: Tensor, segments: Segments) -> Tensor:
    """Sum over the entries of each row: values (E, ...) to (N, ...)."""
    return reference.segment_sum(values, segments.index, segments.num_rows)


def gather(values: Tensor, segments: Segments) -> Tensor:
    """values[index]: (N, ...) to (E, ...)."""
    return reference.gather(values, segments.index)
