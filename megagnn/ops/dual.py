"""Dual numbers of ordinary tensors: a value and its tangent, carried through a model together.

A loss on forces needs the gradient of a directional derivative (docs/forces.md). The model's
code runs on tensors or on `Dual` ones alike; on Dual ones each linear map is one product of twice the rows,
each non-linear one an explicit formula of PyTorch operations or a Function, so that an ordinary backward
follows. PyTorch's own dual numbers (torch.autograd.forward_ad) would compute the values again for each
tangent, and have no reverse rule for some of what a backward inside their level needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from megagnn.ops import dual_functions, geometry, segment
from megagnn.ops.activation import silu as silu_of_tensor
from megagnn.ops.activation import silu_second_derivative
from megagnn.ops.dispatch import accumulator_type
from megagnn.ops.segment import Segments


class Dual:
    """A value and its tangent, both of shape (...); of `planes` (2, ...) where they lie in one tensor."""

    __slots__ = ("_parts", "_planes")

    def __init__(self, value: Tensor, tangent: Tensor) -> None:
        if value.shape != tangent.shape:
            raise ValueError(
                f"Dual: value and tangent must have one shape, got {tuple(value.shape)} and "
                f"{tuple(tangent.shape)}"
            )
        self._parts: tuple[Tensor, Tensor] | None = (value, tangent)
        self._planes: Tensor | None = None

    @classmethod
    def of_planes(cls, planes: Tensor) -> Dual:
        """Value and tangent stacked, (2, ...)."""
        made = cls.__new__(cls)
        made._parts, made._planes = None, planes  # most are never taken apart
        return made

    @property
    def _both(self) -> tuple[Tensor, Tensor]:
        if self._parts is None:
            assert self._planes is not None
            value, tangent = self._planes.unbind(0)
            self._parts = (value, tangent)
        return self._parts

    @property
    def value(self) -> Tensor:
        return self._both[0]

    @property
    def tangent(self) -> Tensor:
        return self._both[1]

    @property
    def planes(self) -> Tensor:
        """Both in one tensor (2, ...)."""
        if self._planes is None:
            self._planes = torch.stack((self.value, self.tangent))
        return self._planes

    def linear_map(self, function: Callable[[Tensor], Tensor]) -> Dual:
        """A linear function of the value, applied to both; it must accept a leading dimension more."""
        if self._planes is not None:
            return Dual.of_planes(function(self._planes))
        return Dual(function(self.value), function(self.tangent))

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> Any:
        """Raises ValueError with the way out, where a function of PyTorch is given a Dual."""
        name = getattr(function, "__name__", function)
        raise ValueError(  # a TypeError would be taken for an operator that is not there
            f"PyTorch's {name} takes no Dual numbers; use a function of megagnn.ops.dual, or "
            "megagnn.ops.lift.lift on one of tensors, as lift(torch.exp), or lift(torch.reciprocal) to divide"
        )

    def __add__(self, other: Dual | Tensor | float) -> Dual:
        if isinstance(other, Dual):
            if self._planes is not None and other._planes is not None:
                return Dual.of_planes(self._planes + other._planes)
            return Dual(self.value + other.value, self.tangent + other.tangent)
        return Dual(self.value + other, self.tangent)

    def __sub__(self, other: Dual) -> Dual:
        return Dual(self.value - other.value, self.tangent - other.tangent)

    def __neg__(self) -> Dual:
        return self.linear_map(torch.neg)

    def __mul__(self, other: Dual | Tensor | float) -> Dual:
        if not isinstance(other, Dual):
            return self.linear_map(lambda t: t * other)
        tangent = self.tangent * other.value + self.value * other.tangent
        return Dual(self.value * other.value, tangent)

    def __truediv__(self, constant: Tensor | float) -> Dual:
        return self.linear_map(lambda t: t / constant)

    def unsqueeze(self, dim: int) -> Dual:
        """`dim` must be negative, so that it means the same with planes."""
        return self.linear_map(lambda t: t.unsqueeze(dim))

    def squeeze(self, dim: int) -> Dual:
        """`dim` must be negative."""
        return self.linear_map(lambda t: t.squeeze(dim))

    def sum(self, dim: int, keepdim: bool = False) -> Dual:
        """`dim` must be negative."""
        return self.linear_map(lambda t: t.sum(dim, keepdim))

    def double(self) -> Dual:
        return self.linear_map(Tensor.double)

    def to(self, dtype: torch.dtype) -> Dual:
        return self if self.dtype == dtype else self.linear_map(lambda t: t.to(dtype))

    @property
    def dtype(self) -> torch.dtype:
        return (self.value if self._planes is None else self._planes).dtype

    @property
    def mT(self) -> Dual:  # noqa: N802 (a tensor's own name)
        """The last two dimensions exchanged."""
        return self.linear_map(lambda t: t.mT)

    def chunk(self, chunks: int, dim: int) -> list[Dual]:
        """Parts along `dim`, which must be negative."""
        return [
            Dual(v, t)
            for v, t in zip(self.value.chunk(chunks, dim), self.tangent.chunk(chunks, dim), strict=True)
        ]

    def __getitem__(self, rows: slice | Tensor) -> Dual:
        return Dual(self.value[rows], self.tangent[rows])


T = TypeVar("T", Tensor, Dual)
Map = Callable[[Tensor], Tensor]


def linear_map(x: T, function: Map) -> T:
    """A linear function, of a Dual applied to value and tangent; it must accept a leading dimension more."""
    return x.linear_map(function) if isinstance(x, Dual) else function(x)


def matmul(a: T, b: T) -> T:
    """Products of matrices: (..., n, k) and (..., k, m) to (..., n, m)."""
    if isinstance(a, Dual) and isinstance(b, Dual):
        return Dual(a.value @ b.value, a.tangent @ b.value + a.value @ b.tangent)
    return a @ b


def linear(x: T, weight: Tensor, bias: Tensor | None = None) -> T:
    """x W^T + b, (..., in) to (..., out); of a Dual in one product of twice the rows."""
    if isinstance(x, Dual):
        planes: Tensor = _PlanesLinear.apply(x.planes, weight, bias)
        return Dual.of_planes(planes)
    return functional.linear(x, weight, bias)


def add_bias(x: T, bias: Tensor | None) -> T:
    """x + b, (..., F); a constant has no tangent."""
    return x if bias is None else x + bias


def add(x: T | None, y: T, scale: float) -> T:
    """x + scale y, or scale y without an x."""
    if x is None:
        return y * scale
    if isinstance(x, Dual) and isinstance(y, Dual):
        return Dual.of_planes(torch.add(x.planes, y.planes, alpha=scale))
    return torch.add(x, y, alpha=scale)


def concatenated(parts: Sequence[T]) -> T:
    """One after the other along the last dimension; one or more."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Dual):
        return Dual.of_planes(torch.cat([x.planes for x in parts], -1))
    return torch.cat(parts, -1)  # type: ignore[arg-type]


