"""Any function of tensors, made to accept `ops.dual.Dual` numbers as well.

A loss on forces runs a model on pairs of value and tangent (docs/forces.md). The functions of ops/dual.py
have their derivative in closed form. One that has not is lifted: its tangent J x' comes from two reverse
passes, the second through the first, which autograd has for all that it can differentiate twice. That takes
about three times the memory and time of the function.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megagnn.ops.dual import Dual


def lift(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which of `Dual` arguments returns `Dual` results.

    function: of tensors and anything else, by position; returns a tensor, or a tuple of tensors and None. It
        must be twice differentiable by autograd, and may use parameters: what is computed from the result
        has their gradients, too. Keyword arguments are constants.
    Arguments that are not Dual have no tangent. Without a Dual argument the function is called as it is.
    """

    @functools.wraps(function)
    def lifted(*arguments: Any, **constants: Any) -> Any:
        if not any(isinstance(x, Dual) for x in arguments):
            return function(*arguments, **constants)
        values = [x.value if isinstance(x, Dual) else x for x in arguments]
        tangents = [x.tangent if isinstance(x, Dual) else None for x in arguments]
        results, along = value_and_tangent(lambda *x: function(*x, **constants), values, tangents)
        if isinstance(results, Tensor):
            return Dual(results, along[0])
        return tuple(None if y is None else Dual(y, t) for y, t in zip(results, along, strict=True))

    return lifted


def value_and_tangent(
    function: Callable[..., Any], values: Sequence[Any], tangents: Sequence[Tensor | None]
) -> tuple[Any, list[Any]]:
    """The function's results, and a list of their tangents, None for None.

    By the double-backward trick: the gradient g(u) = J^T u of <u, y> in x is linear in the dummy u, so the
    gradient of <g, x'> in u is J x'. tangents: None for what has none.
    """
    options: dict[str, Any] = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
    with torch.enable_grad():
        # A node for each argument: of two that depend on one another, each counts its own path only.
        inputs = [x if t is None else _node(x) for x, t in zip(values, tangents, strict=True)]
        results = function(*inputs)
        outputs = [results] if isinstance(results, Tensor) else list(results)
        present = [y for y in outputs if y is not None and y.requires_grad]
        dummies = [torch.zeros_like(y, requires_grad=True) for y in present]
        moving = [(x, t) for x, t in zip(inputs, tangents, strict=True) if t is not None]
        gradients = torch.autograd.grad(present, [x for x, _ in moving], dummies, **options)
        inner = torch.stack([(g * t).sum() for g, (_, t) in zip(gradients, moving, strict=True)]).sum()
        along = iter(torch.autograd.grad(inner, dummies, **options) if inner.requires_grad else dummies)
        found = [
            None if y is None else next(along) if y.requires_grad else torch.zeros_like(y) for y in outputs
        ]
    if torch.is_grad_enabled() and _needs_gradients(function, values, tangents):
        return results, found
    return _detached(results), _detached(found)


def _needs_gradients(
    function: Callable[..., Any], values: Sequence[Any], tangents: Sequence[Tensor | None]
) -> bool:
    """Whether an argument requires gradients, or a parameter that the function reads. Where none does, only
    the nodes of the derivation do, for which a backward would go through all that is made of the results."""
    if any(isinstance(x, Tensor) and x.requires_grad for x in (*values, *tangents)):
        return True
    results = function(*values)
    return any(
        isinstance(y, Tensor) and y.requires_grad
        for y in ([results] if isinstance(results, Tensor) else results)
    )


def _node(value: Tensor) -> Tensor:
    return value.view_as(value) if value.requires_grad else value.detach().requires_grad_()


def _detached(x: Any) -> Any:
    if isinstance(x, Tensor) or x is None:
        return x if x is None else x.detach()
    return [_detached(y) for y in x]
