"""The operations in plain PyTorch: what the kernels are tested against, and what runs without them."""

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


def segment_mean(values: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Mean of the rows of `values` (E, ...) that share an entry of `index`; rows without entries are zero."""
    wide = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
    sums = segment_sum(wide, index, num_rows)
    counts = torch.bincount(index, minlength=num_rows).clamp(min=1).to(wide.dtype)
    return (sums / counts.view(-1, *(1,) * (values.dim() - 1))).to(values.dtype)


def segment_max_entry(values: Tensor, index: Tensor, num_rows: int, perm: Tensor | None) -> Tensor:
    """Entry of the maximum of each row and column, the first of equal ones in perm's order: (num_rows, ...).

    -1 for rows without entries. A NaN counts as larger than any number.
    """
    values = values.detach()
    if perm is not None:
        values, index = values[perm], index[perm]
    rows = index.view(-1, *(1,) * (values.dim() - 1)).expand_as(values)
    shape, num_entries = (num_rows, *values.shape[1:]), values.shape[0]
    wide = values.float() if values.dtype == torch.bfloat16 else values
    largest = wide.new_zeros(shape).scatter_reduce(0, rows, wide, "amax", include_self=False)
    found = largest[index]
    position = torch.arange(num_entries, device=values.device).view(-1, *(1,) * (values.dim() - 1))
    position = torch.where((wide == found) | (wide != wide), position, num_entries)
    first = index.new_full(shape, num_entries).scatter_reduce(0, rows, position, "amin")
    if perm is not None and num_entries:
        first = torch.where(first < num_entries, perm[first.clamp(max=num_entries - 1)], num_entries)
    return torch.where(first < num_entries, first, -1)


def gather_weighted_sum(
    values: Tensor, weight: Tensor, source_index: Tensor, index: Tensor, num_rows: int
) -> Tensor:
    """out[index[e]] += weight[e] * values[source_index[e]]: (M, ...), (E,), (E,), (E,) to (num_rows, ...).

    bfloat16 values are multiplied and summed in float32, the type of weight, and rounded once.
    """
    rows = values.index_select(0, source_index).to(weight.dtype)
    return segment_sum(rows * weight.view(-1, *(1,) * (values.dim() - 1)), index, num_rows).to(values.dtype)


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
