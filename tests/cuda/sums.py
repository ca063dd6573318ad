"""What the tests of sums over CSR rows share."""

from __future__ import annotations

import torch

from tests.cuda.emulator import Guarded

SPLIT_ENTRIES = 1024  # kSplitEntries of csrc/cuda/row_sum.h


def row_sum_workspace(dtype: torch.dtype, num_entries: int, width: int) -> Guarded:
    """The memory a row sum asks for, and no more."""
    num_pieces = -(-num_entries // SPLIT_ENTRIES) if num_entries > SPLIT_ENTRIES else 0
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Guarded((num_pieces, 2, width), wide)
