"""The atoms' side of a layer as two functions: each a few products, with what lies between them in the cache.

As chains of small operations they and their backwards are some eighty calls per layer, which in a small
model's step show beside the edge operation; and products of a thousand rows are hardly divided over threads.
The kernels are csrc/node.cpp; anything else takes the chains, `norm_linear_reference` and
`silu_linear_reference`, which also answer where gradients are differentiated again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megagnn.ops import dual, extension
from megagnn.ops.dispatch import ABSENT, below_autograd
from megagnn.ops.recompute import by_autograd, used_gradients

_OPS = torch.ops.megagnn
_ANY_WIDTH = 128  # as many columns as a block has rows (csrc/node.cpp)
Tensors = Sequence[Tensor | None]


def has_kernels(features: Tensor) -> bool:
    """Whether the compiled functions serve features (N, F) like these.

    Wide ones of few atoms stay with torch: there are more threads than blocks, and it divides each product.
    """
    if torch.compiler.is_compiling():
        return False
    if not (extension.has_cpu and features.is_cpu and features.dtype in (torch.float32, torch.float64)):
        return False
    rows, width = features.shape
    return width <= _ANY_WIDTH or rows >= width * torch.get_num_threads()


def norm_linear(
    h_NF: Tensor, gain_F: Tensor | None, eps: float, weights: Sequence[Tensor], biases: Tensors
) -> tuple[Tensor, ...]:
    """n W^T + b, (N, H), for each of the weights (H, F) and biases (H) or None.

    n = h / sqrt(mean(h^2) + eps) gain (Zhang and Sennrich 2019, eq. 4), or h where there is no gain.
    Differentiable any number of times; of a result that nobody reads the cotangent is zero, and with it the
    gradients of its weight and bias. Raises ValueError for another number of biases than of weights,
    RuntimeError for sizes or types that do not fit.
    """
    if len(weights) != len(biases):
        raise ValueError(
            f"norm_linear: there must be a bias, or None, for each weight, got {len(biases)} for "
            f"{len(weights)}"
        )
    if not has_kernels(h_NF):
        return norm_linear_reference(h_NF, gain_F, eps, weights, biases)
    outputs: tuple[Tensor, ...] = _NormLinear.apply(eps, h_NF, gain_F, *weights, *biases)
    return outputs


def norm_linear_reference(
    h_NF: Tensor, gain_F: Tensor | None, eps: float, weights: Sequence[Tensor], biases: Tensors
) -> tuple[Tensor, ...]:
    """`norm_linear` by PyTorch's operations."""
    n_NF = h_NF
    if gain_F is not None:
        mean_N1 = dual.square_sum(h_NF) * (1.0 / h_NF.shape[1])
        n_NF = dual.scale_rows(h_NF, dual.rsqrt(mean_N1 + eps), gain_F)
    return tuple(functional.linear(n_NF, w, b) for w, b in zip(weights, biases, strict=True))


