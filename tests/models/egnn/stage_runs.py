"""The blockwise edge operation with functions between the stages that return when they are done."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megagnn.models.egnn.edge.stages import (
    Awaited,
    BlockStages,
    EdgeGradients,
    backward_block,
    forward_block,
    interleave,
)

Map = Callable[[Tensor], Tensor]


class _Now:
    """What is there already."""

    def __init__(self, result: Tensor) -> None:
        self._result = result

    def wait(self) -> Tensor:
        return self._result


class CallableLinks:
    """Links made of functions that return when they are done."""

    def __init__(self, product: Callable[..., Tensor], reduce_scalar: Map, gather: Map) -> None:
        self._product, self._reduce_scalar, self._gather = product, reduce_scalar, gather

    def product(self, x: Tensor, y: Tensor, out: Tensor) -> Awaited:
        return _Now(self._product(x, y, out=out))

    def reduce_scalar(self, w: Tensor) -> Awaited:
        return _Now(self._reduce_scalar(w))

    def gather(self, bar: Tensor) -> Awaited:
        return _Now(self._gather(bar))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def run_forward(
    stages: BlockStages, product: Callable[..., Tensor] = torch.mm, reduce_scalar: Map = _same
) -> tuple[Tensor | None, ...]:
    """The operation's outputs; `product` and `reduce_scalar` as in `Links`, but done when they return."""
    outputs, links = stages.start_forward(), CallableLinks(product, reduce_scalar, _same)
    interleave(stages, lambda block: forward_block(stages, block, links))
    return outputs


def run_backward(
    stages: BlockStages,
    bars: Sequence[Tensor | None],
    product: Callable[..., Tensor] = torch.mm,
    reduce_scalar: Map = _same,
    gather: Map = _same,
    first: bool = True,
    geometry: bool = True,
    weights: bool = True,
) -> EdgeGradients:
    """The gradients, of cotangents `bars` of the outputs.

    Args:
        product, reduce_scalar, gather: as in `Links`, but done when they return.
        first: whether this rank adds what all ranks know to r_bar and f_bar; see [Note: shards].
        geometry, weights: whether gradients of r and f, of the weights are wanted.
    """
    gradients, links = (
        stages.start_backward(bars, geometry, weights),
        CallableLinks(product, reduce_scalar, gather),
    )
    interleave(stages, lambda block: backward_block(stages, block, links, first))
    return gradients
