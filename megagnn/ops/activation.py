"""SiLU whose first and second derivative are single expressions.

PyTorch's own backward of SiLU, when it must be differentiated again, falls apart into a chain of elementary
products that the second backward then walks term by term. Here the backward is a Function of its own, and its
backward uses the closed form of the second derivative.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megagnn.ops.dispatch import accumulator_type


def silu_second_derivative(x: Tensor) -> Tensor:
    """d^2/dx^2 x s(x) = s (1 - s) (2 + x (1 - 2 s)) with s the logistic function; float32 of bfloat16."""
    x = x.to(accumulator_type(x.dtype))
    s = torch.sigmoid(x)
    if torch.is_grad_enabled():
        return s * (1 - s) * (2 + x * (1 - 2 * s))
    # in place where nothing is recorded: this is the last backward of a training step
    bracket = torch.mul(s, -2).add_(1).mul_(x).add_(2)
    return bracket.mul_(s.addcmul_(s, s, value=-1))


class _SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return functional.silu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        first: Tensor = _SiLUBackward.apply(grad, x)
        return first


class _SiLUBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(grad, x)
        first: Tensor = torch.ops.aten.silu_backward(grad, x)
        return first

    @staticmethod
    def backward(ctx: Any, grad_grad: Tensor) -> tuple[Tensor, Tensor]:
        grad, x = ctx.saved_tensors
        first: Tensor = _SiLUBackward.apply(grad_grad, x)
        second = silu_second_derivative(x)
        if torch.is_grad_enabled():
            return first, (second * grad * grad_grad).to(x.dtype)
        return first, second.mul_(grad).mul_(grad_grad).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """x s(x), (...) -> (...), cheap to differentiate twice."""
    y: Tensor = _SiLU.apply(x)
    return y
