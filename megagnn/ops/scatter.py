"""Scatter and gather by unsorted indices. No layer uses them: they serve the benchmarks of scatter kernels.

Where Segments exist, `segment_sum` and `gather` are faster.
"""

from typing import Any

import torch
from torch import Tensor

from megagnn.ops import extension, reference
from megagnn.ops.dispatch import check_values, has_kernels, kernel, linear_function

_OPS = torch.ops.megagnn


def scatter_add(values: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """out[index[e]] += values[e]: values (E, ...) and index (E,) int64, in any order, to (num_rows, ...).

    values: float32, float64 or bfloat16 (summed in float32, rounded once). Rows without entries are zero.
    On a CPU the entries are first sorted by row, by counting; threads own rows and sum each in the order of
    its entries, so the bits are the same at any number of threads. On CUDA the additions are atomic, and the
    result is NOT reproducible bit by bit.
    Raises ValueError where types or sizes do not fit.
    """
    _check_index("scatter_add", index, values)
    check_values("scatter_add", values, index.size(0), "element of index")
    if num_rows < 0:
        raise ValueError(
            f"scatter_add ({extension.backend()}): num_rows must not be negative, got {num_rows}"
        )
    if not has_kernels(values):
        return reference.segment_sum(values, index, num_rows)
    if torch.compiler.is_compiling():
        return _OPS.scatter_add(values, index, num_rows)
    return _ScatterAdd.apply(values, index, num_rows)


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """values[index]: values (N, ...) and index (E,) int64, in any order, to (E, ...).

    Its backward is `scatter_add`: where Segments exist, `gather` is faster and deterministic on CUDA as well.
    Raises ValueError where types do not fit.
    """
    _check_index("gather_rows", index, values)
    check_values("gather_rows", values, values.shape[0] if values.dim() else 0, "row")
    if not has_kernels(values):
        return reference.gather(values, index)
    if torch.compiler.is_compiling():
        return _OPS.gather_rows(values, index)
    return _GatherRows.apply(values, index, values.size(0))


def _check_index(operation: str, index: Tensor, values: Tensor) -> None:
    where = f"{operation} ({extension.backend()})"
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ValueError(
            f"{where}: index must be a vector of int64, got {index.dtype} of shape {tuple(index.shape)}"
        )
    if index.device != values.device:
        raise ValueError(
            f"{where}: index must be on the device of values, {values.device}, got {index.device}"
        )


def _gathered(values: Tensor, index: Tensor, num_rows: int) -> Tensor:
    return kernel("gather_rows")(values, index)


_ScatterAdd: Any = linear_function("_ScatterAdd", kernel("scatter_add"), lambda: _GatherRows)
_GatherRows: Any = linear_function("_GatherRows", _gathered, lambda: _ScatterAdd)


def _keep_index(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.num_rows = inputs[0].shape[0]


def _scatter_add_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _OPS.gather_rows(grad, ctx.saved_tensors[0]), None, None


def _gather_rows_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _OPS.scatter_add(grad, ctx.saved_tensors[0], ctx.num_rows), None


def _scattered(values: Tensor, index: Tensor, num_rows: int) -> Tensor:
    return values.new_empty((num_rows, *values.shape[1:]))


def _rows(values: Tensor, index: Tensor) -> Tensor:
    return values.new_empty((index.shape[0], *values.shape[1:]))


if extension.module is not None:
    for _name, _fake, _backward in (
        ("scatter_add", _scattered, _scatter_add_backward),
        ("gather_rows", _rows, _gather_rows_backward),
    ):
        torch.library.register_fake(f"megagnn::{_name}", _fake)
        torch.library.register_autograd(f"megagnn::{_name}", _backward, setup_context=_keep_index)
