"""Segments that the tests of the operations use."""

from __future__ import annotations

import torch

from megagnn.ops import Segments


def random_segments(num_rows: int, num_entries: int, *, perm: bool, seed: int = 0) -> Segments:
    """Rows of uneven length, every third of them empty; with perm, the entries lie in random order."""
    generator = torch.Generator().manual_seed(seed)
    index = (torch.rand(num_entries, generator=generator) ** 2 * num_rows).long()
    index -= (index % 3 == 1).long()
    order = index.argsort(stable=True) if perm else None
    index = index if perm else index.sort().values
    counts = torch.bincount(index, minlength=num_rows)
    segments = Segments(index, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), order)
    segments.validate()
    return segments


def long_row(num_entries: int, *, perm: bool) -> Segments:
    """Three rows, of which the middle one holds nearly all entries."""
    counts = torch.tensor([2, num_entries - 5, 3])
    index = torch.repeat_interleave(torch.arange(3), counts)
    order = None
    if perm:
        index = index[torch.randperm(num_entries, generator=torch.Generator().manual_seed(1))]
        order = index.argsort(stable=True)
    return Segments(index, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), order)
