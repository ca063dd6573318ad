"""Weighted sum of gathered rows in one pass: the messages are never written to memory."""

from typing import Any

import torch
from torch import Tensor

from megagnn.ops import extension, reference
from megagnn.ops.dispatch import accumulator_type, below_autograd, check_values, has_kernels
from megagnn.ops.segment import Segments

_OPS = torch.ops.megagnn


def gather_weighted_sum(values: Tensor, weight: Tensor, destination: Segments, source: Segments) -> Tensor:
    """out[i] = sum over the entries e of row i of destination of weight[e] * values[source.index[e]].

    values: (M, ...), one row per row of source; float32, float64 or bfloat16 (summed in float32).
    weight: (E,), or (E, 1), in the type of values, or float32 for bfloat16 values.
    Returns (N, ...); rows without entries are zero. Equals
    segment_sum(gather(values, source) * weight, destination), without the (E, ...) in between.
    Its derivative by values is the same operation on the transposed segments, that by weight a dot product
    per entry; all can be differentiated any number of times, in reverse and forward mode. Deterministic.
    Raises ValueError where types or sizes do not fit.
    """
    check_values("gather_weighted_sum", values, source.ptr.size(0) - 1, "row of source")
    weight = _check_weight(values, weight, destination, source)
    if not has_kernels(values):
        return reference.gather_weighted_sum(
            values, weight, source.index, destination.index, destination.num_rows
        )
    rows = (destination.index, destination.ptr, destination.perm, source.index, source.ptr, source.perm)
    if torch.compiler.is_compiling():
        return _OPS.gather_weighted_sum(values, weight, *rows)
    return _WeightedSum.apply(values, weight, *rows)


def _check_weight(values: Tensor, weight: Tensor, destination: Segments, source: Segments) -> Tensor:
    """weight as a vector of the type that sums are made in."""
    where = f"gather_weighted_sum ({extension.backend()})"
    num_entries = destination.index.size(0)
    if source.index.size(0) != num_entries:
        raise ValueError(
            f"{where}: destination and source must have the same entries, got {num_entries} "
            f"and {source.index.size(0)}"
        )
    if weight.dim() == 2 and weight.size(1) == 1:
        weight = weight.squeeze(1)
    if weight.dim() != 1 or weight.size(0) != num_entries:
        raise ValueError(
            f"{where}: weight must have one element per entry, {num_entries}, got shape {tuple(weight.shape)}"
        )
    wide = accumulator_type(values.dtype)
    if weight.dtype not in (values.dtype, wide):
        allowed = " or ".join(dict.fromkeys((str(values.dtype), str(wide))))
        raise ValueError(f"{where}: weight must be {allowed}, got {weight.dtype}")
    return weight.to(wide)


# The last six arguments of both are the rows of the result (of left) and those of values (of right).
class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, *rows: Tensor | None) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.save_for_forward(values, weight)
        ctx.rows = rows
        with below_autograd():
            return _OPS.gather_weighted_sum.default(values, weight, *rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        by_values = by_weight = None
        if ctx.needs_input_grad[0]:
            by_values = _WeightedSum.apply(grads[0], weight, *ctx.rows[3:], *ctx.rows[:3])
        if ctx.needs_input_grad[1]:
            by_weight = _Dot.apply(grads[0], values, *ctx.rows)
        return by_values, by_weight, *(None,) * 6

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return _product_rule(_WeightedSum.apply, ctx, tangents)


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, *rows: Tensor | None) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.save_for_forward(left, right)
        ctx.rows = rows
        with below_autograd():
            return _OPS.gather_dot.default(left, right, *rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        by_left = by_right = None
        if ctx.needs_input_grad[0]:
            by_left = _WeightedSum.apply(right, grads[0], *ctx.rows)
        if ctx.needs_input_grad[1]:
            by_right = _WeightedSum.apply(left, grads[0], *ctx.rows[3:], *ctx.rows[:3])
        return by_left, by_right, *(None,) * 6

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return _product_rule(_Dot.apply, ctx, tangents)


def _product_rule(operation: Any, ctx: Any, tangents: tuple[Tensor | None, ...]) -> Tensor:
    """Both operations are linear in each of their first two arguments."""
    first, second = ctx.saved_tensors
    terms = []
    if tangents[0] is not None:
        terms.append(operation(tangents[0], second, *ctx.rows))
    if tangents[1] is not None:
        terms.append(operation(first, tangents[1], *ctx.rows))
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _weighted_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, weight, *rows = ctx.saved_tensors
    by_values = by_weight = None
    if ctx.needs_input_grad[0]:
        by_values = _OPS.gather_weighted_sum(grad, weight, *rows[3:], *rows[:3])
    if ctx.needs_input_grad[1]:
        by_weight = _OPS.gather_dot(grad, values, *rows)
    return by_values, by_weight, *(None,) * 6


def _dot_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    left, right, *rows = ctx.saved_tensors
    by_left = by_right = None
    if ctx.needs_input_grad[0]:
        by_left = _OPS.gather_weighted_sum(right, grad, *rows)
    if ctx.needs_input_grad[1]:
        by_right = _OPS.gather_weighted_sum(left, grad, *rows[3:], *rows[:3])
    return by_left, by_right, *(None,) * 6


def _summed(values: Tensor, weight: Tensor, *rows: Tensor | None) -> Tensor:
    assert rows[1] is not None
    return values.new_empty((rows[1].shape[0] - 1, *values.shape[1:]))


def _dotted(left: Tensor, right: Tensor, *rows: Tensor | None) -> Tensor:
    assert rows[0] is not None
    return left.new_empty((rows[0].shape[0],), dtype=accumulator_type(left.dtype))


if extension.module is not None:
    for _name, _fake, _backward in (
        ("gather_weighted_sum", _summed, _weighted_sum_backward),
        ("gather_dot", _dotted, _dot_backward),
    ):
        torch.library.register_fake(f"megagnn::{_name}", _fake)
        torch.library.register_autograd(f"megagnn::{_name}", _backward, setup_context=_keep_all)
