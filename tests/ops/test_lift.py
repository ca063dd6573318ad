"""Lifted functions against torch.func.jvp and closed forms, and the gradients of both planes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from megagnn.ops.dual import Dual
from megagnn.ops.lift import lift
from tests.tolerances import assert_close


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


W = random(3, 3, seed=9).requires_grad_()

FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "product": lambda x, y: x * y,
    "elementwise": lambda x, y: torch.sin(x) / (y * y + 1),
    "layers": lambda x, y: torch.tanh(x @ W.t()) @ W + y,
    "norm": lambda x, y: torch.sqrt((x * x).sum(-1) + 0.1),
    "softmax": lambda x, y: torch.softmax(x @ y.t(), -1),
    "rows": lambda x, y: x.new_zeros(2, 3).index_add(0, torch.tensor([0, 1, 1, 0]), x * y),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # in torch.func.jvp
@pytest.mark.parametrize("name", FUNCTIONS)
def test_lifted_is_the_directional_derivative(name: str) -> None:
    """Values, tangents, and the gradient of a loss on both with respect to all four planes and the weight."""
    planes = [random(4, 3, seed=k).requires_grad_() for k in range(4)]

    def loss(value: Tensor, tangent: Tensor) -> Tensor:
        return torch.cos(value).sum() + (value * tangent).sum() + torch.sin(2 * tangent).sum()

    lifted = lift(FUNCTIONS[name])(Dual(planes[0], planes[2]), Dual(planes[1], planes[3]))
    value, tangent = jvp(FUNCTIONS[name], (planes[0], planes[1]), (planes[2], planes[3]))
    assert_close(lifted.value, value)
    assert_close(lifted.tangent, tangent)
    inputs, options = [*planes, W], {"allow_unused": True, "materialize_grads": True}
    got = torch.autograd.grad(loss(lifted.value, lifted.tangent), inputs, **options)  # type: ignore[arg-type]
    want = torch.autograd.grad(loss(value, tangent), inputs, **options)  # type: ignore[arg-type]
    for g, w in zip(got, want, strict=True):
        assert_close(g, w)


def test_second_derivative_in_closed_form() -> None:
    """y = x^3, y' = 3 x^2 x'; the gradient of y' is 6 x x' in x and 3 x^2 in x'."""
    x, along = random(5, seed=1).requires_grad_(), random(5, seed=2).requires_grad_()
    y = lift(lambda x: x**3)(Dual(x, along))
    assert_close(y.tangent, 3 * x**2 * along)
    by_x, by_along = torch.autograd.grad(y.tangent.sum(), [x, along])
    assert_close(by_x, 6 * x * along)
    assert_close(by_along, 3 * x**2)


def test_arguments_that_depend_on_one_another() -> None:
    """Each argument brings its own tangent: of (x, x^2) with x' = 1, the product has 3 x^2, and not more."""
    x = random(4, seed=1).requires_grad_()
    square = Dual(x, torch.ones_like(x)) * Dual(x, torch.ones_like(x))
    y = lift(lambda a, b: a * b)(Dual(x, torch.ones_like(x)), square)
    assert_close(y.tangent, 3 * x**2)


def test_constants_and_results_without_tangent() -> None:
    """Arguments that are not Dual, absent results, and results that depend on no Dual argument."""
    x, c, along = random(4, seed=1), random(4, seed=2), random(4, seed=3)

    @lift
    def function(a: Any, b: Any, power: int, *, scale: float) -> tuple[Any, ...]:
        return scale * a**power * b, None, 2 * b

    plain = function(x, c, 2, scale=3.0)
    assert isinstance(plain[0], Tensor)
    product, nothing, constant = function(Dual(x, along), c, 2, scale=3.0)
    assert nothing is None
    assert_close(product.value, plain[0])
    assert_close(product.tangent, 6 * x * along * c)
    assert torch.equal(constant.value, 2 * c)
    assert torch.equal(constant.tangent, torch.zeros_like(c))


def test_a_linear_and_a_constant_function() -> None:
    x, along = random(4, 3, seed=1), random(4, 3, seed=2)
    assert_close(lift(lambda a: a @ W.t())(Dual(x, along)).tangent, along @ W.t())
    flat = lift(lambda a: torch.ones_like(a) + 0 * a)(Dual(x, along))
    assert torch.equal(flat.tangent, torch.zeros_like(x))


def test_without_gradients_nothing_is_kept() -> None:
    with torch.no_grad():
        y = lift(lambda a: torch.sin(a))(Dual(random(3, seed=1), random(3, seed=2)))
    assert y.value.grad_fn is None
    assert y.tangent.grad_fn is None
    assert_close(y.tangent, torch.cos(random(3, seed=1)) * random(3, seed=2))


def test_constants_need_no_gradients() -> None:
    """A backward does not go to where nothing requires gradients; parameters of the function have theirs."""
    x, along = random(4, 3, seed=1), random(4, 3, seed=2)
    y = lift(torch.sin)(Dual(x, along))
    assert not y.value.requires_grad
    assert not y.tangent.requires_grad
    y = lift(lambda a: torch.sin(a @ W.t()))(Dual(x, along))
    (found,) = torch.autograd.grad(y.tangent.sum(), W)
    (wanted,) = torch.autograd.grad((torch.cos(x @ W.t()) * (along @ W.t())).sum(), W)
    assert_close(found, wanted)
