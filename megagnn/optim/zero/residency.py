"""Stage 3: a unit's parameters are whole while its module is at work, and gone otherwise.

The events of a pass, in its order; each launches and awaits the same messages on every rank:

    before forward of k      parameters of k awaited, those of k+1 launched
    after forward of k       those of k freed
    before backward of k     those of k awaited, of k-1 launched
    after backward of k      those of k freed, gradients of k sent

The backward events are identity Functions of the module's outputs and inputs. The backward of the output's
runs when the last of its cotangents is there, that of the input's when the module's backward is over:
autograd takes nodes that are ready in the reverse order of their making. A module that is computed again
(`ops.recompute`) runs its forward between its two backward events, and then nothing is freed.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megagnn.ops.dual import Dual
from megagnn.optim.zero.unit import Unit


class Residency:
    """See the module.

    Args:
        units: in the order in which their modules run.
        after_backward: told of a unit when the backward is through with it, where it makes gradients.
    """

    def __init__(
        self, modules: Sequence[nn.Module], units: Sequence[Unit], after_backward: Callable[[Unit], None]
    ) -> None:
        self.modules, self.units, self._after = list(modules), list(units), after_backward
        self._in_backward = [False] * len(self.units)
        self._returns = [False] * len(self.units)
        """Whether the backward goes through the module to its inputs; into an embedding it does not, whose
        parameters the backward does not need."""
        for index, module in enumerate(modules):
            module.register_forward_pre_hook(self._before_forward(index))
            module.register_forward_hook(self._after_forward(index))

    def looker(self, modules: Iterable[nn.Module]) -> Callable[[int], None]:
        """For one who reads a module's parameters ahead of its turn: makes those of the k-th of these whole.

        They must be next in turn, which frees them again.
        """
        numbers = [self.modules.index(module) for module in modules]
        return lambda k: self.units[numbers[k]].gather()

    def _before_forward(self, index: int) -> Callable[..., Any]:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            self._enter(index, +1)
            if self._in_backward[index]:
                return None
            wanting = any(t.requires_grad for value in arguments for t in _tensors(value))
            self._returns[index] = wanting and torch.is_grad_enabled()
            return _watch(arguments, lambda: self._backward_over(index)) if self._returns[index] else None

        return hook

    def _after_forward(self, index: int) -> Callable[..., Any]:
        def hook(_: nn.Module, arguments: Any, outputs: Any) -> Any:
            if self._in_backward[index]:
                return None
            self.units[index].free()
            if not self._returns[index]:
                return None
            as_tuple = outputs if isinstance(outputs, tuple) else (outputs,)
            watched = _watch(as_tuple, lambda: self._backward_begins(index))
            return watched if isinstance(outputs, tuple) else watched[0]

        return hook

    def _backward_begins(self, index: int) -> None:
        self._in_backward[index] = True
        self._enter(index, -1)

    def _backward_over(self, index: int) -> None:
        self._in_backward[index] = False
        unit = self.units[index]
        unit.free()
        if any(member.parameter.requires_grad for member in unit.members):
            self._after(unit)

    def _enter(self, index: int, direction: int) -> None:
        self.units[index].gather()
        ahead = index + direction
        again = direction > 0 and self._in_backward[index]
        if 0 <= ahead < len(self.units) and not again and (direction > 0 or self._returns[ahead]):
            self.units[ahead].start_gather()


class _Event(torch.autograd.Function):
    """Identity; tells when the cotangents of all its tensors are there."""

    @staticmethod
    def forward(ctx: Any, tell: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.tell = tell
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *bars: Tensor | None) -> tuple[Any, ...]:
        ctx.tell()
        return None, *bars


def _watch(values: tuple[Any, ...], tell: Callable[[], None]) -> tuple[Any, ...]:
    """The values with an event behind the tensors in them that require a gradient."""
    flat = [t for value in values for t in _tensors(value) if t.requires_grad]
    watched = dict(zip(map(id, flat), _Event.apply(tell, *flat), strict=True))
    return tuple(_rebuilt(value, watched) for value in values)


def _tensors(value: Any) -> list[Tensor]:
    """Those of a tensor, of a Dual number, of a state or another dict, and of a dataclass' own fields."""
    if isinstance(value, Dual):
        return [value._planes] if value._planes is not None else [value.value, value.tangent]
    if isinstance(value, Tensor):
        return [value]
    return [t for item in _items(value).values() if not _items(item) for t in _tensors(item)]


def _rebuilt(value: Any, watched: dict[int, Tensor]) -> Any:
    if isinstance(value, Dual):
        if value._planes is not None:
            return Dual.of_planes(watched.get(id(value._planes), value._planes))
        return Dual(watched.get(id(value.value), value.value), watched.get(id(value.tangent), value.tangent))
    if isinstance(value, Tensor):
        return watched.get(id(value), value)
    changed = {
        name: _rebuilt(item, watched)
        for name, item in _items(value).items()
        if any(id(t) in watched for t in _tensors(item) if not _items(item))
    }
    if not changed:
        return value
    return {**value, **changed} if isinstance(value, dict) else dataclasses.replace(value, **changed)


def _items(value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value if isinstance(value, dict) else {}
