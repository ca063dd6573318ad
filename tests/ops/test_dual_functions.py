"""Functions of value and tangent with closed backwards, against PyTorch's derivatives of the plain ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megagnn.models.radial import envelope
from megagnn.ops import dual
from megagnn.ops.dual import Dual
from tests.tolerances import assert_close

CUTOFF = 4.0


def draw(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def by_definition(function: Callable[..., Tensor], values: list[Tensor], tangents: list[Tensor]) -> Tensor:
    """Value and tangent (2, ...), the tangent as the derivative of <dummy, gradient> in the dummy."""
    value = function(*values)
    dummy = torch.zeros_like(value, requires_grad=True)
    gradients = torch.autograd.grad(value, values, dummy, create_graph=True)
    along = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    (tangent,) = torch.autograd.grad(along, dummy, create_graph=True)
    return torch.stack((value, tangent))


(GAIN,) = draw((5,))
CASES: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "square_sum": (dual.square_sum, draw((7, 5))),
    "rsqrt": (dual.rsqrt, [draw((7, 1))[0].square() + 0.3]),
    "scale_rows": (lambda h, r: dual.scale_rows(h, r, GAIN), draw((7, 5), (7, 1))),
    "distance": (lambda r: dual.distance(r, 1e-3), draw((9, 3))),
    "envelope": (lambda d: envelope(d, CUTOFF), [torch.linspace(0.1, 5.0, 9, dtype=torch.float64)]),
}


@pytest.mark.parametrize("name", CASES)
def test_value_tangent_and_gradients(name: str) -> None:
    """Exactly the derivatives of the plain function, beyond the cutoff zero."""
    function, values = CASES[name]
    values = [v.clone().requires_grad_() for v in values]
    tangents = [t.requires_grad_() for t in draw(*(tuple(v.shape) for v in values), seed=1)]
    want = by_definition(function, values, tangents)
    pairs = [Dual(v, t) for v, t in zip(values, tangents, strict=True)]
    got = function(*pairs).planes  # type: ignore[attr-defined]
    assert_close(got.detach(), want.detach())
    (bars,) = draw(tuple(want.shape), seed=2)
    wanted = torch.autograd.grad(want, [*values, *tangents], bars)
    found = torch.autograd.grad(got, [*values, *tangents], bars)
    for gradient, expected in zip(found, wanted, strict=True):
        assert_close(gradient, expected)
    swapped = torch.autograd.grad(function(*pairs).planes, values, bars.flip(0))  # type: ignore[attr-defined]
    assert all((g - w).abs().max() > 1e-3 * w.abs().max() for g, w in zip(swapped, wanted, strict=False))


def test_gradient_of_the_gain() -> None:
    """It acts on values and tangents alike."""
    h, r, h_tangent, r_tangent, bars = draw((7, 5), (7, 1), (7, 5), (7, 1), (2, 7, 5))
    gain = GAIN.clone().requires_grad_()
    scaled = dual.scale_rows(Dual(h, h_tangent), Dual(r, r_tangent), gain).planes
    (found,) = torch.autograd.grad(scaled, gain, bars)
    assert_close(found, (bars[0] * h * r + bars[1] * (h_tangent * r + h * r_tangent)).sum(0))


def test_distance_of_coincident_points_is_finite() -> None:
    """r = 0 has d = epsilon and a tangent of zero, and finite gradients."""
    r, tangent = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    got = dual.distance(Dual(r, tangent), 1e-3)
    assert got.value.tolist() == pytest.approx([1e-3, 1e-3])
    assert got.tangent.tolist() == [0.0, 0.0]
    gradients = torch.autograd.grad(got.planes.sum(), [r, tangent])
    assert all(g.isfinite().all() for g in gradients)
