"""The operations in plain PyTorch: what the kernels are tested against, and what runs without them."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(values: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Sums the rows of `values` (E, ...) that share an entry of `index` (E,) into (num_rows, ...).

    bfloat16 and float16 are summed in float32 and rounded once at the end, as in the compiled kernels.
    """
    accumulator = torch.float32 if values.dtype in (torch.bfloat16, torch.float16) else values.dtype
    out = values.new_zeros((num_rows, *values.shape[1:]), dtype=accumulator)
    return out.index_add(0, index, values.to(accumulator)).to(values.dtype)


def gather(values: Tensor, index: Tensor) -> Tensor:
    """values[index]: (N, ...) and (E,) to (E, ...); the transpose of `segment_sum`."""
    return values.index_select(0, index)
