"""Update rules: what one step does to parameters, and the state that it keeps beside them.

An optimizer is an entry of `optim/rules/__init__.py`. Layouts, messages, offloading and checkpoints are the
same for all of them: `optim/zero/`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Shape = tuple[int, ...]
Settings = Mapping[str, Any]
"""Those of a parameter group: "lr", "weight_decay", "betas", "eps", ..."""
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class ElementRule:
    """An update of every number by itself, such as AdamW: ranks may cut parameters anywhere."""

    state: tuple[str, ...]
    """Names of the state; each has one number beside each of the parameter's, zero at first."""
    update: Callable[[Tensor, Tensor, State, Tensor | None, Settings, int, float], None]
    """(param, grad, state, master, settings, step, grad_scale): one step in place on runs of elements, (n,).

    The gradient counts times grad_scale, steps from 1. State and gradients are float32 beside bfloat16
    parameters, and there `master` has the weights in float32, to which param is set by rounding.
    """


ELEMENT_OPERATIONS = 30
"""Floating-point operations of products in whose time AdamW updates an element, about."""
BATCH_NUMEL = 2**20
"""Elements of matrices in one batched product: it bounds what an update needs beside its state."""


def batches(kinds: Sequence[tuple[Shape, Any]]) -> Iterator[tuple[tuple[Shape, Any], list[int]]]:
    """Indices of equal (shape, anything else): `BATCH_NUMEL` elements or one matrix at a time."""
    alike: dict[tuple[Shape, Any], list[int]] = {}
    for index, kind in enumerate(kinds):
        alike.setdefault(kind, []).append(index)
    for kind, indices in alike.items():
        size = max(1, BATCH_NUMEL // math.prod(kind[0]))
        for begin in range(0, len(indices), size):
            yield kind, indices[begin : begin + size]


@dataclass(frozen=True)
class MatrixRule:
    """An update that needs whole matrices, such as Muon: each is updated by one of the ranks."""

    state: Callable[[Shape], Mapping[str, Shape]]
    """{name: shape} of the state of a matrix of a shape, zero at first; the names are the same for all."""
    directions: Callable[[Sequence[Tensor], Sequence[State], Settings, int], list[Tensor]]
    """(gradients, states, settings, step): the direction D of each matrix, whose state is updated in place.

    The weights then become (1 - lr weight_decay) W - lr D. Gradients are the rule's to overwrite. All are
    float32, or float64 where the parameters are.
    """
    cost: Callable[[Shape], float] = math.prod
    """Work of one update, in units of an element's by an ElementRule: matrices are dealt to ranks by it."""


@dataclass(frozen=True)
class Rule:
    """An optimizer: a rule for all parameters, and another for those that are hidden matrices, if any."""

    elements: ElementRule
    matrices: MatrixRule | None = None
    """For parameters that have a `matrix_rate` (parallel/parameter.py)."""

    @property
    def state(self) -> tuple[str, ...]:
        """Names of all state, that of elements first."""
        of_matrices = () if self.matrices is None else self.matrices.state((1, 1))
        return tuple(dict.fromkeys((*self.elements.state, *of_matrices)))
