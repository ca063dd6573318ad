"""Arithmetic of value and tangent against torch.autograd.functional.jvp, and the gradients of both planes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jvp

from megagnn.ops import Segments, dual
from megagnn.ops.dual import Dual
from tests.tolerances import assert_close

SEGMENTS = Segments(torch.tensor([0, 0, 2, 3]), torch.tensor([0, 2, 2, 3, 4]))
CONSTANT = torch.tensor([0.5, -2.0, 3.0])


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


W, B = random(5, 3, seed=11), random(5, seed=12)

# Functions of x and y (4, 3), of tensors or Duals alike.
FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "x + y": lambda x, y: x + y,
    "x + 2": lambda x, y: x + 2.0,
    "x + c": lambda x, y: x + CONSTANT,
    "x - y": lambda x, y: x - y,
    "-x": lambda x, y: -x,
    "x * y": lambda x, y: x * y,
    "x * 3": lambda x, y: x * 3.0,
    "x * c": lambda x, y: x * CONSTANT,
    "x / 4": lambda x, y: x / 4.0,
    "x / c": lambda x, y: x / CONSTANT,
    "x * sum y": lambda x, y: x * y.sum(-1, keepdim=True),
    "unsqueeze": lambda x, y: (x * y).sum(-1).unsqueeze(-1) * x,
    "squeeze": lambda x, y: (x * y).sum(-1, keepdim=True).squeeze(-1),
    "double": lambda x, y: (x * y).double(),
    "rows": lambda x, y: x[1:3] * y[torch.tensor([3, 0])],
    "linear": lambda x, y: dual.linear(x * y, W, B),
    "linear without bias": lambda x, y: dual.linear(x, W),
    "add_bias": lambda x, y: dual.add_bias(dual.linear(x, W), B),
    "add no bias": lambda x, y: dual.add_bias(x, None),
    "silu": lambda x, y: dual.silu(x * y),
    "silu of planes": lambda x, y: dual.silu(dual.linear(x, W)),
    "relu": lambda x, y: dual.relu(x) * y,
    "sigmoid": lambda x, y: dual.sigmoid(x * y) * y,
    "matmul": lambda x, y: dual.matmul(x.unsqueeze(-1), (x * y).unsqueeze(-2)),
    "mT": lambda x, y: dual.matmul((x * y).unsqueeze(-2).mT, y.unsqueeze(-2)),
    "linear_map": lambda x, y: dual.linear_map(x * y, lambda t: t.unflatten(-1, (1, 3))),
    "chunk": lambda x, y: (x * y).chunk(3, -1)[1] * y,
    "rsqrt": lambda x, y: dual.rsqrt(x * x + 0.1) * y,
    "segment_sum": lambda x, y: dual.segment_sum(x * y, SEGMENTS) * x,
    "sum of planes": lambda x, y: dual.silu(dual.linear(x, W)) + dual.silu(dual.linear(y, W)),
}


@pytest.fixture
def planes() -> tuple[Tensor, Tensor]:
    """x and y, each (2, 4, 3): value and tangent."""
    return random(2, 4, 3, seed=1), random(2, 4, 3, seed=2)


@pytest.mark.parametrize("stacked", [False, True], ids=["two tensors", "planes"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_and_tangent(planes: tuple[Tensor, Tensor], name: str, stacked: bool) -> None:
    function = FUNCTIONS[name]
    x, y = (Dual.of_planes(p) if stacked else Dual(p[0], p[1]) for p in planes)
    got = function(x, y)
    value, tangent = jvp(function, (planes[0][0], planes[1][0]), (planes[0][1], planes[1][1]))
    assert_close(got.value, value)
    assert_close(got.tangent, tangent)
    assert torch.equal(got.planes, torch.stack((got.value, got.tangent)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_through_both_planes(planes: tuple[Tensor, Tensor], name: str) -> None:
    """Of <u, value> + <v, tangent> with respect to values, tangents, weight and bias: as of PyTorch's jvp."""
    function = FUNCTIONS[name]
    leaves = [p.clone().requires_grad_() for p in planes]
    weights = [W.requires_grad_(), B.requires_grad_()]
    try:
        x, y = leaves
        got = function(Dual.of_planes(x), Dual.of_planes(y))
        value, tangent = jvp(function, (x[0], y[0]), (x[1], y[1]), create_graph=True)
        u, v = random(*value.shape, seed=5), random(*value.shape, seed=6)
        found, expected = (
            torch.autograd.grad(
                (u * a).sum() + (v * b).sum(), [*leaves, *weights], allow_unused=True, materialize_grads=True
            )
            for a, b in ((got.value, got.tangent), (value, tangent))
        )
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs, 1e-12)


def test_a_missing_bar_is_zero(planes: tuple[Tensor, Tensor]) -> None:
    """A loss on the values, or on the tangents, alone."""
    x = planes[0].clone().requires_grad_()
    by_value = torch.autograd.grad(dual.silu(Dual.of_planes(x)).value.sum(), x)[0]
    by_tangent = torch.autograd.grad(dual.silu(Dual.of_planes(x)).tangent.sum(), x)[0]
    assert torch.equal(by_value[1], torch.zeros(4, 3))
    assert by_tangent[0].abs().min() > 0
    assert_close(by_value[0], by_tangent[1])  # both are the slope


def test_the_tangent_of_relu_at_zero_is_zero() -> None:
    assert dual.relu(Dual(torch.zeros(2), torch.ones(2))).tangent.tolist() == [0, 0]


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(3,\)"):
        Dual(torch.zeros(2, 3), torch.zeros(3))


@pytest.mark.parametrize("function", [torch.exp, lambda x: x / x, lambda x: torch.ones(2) * x])
def test_what_knows_no_pairs_names_the_way_out(function: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"takes no Dual numbers; use a function of .* lift\(torch.exp\)"):
        function(Dual(torch.ones(2), torch.ones(2)))