def silu_linear(
    u_NK: Tensor,
    weight_FK: Tensor,
    bias_F: Tensor | None,
    side: tuple[Tensor, Tensor, float] | None = None,
    h_NF: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """h + scale (silu(u + factor s U^T) W^T + b), (N, F), with side = s (N, M), U (K, M), factor.

    Without h or side they are zero. Differentiable any number of times. Raises RuntimeError for sizes or
    types that do not fit.
    """
    if not has_kernels(u_NK):
        return silu_linear_reference(u_NK, weight_FK, bias_F, side, h_NF, scale)
    s_NM, weight_KM, factor = side or (None, None, 1.0)
    y_NF: Tensor = _SiLULinear.apply(factor, scale, u_NK, s_NM, weight_KM, weight_FK, bias_F, h_NF)
    return y_NF


def silu_linear_reference(
    u_NK: Tensor,
    weight_FK: Tensor,
    bias_F: Tensor | None,
    side: tuple[Tensor, Tensor, float] | None = None,
    h_NF: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """`silu_linear` by PyTorch's operations."""
    if side is not None:
        s_NM, weight_KM, factor = side
        u_NK = u_NK + functional.linear(s_NM * factor, weight_KM)
    y_NF = functional.linear(dual.silu(u_NK), weight_FK, bias_F) * scale
    return y_NF if h_NF is None else h_NF + y_NF


class _NormLinear(torch.autograd.Function):
    """eps, h, gain, weights, biases -> a result for each weight."""

    @staticmethod
    def forward(ctx: Any, eps: float, h: Tensor, gain: Tensor | None, *linears: Tensor | None) -> Any:
        weights, biases = _halves(linears)
        with below_autograd():
            inverse, *outputs = _OPS.norm_linear.default(h, _some(gain), eps, list(weights), _all(biases))
        ctx.eps = eps
        ctx.save_for_backward(inverse, h, gain, *linears)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> Any:
        inverse, *tensors = ctx.saved_tensors  # once: a recomputed layer is computed here
        used = used_gradients(ctx, tensors)
        if torch.is_grad_enabled():
            gradients = by_autograd(
                lambda h, gain, *rest: _reference(h, gain, ctx.eps, rest), tensors, used, bars
            )
            return (None, *gradients)
        h, gain, *linears = tensors
        weights, biases = _halves(linears)
        given = (h, _some(gain), inverse, list(weights), _all(biases), list(bars))
        with below_autograd():
            found = _OPS.norm_linear_backward.default(*given, any(used[:2]), any(used[2:]))
        return (None, *_only(found, used))


def _reference(h: Tensor, gain: Tensor | None, eps: float, linears: Tensors) -> tuple[Tensor, ...]:
    weights, biases = _halves(linears)
    return norm_linear_reference(h, gain, eps, weights, biases)  # type: ignore[arg-type]


class _SiLULinear(torch.autograd.Function):
    """factor, scale, u, s, its weight, weight, bias, h -> y."""

    @staticmethod
    def forward(ctx: Any, factor: float, scale: float, *tensors: Tensor | None) -> Tensor:
        with below_autograd():
            y, z = _OPS.silu_linear.default(*_all(tensors), factor, scale)
        ctx.factor, ctx.scale, ctx.has_h = factor, scale, tensors[-1] is not None
        ctx.save_for_backward(z, *tensors[:-1])
        return y

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> Any:
        z, *tensors = ctx.saved_tensors  # once: a recomputed layer is computed here
        h_bar = bars[0] if ctx.has_h else None
        used = used_gradients(ctx, (*tensors, h_bar))[:-1]
        if torch.is_grad_enabled():

            def function(
                u: Tensor, s: Any, weight_KM: Any, weight: Tensor, bias: Tensor | None
            ) -> tuple[Tensor]:
                side = None if s is None else (s, weight_KM, ctx.factor)
                return (silu_linear_reference(u, weight, bias, side, scale=ctx.scale),)

            return (None, None, *by_autograd(function, tensors, used, bars), h_bar)
        u, s, *weights = tensors
        given = (u if s is None else z, *_all((s, *weights)), *bars, ctx.factor, ctx.scale)
        with below_autograd():
            found = _OPS.silu_linear_backward.default(*given, used[1], any(used[2:]))
        return (None, None, *_only(found, used), h_bar)


def _halves(linears: Tensors) -> tuple[Tensors, Tensors]:
    count = len(linears) // 2
    return linears[:count], linears[count:]


def _some(tensor: Tensor | None) -> Tensor:
    return ABSENT if tensor is None else tensor


def _all(tensors: Tensors) -> list[Tensor]:
    return list(map(_some, tensors))


def _only(found: Sequence[Tensor], used: Sequence[bool]) -> list[Tensor | None]:
    """Gradients, None for those that are absent or that nobody uses."""
    return [gradient if u else None for gradient, u in zip(found, used, strict=True)]