def split(x: T, sizes: Sequence[int]) -> list[T]:
    """Parts of these sizes of the last dimension."""
    if isinstance(x, Dual):
        return [Dual.of_planes(part) for part in x.planes.split(sizes, -1)]
    return list(x.split(sizes, -1))


def silu(x: T) -> T:
    """x s(x) with s the logistic function."""
    if isinstance(x, Dual):
        planes: Tensor = _PlanesSiLU.apply(x.planes)
        return Dual.of_planes(planes)
    return silu_of_tensor(x)


def sigmoid(x: T) -> T:
    """The logistic function."""
    if isinstance(x, Dual):
        value = torch.sigmoid(x.value)
        return Dual(value, value * (1 - value) * x.tangent)
    return torch.sigmoid(x)


def relu(x: T) -> T:
    """max(x, 0); the tangent passes where x > 0."""
    if isinstance(x, Dual):
        return Dual(functional.relu(x.value), x.tangent * (x.value > 0))
    return functional.relu(x)


def rsqrt(x: T) -> T:
    """1 / sqrt(x)."""
    if isinstance(x, Dual):
        return Dual.of_planes(dual_functions.InverseRoot.call(x.planes))
    return torch.rsqrt(x)


def square_sum(x: T) -> T:
    """Sum of x^2 over the last dimension, (..., F) to (..., 1); of bfloat16 made and given in float32."""
    if isinstance(x, Dual):
        return Dual.of_planes(dual_functions.SquareSum.call(x.planes))
    wide = x.to(accumulator_type(x.dtype))
    return (wide * wide).sum(-1, keepdim=True)


