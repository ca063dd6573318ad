"""Collectives over the data-parallel ranks, outside of autograd; no-ops on one rank."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagnn.parallel.context import ParallelContext


def all_reduce_sum(tensor: Tensor, context: ParallelContext) -> Tensor:
    """Sum over the ranks, in place; returns the tensor.

    Raises:
        ValueError: a tensor that is not contiguous: gloo reduces such a view wrongly and overwrites memory
            beside it.
    """
    if not tensor.is_contiguous():
        raise ValueError(
            f"all_reduce needs a contiguous tensor, got strides {tensor.stride()}; call .contiguous() first"
        )
    if context.dp_size > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=context.dp_group)
    return tensor


def broadcast_object(value: Any, context: ParallelContext) -> Any:
    """Rank 0's value on every rank."""
    if context.dp_size == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0, group=context.dp_group)
    return holder[0]


def gather_objects(value: Any, context: ParallelContext) -> list[Any] | None:
    """Every rank's value, in the order of the ranks, on the main rank; None on the others."""
    if context.dp_size == 1:
        return [value]
    values = [None] * context.dp_size if context.is_main else None
    dist.gather_object(value, values, dst=0, group=context.dp_group)
    return values


def barrier(context: ParallelContext) -> None:
    """Wait for every rank."""
    if context.dp_size > 1:
        dist.barrier(group=context.dp_group)


def broadcast_parameters(module: nn.Module, context: ParallelContext) -> None:
    """Copy rank 0's parameters and buffers to every rank."""
    if context.dp_size > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, src=0, group=context.dp_group)


def all_reduce_gradients(parameters: Iterable[nn.Parameter], context: ParallelContext) -> None:
    """Sum every parameter's gradient over the ranks, as one flat message; a missing gradient counts as zero.

    The loss is a sum over global counts (`train.loss`), so a sum of gradients and not a mean is the global
    gradient.
    """
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if context.dp_size == 1 or not parameters:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat, op=dist.ReduceOp.SUM, group=context.dp_group)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
