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


@torch.no_grad()
def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> None:
    """One AdamW step in place; see `megagnn.ops.adamw_`. Makes some temporaries of the size of `param`."""
    weights = param if master is None else master
    grad = grad.to(exp_avg.dtype) * grad_scale
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = exp_avg_sq.sqrt().mul_((1 - beta2**step) ** -0.5).add_(eps)
    weights.mul_(1 - lr * weight_decay).addcdiv_(exp_avg, root, value=-lr / (1 - beta1**step))
    if master is not None:
        param.copy_(master)


def square_sum(values: Tensor) -> Tensor:
    """Sum of squares as a float64 scalar: runs of 1024 in the accumulator's type, then float64."""
    accumulator = torch.float32 if values.dtype == torch.bfloat16 else None
    flat = values.reshape(-1)
    whole = flat.numel() // 1024 * 1024
    runs = torch.linalg.vector_norm(flat[:whole].view(-1, 1024), dim=1, dtype=accumulator)
    rest = torch.linalg.vector_norm(flat[whole:], dtype=accumulator)
    return runs.double().square().sum() + rest.double().square()
