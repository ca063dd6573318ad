"""A linear map that autograd sees, whose backward is another one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
