"""Which of kernels and reference an operation takes, what all check first, and linear ones in autograd."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megagnn.ops import extension

DTYPES = (torch.float32, torch.float64, torch.bfloat16)

below_autograd = torch._C._AutoDispatchBelowAutograd
"""Context in which an operation goes straight to its kernel."""


ABSENT = torch.empty(0, device="cpu")
"""How arguments of the compiled operations mark a tensor that is absent."""


def accumulator_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which a type is summed: float32 for bfloat16 and float16, else the type itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def check_values(operation: str, values: Tensor, rows: int, what: str) -> None:
    """Raises ValueError unless values, (rows, ...), is of a type the kernels know."""
    if values.dtype in DTYPES and values.dim() != 0 and values.size(0) == rows:
        return
    where = f"{operation} ({extension.backend()})"
    if values.dtype not in DTYPES:
        raise ValueError(f"{where}: values must be float32, float64 or bfloat16, got {values.dtype}")
    raise ValueError(f"{where}: values must have one row per {what}, {rows}, got shape {tuple(values.shape)}")


def has_kernels(values: Tensor) -> bool:
    """Whether there are kernels for the device of values; says so once where there are none."""
    if (extension.has_cpu and values.is_cpu) or (extension.has_cuda and values.is_cuda):
        return True
    if extension.module is not None and not torch.compiler.is_compiling():
        extension.warn_reference(values.device.type)
    return False


def kernel(name: str) -> Callable[..., Tensor]:
    """A compiled operation of this name, below autograd."""

    def run(*arguments: Any) -> Tensor:
        with below_autograd():
            out: Tensor = getattr(torch.ops.megagnn, name).default(*arguments)
            return out

    return run


def linear_function(name: str, run: Callable[..., Tensor], conjugate: Callable[[], Any]) -> Any:
    """A Function of (tensor, *where) that returns run(tensor, *where).

    Its backward applies the Function that `conjugate()` gives, which autograd sees again; the tangent of a
    linear map is the map.
    """

    def forward(ctx: Any, x: Tensor, *where: Any) -> Tensor:
        ctx.where = where
        return run(x, *where)

    def backward(ctx: Any, *grads: Tensor) -> Any:
        return conjugate().apply(grads[0], *ctx.where), *(None for _ in ctx.where)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        return made.apply(tangents[0], *ctx.where)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward), "jvp": staticmethod(jvp)}
    made: Any = type(name, (torch.autograd.Function,), methods)
    return made
