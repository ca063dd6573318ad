"""Parameters that know themselves: the shape of the whole, which slice of it this rank holds, how it begins.

Initial weights are drawn for the whole parameter, from a random stream of its own name and the run's seed,
and then sliced, so that they are the same on every layout. The gradient norm, the number of parameters and
checkpoints read the layout, too; nothing guesses from names.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megagnn.parallel.context import ParallelContext

Initial = Callable[[Tensor, torch.Generator], None]
"""Fills a whole parameter."""


@dataclass(frozen=True)
class ParameterLayout:
    """Which slice of a whole parameter the ranks of a tensor-parallel group hold."""

    full_shape: tuple[int, ...]
    dim: int | None = None
    """Dimension that the ranks divide; None where each holds the whole."""
    num_slices: int = 1
    index: int = 0
    """This rank's slice."""

    @property
    def is_sharded(self) -> bool:
        """Whether tensor-parallel ranks hold different slices."""
        return self.dim is not None and self.num_slices > 1

    @property
    def full_numel(self) -> int:
        return math.prod(self.full_shape)

    def slice_of(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor of the full shape."""
        if not self.is_sharded:
            return whole
        assert self.dim is not None
        return whole.chunk(self.num_slices, self.dim)[self.index]


class Parameter(nn.Parameter):
    """An nn.Parameter with its layout, its initial law, its share of the learning rate and its kind."""

    sharding: ParameterLayout  # `layout` is a tensor's own word for strided or sparse
    initial: Initial
    rate: float
    matrix_rate: float | None

    def __new__(
        cls,
        data: Tensor,
        layout: ParameterLayout,
        initial: Initial,
        rate: float = 1.0,
        matrix_rate: float | None = None,
    ) -> "Parameter":
        """data: this rank's slice. rate: [Note: maximal update] in models/parts.py.

        matrix_rate: its share of the rate under an update rule of matrices (optim/rule.py), meant for what
        maps features to features.
        """
        parameter = super().__new__(cls, data)
        parameter.sharding, parameter.initial, parameter.rate = layout, initial, rate
        parameter.matrix_rate = matrix_rate
        return parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> "Parameter":
        if id(self) not in memo:
            copied = type(self)(self.data.clone(), self.sharding, self.initial, self.rate, self.matrix_rate)
            copied.requires_grad_(self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]


def make_parameter(
    full_shape: tuple[int, ...],
    dim: int | None,
    context: ParallelContext,
    initial: Initial,
    dtype: torch.dtype,
    name: str = "a parameter",
    rate: float = 1.0,
    matrix_rate: float | None = None,
) -> Parameter:
    """A parameter divided along `dim` over the tensor-parallel ranks; `initialise` fills it.

    Raises:
        ValueError: the ranks do not divide that dimension.
    """
    tp, shape = context.tp_size, list(full_shape)
    if dim is not None and tp > 1:
        check_divisible(name, full_shape[dim], tp)
        shape[dim] //= tp
    layout = ParameterLayout(
        full_shape, dim, tp if dim is not None else 1, context.tp_rank if dim is not None else 0
    )
    if not _deferred.get():
        return Parameter(torch.zeros(shape, dtype=dtype), layout, initial, rate, matrix_rate)
    data = torch.empty(shape, dtype=dtype, device=context.device)  # no page is touched
    data.untyped_storage().resize_(0)
    return Parameter(data, layout, initial, rate, matrix_rate)


def check_divisible(name: str, size: int, tp: int) -> None:
    """Raises ValueError, with the nearest sizes that would do."""
    if size % tp:
        below, above = size // tp * tp, -(-size // tp) * tp
        use = f"{below} or {above}" if below else str(above)
        raise ValueError(f"{name} {size} is not divisible by tensor_parallel {tp}; use {use}")


def layout_of(parameter: Tensor) -> ParameterLayout:
    """The layout of a parameter; one without is whole on every rank."""
    found = getattr(parameter, "sharding", None)
    return found if found is not None else ParameterLayout(tuple(parameter.shape))


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Fill every parameter of a module that has an initial law; the global random state is left alone."""
    for name, parameter in module.named_parameters():
        if isinstance(parameter, Parameter):
            parameter.copy_(initial_values(name, parameter, seed))


def initial_values(name: str, parameter: Parameter, seed: int) -> Tensor:
    """Initial values of this rank's slice of a parameter, float32."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    whole = torch.empty(parameter.sharding.full_shape, dtype=torch.float32)
    parameter.initial(whole, generator)
    return parameter.sharding.slice_of(whole)


_deferred: ContextVar[bool] = ContextVar("megagnn_deferred", default=False)


@contextmanager
def deferred_parameters() -> Iterator[None]:
    """Parameters that are made within the context take no memory: an optimizer that keeps a share of each
    fills them, one module after another (optim/zero/optimizer.py)."""
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)


def is_deferred(parameter: Tensor) -> bool:
    """Whether a parameter has no memory yet."""
    return parameter.numel() > 0 and parameter.untyped_storage().nbytes() == 0


@dataclass(frozen=True)
class Normal:
    """N(0, std^2)."""

    std: float

    def __call__(self, whole: Tensor, generator: torch.Generator) -> None:
        whole.normal_(0.0, self.std, generator=generator)


@dataclass(frozen=True)
class Uniform:
    """Even in (-bound, bound)."""

    bound: float

    def __call__(self, whole: Tensor, generator: torch.Generator) -> None:
        whole.uniform_(-self.bound, self.bound, generator=generator)


@dataclass(frozen=True)
class Constant:
    """The same everywhere."""

    value: float

    def __call__(self, whole: Tensor, generator: torch.Generator) -> None:
        whole.fill_(self.value)


def num_parameters(module: nn.Module) -> int:
    """Trainable numbers of the whole model, each counted once on any layout."""
    return sum(layout_of(p).full_numel for p in module.parameters() if p.requires_grad)
