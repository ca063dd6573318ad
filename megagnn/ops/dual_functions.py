"""Functions of planes, value and tangent in one tensor (2, ...), with backwards in closed form.

What a chain of products of `Dual` numbers would walk term by term, a dozen operations for each of these. The
bars of the comments are cotangents: b of the value, b' of the tangent.
"""

from typing import Any

import torch
from torch import Tensor

from megagnn.ops.dispatch import accumulator_type


class _PlanesFunction(torch.autograd.Function):
    @classmethod
    def call(cls, *arguments: Any) -> Tensor:
        result: Tensor = cls.apply(*arguments)
        return result


class SquareSum(_PlanesFunction):
    """(2, ..., F) -> (2, ..., 1): s = sum x^2, s' = 2 sum x x'; x_bar = 2 (x b + x' b'), x'_bar = 2 x b'.

    The sums of bfloat16 are float32.
    """

    @staticmethod
    def forward(ctx: Any, planes: Tensor) -> Tensor:
        ctx.save_for_backward(planes)
        planes = _wide(planes)
        out = (planes * planes[0]).sum(-1, keepdim=True)
        out[1].mul_(2)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (saved,) = ctx.saved_tensors
        value, tangent = _wide(saved).unbind(0)
        bars = grads[0] * 2
        by_value, by_tangent = (value * bars).unbind(0)
        return torch.stack((torch.addcmul(by_value, tangent, bars[1]), by_tangent)).to(saved.dtype)


class InverseRoot(_PlanesFunction):
    """y = x^(-1/2), y' = -y^3 x'/2; x_bar = -y^3 b/2 + 3 y^5 x' b'/4, x'_bar = -y^3 b'/2."""

    @staticmethod
    def forward(ctx: Any, planes: Tensor) -> Tensor:
        ctx.save_for_backward(planes)
        root = torch.rsqrt(planes[0])
        return torch.stack((root, -0.5 * root**3 * planes[1]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (planes,) = ctx.saved_tensors
        value, tangent = planes.unbind(0)
        slope = -0.5 * torch.rsqrt(value) / value
        by_value, by_tangent = (grads[0] * slope).unbind(0)
        return torch.stack((torch.addcdiv(by_value, by_tangent * tangent, value, value=-1.5), by_tangent))


class ScaleRows(_PlanesFunction):
    """h (2, ..., F), r (2, ..., 1), gain (F) -> y = h r g, y' = (h' r + h r') g.

    With B = b g and B' = b' g: h_bar = B r + B' r', h'_bar = B' r, r_bar = sum (B h + B' h'),
    r'_bar = sum B' h, and g_bar = sum (b h r + b' (h' r + h r')) over rows. With h and gain in bfloat16 and
    r in float32 all is made in float32, and rounded at the end.
    """

    @staticmethod
    def forward(ctx: Any, planes: Tensor, rows: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(planes, rows, gain)
        return _scaled(planes, rows).mul_(gain).to(planes.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        saved, rows, gain = ctx.saved_tensors
        planes, bars = _wide(saved), _wide(grads[0]) * gain
        by_value, by_tangent = (bars * rows[0]).unbind(0)
        by_planes = torch.stack((torch.addcmul(by_value, bars[1], rows[1]), by_tangent))
        by_rows = torch.stack(((bars * planes).sum((0, -1)), (bars[1] * planes[0]).sum(-1))).unsqueeze(-1)
        by_gain = (grads[0] * _scaled(planes, rows)).flatten(0, -2).sum(0)
        return by_planes.to(saved.dtype), by_rows, by_gain.to(gain.dtype)


def _scaled(planes: Tensor, rows: Tensor) -> Tensor:
    planes = _wide(planes)
    out = planes * rows[0]
    out[1].addcmul_(planes[0], rows[1])
    return out


def _wide(planes: Tensor) -> Tensor:
    return planes.to(accumulator_type(planes.dtype))


class Distance(_PlanesFunction):
    """r (2, ..., 3), epsilon -> d = sqrt(|r|^2 + epsilon^2), d' = r . r'/d, (2, ...).

    r_bar = ((b - b' d'/d) r + b' r')/d, r'_bar = b' r/d.
    """

    @staticmethod
    def forward(ctx: Any, planes: Tensor, epsilon: float) -> Tensor:
        square, half = (planes * planes[0]).sum(-1).unbind(0)
        distance = (square + epsilon**2).sqrt_()
        out = torch.stack((distance, half / distance))
        ctx.save_for_backward(planes, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        planes, out = ctx.saved_tensors
        value, tangent = planes.unbind(0)
        over = grads[0] / out[0]
        along = (over[0] - over[1] * (out[1] / out[0])).unsqueeze(-1)
        bar = over[1].unsqueeze(-1)
        return torch.stack((torch.addcmul(along * value, bar, tangent), bar * value)), None
