"""Which gradients a backward that is running will use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def used_gradients(ctx: Any, tensors: Sequence[Tensor | None]) -> list[bool]:
    """Whether this backward uses a gradient of each tensor that a Function was applied to, in their order.

    needs_input_grad knows only what requires gradients: a force pass over a model in training, which asks for
    positions alone, would pay for those of the weights, as the input half of a split backward would.
    """
    nodes = iter(ctx.next_functions)  # one per tensor; an absent one has none
    return [t is not None and _is_used(next(nodes)[0]) for t in tensors]


def _is_used(node: Any) -> bool:
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that autograd.grad was asked for: the engine hands its gradient out itself
        return True