def scale_rows(x: T, rows: T, gain: Tensor) -> T:
    """x of (..., F) times rows (..., 1) and gain (F), in the type of x; rows may be wider."""
    if isinstance(x, Dual):
        return Dual.of_planes(dual_functions.ScaleRows.call(x.planes, rows.planes, gain))
    return (x * rows * gain).to(x.dtype)


def distance(r: T, epsilon: float) -> T:
    """sqrt(|r|^2 + epsilon^2), (..., 3) to (...)."""
    if isinstance(r, Dual):
        return Dual.of_planes(dual_functions.Distance.call(r.planes, epsilon))
    return torch.sqrt((r * r).sum(-1) + epsilon**2)


def edge_difference(to: T, sender: T, shift: Any, destination: Segments, source: Segments) -> T:
    """`ops.geometry.edge_difference`; the shift is a Dual where the positions are."""
    if isinstance(to, Dual) and isinstance(sender, Dual):
        ends = (destination, source)
        value = geometry.edge_difference(to.value, sender.value, shift.value, *ends)
        return Dual(value, geometry.edge_difference(to.tangent, sender.tangent, shift.tangent, *ends))
    return geometry.edge_difference(to, sender, shift, destination, source)


def lattice_shift(cell: T, shifts: Tensor, structure: Tensor) -> T:
    """`ops.geometry.lattice_shift`."""
    if isinstance(cell, Dual):
        value = geometry.lattice_shift(cell.value, shifts, structure)
        return Dual(value, geometry.lattice_shift(cell.tangent, shifts, structure))
    return geometry.lattice_shift(cell, shifts, structure)


def gather(x: T, segments: Segments) -> T:
    """`ops.segment.gather`."""
    if isinstance(x, Dual):
        return Dual(segment.gather(x.value, segments), segment.gather(x.tangent, segments))
    return segment.gather(x, segments)


def segment_sum(x: T, segments: Segments) -> T:
    """`ops.segment.segment_sum`."""
    if isinstance(x, Dual):
        return Dual(segment.segment_sum(x.value, segments), segment.segment_sum(x.tangent, segments))
    return segment.segment_sum(x, segments)


class _PlanesLinear(torch.autograd.Function):
    """planes (2, ..., in), weight, bias -> planes (2, ..., out); the bias is added to the values only."""

    @staticmethod
    def forward(ctx: Any, planes: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(planes, weight)
        ctx.has_bias = bias is not None
        out = functional.linear(planes, weight)
        if bias is not None:
            out[0] += bias
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        planes, weight = ctx.saved_tensors
        by_planes = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_planes = grad @ weight
        if ctx.needs_input_grad[1]:
            by_weight = grad.flatten(0, -2).t() @ planes.flatten(0, -2)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            by_bias = grad[0].flatten(0, -2).sum(0)
        return by_planes, by_weight, by_bias


class _PlanesSiLU(torch.autograd.Function):
    """y = x s(x), y' = silu'(x) x'; with bars of both, x_bar = silu' y_bar + silu'' x' y'_bar."""

    @staticmethod
    def forward(ctx: Any, planes: Tensor) -> Tensor:
        ctx.save_for_backward(planes)
        value, tangent = planes.detach().unbind(0)
        return torch.stack((functional.silu(value), torch.ops.aten.silu_backward(tangent, value)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (planes,) = ctx.saved_tensors
        value, tangent = planes.unbind(0)
        bar, tangent_bar = grads[0].unbind(0)
        first = torch.ops.aten.silu_backward(bar, value)
        second = (silu_second_derivative(value) * tangent * tangent_bar).to(value.dtype)
        return torch.stack((first + second, torch.ops.aten.silu_backward(tangent_bar, value)))
