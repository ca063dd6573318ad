"""Collectives of all ranks or of an axis outside of a model; no-ops on one rank."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagnn.parallel import messages
from megagnn.parallel.context import ParallelContext


def sum_over_dp(tensor: Tensor, context: ParallelContext) -> Tensor:
    """Sum over the data-parallel ranks, in place; returns the tensor. The others hold the same numbers.

    Raises:
        ValueError: a tensor that is not contiguous.
    """
    return messages.all_reduce(tensor, context, "dp")


def sum_numbers(values: Sequence[float], context: ParallelContext, axis: str) -> list[float]:
    """Sums over the ranks of an axis, or of the "world", the same on each: a message of a few numbers."""
    tensor = torch.tensor(values, dtype=torch.float64, device=context.device)
    sums: list[float] = messages.all_reduce(tensor, context, axis).tolist()
    return sums


def broadcast_object(value: Any, context: ParallelContext) -> Any:
    """The main rank's value on every rank."""
    if context.world_size == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0, group=context.group("world"))
    return holder[0]


def gather_objects(value: Any, context: ParallelContext) -> list[Any] | None:
    """The value of every data-parallel rank, in their order, on the main rank; None on the others.

    Of a tensor-parallel group, which holds the same, the first rank speaks.
    """
    if context.world_size == 1:
        return [value]
    values = [None] * context.world_size if context.is_main else None
    dist.gather_object(value, values, dst=0, group=context.group("world"))
    return None if values is None else values[:: context.pp_size * context.tp_size]


def barrier(context: ParallelContext) -> None:
    """Wait for every rank."""
    if context.world_size > 1:
        dist.barrier(group=context.group("world"))


def broadcast_parameters(module: nn.Module, context: ParallelContext) -> None:
    """Copy the parameters and buffers of the first data-parallel rank to the others.

    Every layout draws the same weights (parallel/parameter.py); machines may still round differently.
    """
    if context.dp_size > 1:
        source = dist.get_global_rank(context.group("dp"), 0)
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, src=source, group=context.group("dp"))


def gather_along(value: Any, context: ParallelContext, axis: str) -> list[Any]:
    """The values of all ranks of an axis, or of the "world", in their order, on each of them."""
    if context.size(axis) == 1:
        return [value]
    values: list[Any] = [None] * context.size(axis)
    dist.all_gather_object(values, value, group=context.group(axis))
    return values
