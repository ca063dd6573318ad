"""The flat layout: aligned, padded, divisible into shards, and reversible."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megagnn.optim.flat import FlatLayout

SHAPES = [(3, 5), (), (16,), (1, 1), (17,), (0, 4)]


def test_literal_example() -> None:
    layout = FlatLayout.of(SHAPES, element_size=4)
    assert layout.offsets == (0, 16, 32, 48, 64, 96)
    assert layout.size == 96
    assert FlatLayout.of(SHAPES, element_size=4, num_shards=4).size == 128
    assert FlatLayout.of(SHAPES, element_size=2).offsets == (0, 32, 64, 96, 128, 160)
    assert FlatLayout.of([], element_size=4).size == 0


@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=8),
    element_size=st.sampled_from([2, 4, 8]),
    num_shards=st.integers(1, 5),
)
def test_views_cover_all_but_the_padding(
    shapes: list[tuple[int, ...]], element_size: int, num_shards: int
) -> None:
    layout = FlatLayout.of(shapes, element_size, num_shards)
    buffer = torch.zeros(layout.size, dtype=torch.int64)
    views = layout.views(buffer)
    assert [tuple(view.shape) for view in views] == shapes
    for view in views:
        view.add_(1)
    assert buffer.sum() == sum(view.numel() for view in views)
    assert not (buffer > 1).any(), "no two overlap"
    assert all(offset * element_size % 64 == 0 for offset in layout.offsets)
    parts = [buffer[layout.shard(rank)] for rank in range(num_shards)]
    assert torch.equal(torch.cat(parts), buffer)
    assert len({len(part) for part in parts}) == 1
    assert len(parts[0]) * element_size % 64 == 0


def test_errors() -> None:
    layout = FlatLayout.of(SHAPES, 4, num_shards=2)
    with pytest.raises(ValueError, match=r"the buffer must have shape \(96,\), got \(95,\)"):
        layout.views(torch.zeros(95))
    with pytest.raises(ValueError, match=r"rank must lie in \[0, 2\), got 2"):
        layout.shard(2)
