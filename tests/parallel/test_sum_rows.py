"""Rows summed where they lie, in the ranks' order, however they are cut; only a rank's own row changes."""

import pytest
import torch

from megagnn.parallel import messages
from megagnn.parallel.context import ParallelContext
from tests.distributed.spawn import spawn

RANKS, SIZE = 4, 1001


def terms() -> list[torch.Tensor]:
    """What each rank has; float32, so that another order of sums is other bits."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(RANKS, SIZE, generator=generator) for _ in range(RANKS)]


def on_rank(context: ParallelContext) -> dict[int, torch.Tensor]:
    found = {}
    for chunk in (SIZE, 100):
        rows = terms()[context.rank].clone()
        cuts = [slice(a, a + chunk) for a in range(0, SIZE, chunk)]
        for pending in [messages.start_sum_rows(rows[:, cut], context, "dp") for cut in cuts]:
            pending.wait()
        found[chunk] = rows
    found[0] = _of_different_lengths(context)
    return found


def _of_different_lengths(context: ParallelContext) -> torch.Tensor:
    """Sums of rows of 0, 100, 200 and 300 elements, each sent back to all by its owner."""
    rows = [row[: 100 * k] for k, row in enumerate(terms()[context.rank].clone())]
    messages.start_sum_rows(rows, context, "dp").wait()
    messages.start_fill_rows(rows, context, "dp").wait()
    return torch.cat(rows)


def test_bits_and_the_other_rows() -> None:
    parts = terms()
    backwards = parts[3] + parts[2] + parts[1] + parts[0]
    for rank, found in enumerate(spawn(RANKS, on_rank)):
        expected = parts[rank].clone()
        expected[rank] = parts[0][rank] + parts[1][rank] + parts[2][rank] + parts[3][rank]
        assert not torch.equal(expected[rank], backwards[rank]), "another order would be seen"
        different = found.pop(0)
        for rows in found.values():
            assert torch.equal(rows, expected)
        total = parts[0] + parts[1] + parts[2] + parts[3]
        assert torch.equal(different, torch.cat([row[: 100 * k] for k, row in enumerate(total)]))


def test_needs_a_row_for_each_rank() -> None:
    context = ParallelContext(tp_size=4)
    with pytest.raises(ValueError, match=r"one row \(n,\) per rank, 4, got \[\(2,\), \(2,\), \(2,\)\]"):
        messages.start_sum_rows(torch.zeros(3, 2), context, "tp")
    with pytest.raises(ValueError, match="sum_rows needs a contiguous tensor"):
        messages.start_sum_rows(torch.zeros(2, 4).t(), context, "tp")
    rows = torch.ones(1, 3)
    assert torch.equal(messages.start_sum_rows(rows, ParallelContext(), "tp").wait(), rows[0])
