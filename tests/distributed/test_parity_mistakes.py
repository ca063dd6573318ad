"""The parity matrix can fail: each mistake it guards against is far outside its tolerance."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megagnn.parallel.context import ParallelContext
from tests.distributed import mistakes
from tests.distributed.parity import Cell, Outcome, measure, merged
from tests.distributed.spawn import spawn
from tests.tolerances import PARITY

CHANNEL = Cell((2, 1), "channel", "create_graph", "none", "fused", "stress")
EDGE = CHANNEL._replace(plan="edge")
UNFUSED_CHANNEL = CHANNEL._replace(operation="unfused")
UNFUSED_EDGE = EDGE._replace(operation="unfused")
ONE_BACKWARD = CHANNEL._replace(method="one_backward")

ALL = (CHANNEL, EDGE, UNFUSED_CHANNEL, UNFUSED_EDGE)
PLANTED: list[tuple[mistakes.Plant, Cell]] = [
    *((mistakes.nothing, cell) for cell in (*ALL, ONE_BACKWARD)),
    *((mistakes.first_order, cell) for cell in (*ALL, ONE_BACKWARD)),
    *((mistakes.copy_without_sum, cell) for cell in ALL),
    *((mistakes.vector_on_every_rank, cell) for cell in (CHANNEL, UNFUSED_CHANNEL, ONE_BACKWARD)),
    *((mistakes.norm_of_own_channels, cell) for cell in (CHANNEL, UNFUSED_EDGE)),
    *((mistakes.weights_without_sum, cell) for cell in (EDGE, EDGE._replace(method="one_backward"))),
]


def on_rank(context: ParallelContext) -> list[dict[str, float]]:
    found = []
    for plant, cell in PLANTED:
        with pytest.MonkeyPatch.context() as patch:
            plant(patch)
            found.append(measure(cell, context))
    return found


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[mistakes.Plant, Cell], Outcome]:
    found = merged([cell for _, cell in PLANTED], spawn(2, on_rank, tp=2))
    for (plant, _), outcome in zip(PLANTED, found, strict=True):
        print(
            f"{plant.__name__}: outputs {outcome.outputs:.1e}, gradients {outcome.gradients:.1e}, {outcome}"
        )
    return dict(zip(PLANTED, found, strict=True))


Outcomes = dict[tuple[mistakes.Plant, Cell], Outcome]


@pytest.mark.parametrize("cell", [*ALL, ONE_BACKWARD], ids=str)
def test_control(outcomes: Outcomes, cell: Cell) -> None:
    assert outcomes[mistakes.nothing, cell].passes


@pytest.mark.parametrize("cell", ALL, ids=str)
def test_first_order_collectives_fail_in_the_gradients_alone(outcomes: Outcomes, cell: Cell) -> None:
    """Energies, forces, stress and loss say nothing; a gradient is off by more than 10 % of its largest."""
    outcome = outcomes[mistakes.first_order, cell]
    assert outcome.outputs <= PARITY
    assert outcome.gradients > 0.1


def test_one_backward_is_a_first_order_program(outcomes: Outcomes) -> None:
    """Nothing in it differentiates a backward, so there the textbook form would do."""
    assert outcomes[mistakes.first_order, ONE_BACKWARD].passes


@pytest.mark.parametrize(
    ("plant", "cell"),
    [(plant, cell) for plant, cell in PLANTED if plant not in (mistakes.nothing, mistakes.first_order)],
    ids=lambda value: str(value) if isinstance(value, Cell) else value.__name__,
)
def test_mistake_fails(outcomes: Outcomes, plant: mistakes.Plant, cell: Cell) -> None:
    assert outcomes[plant, cell].gradients > 0.01  # of 1e-10


def test_weights_without_sum_show_in_the_gradients_alone(outcomes: Outcomes) -> None:
    assert outcomes[mistakes.weights_without_sum, EDGE].outputs <= PARITY


class _CallsTheCollectiveInside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dist.all_reduce(grads[0])
        return grads[0]


def unseen_on_rank(context: ParallelContext) -> None:
    x = torch.ones(3, requires_grad=True)
    y = _CallsTheCollectiveInside.apply(x) ** 2
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (gradient**2).sum().backward()


def test_a_collective_that_autograd_does_not_see_is_an_error() -> None:
    """PyTorch only warns; in the ranks of the test suite the warning is an error."""
    with pytest.raises(RuntimeError, match="autograd kernel was not registered"):
        spawn(2, unseen_on_rank)
