"""The cutoff envelope and the constants of the distance features, in numbers."""

import math

import pytest
import torch

from megagnn.models.radial import (
    CubicSplines,
    DistanceFeature,
    envelope,
    envelope_curvature,
    envelope_slope,
    spread,
)
from megagnn.ops.dual import Dual
from megagnn.parallel.parameter import Normal

# At half of a cutoff of 2 Å: 1 + s^6 (-28 + 48 s - 21 s^2), its slope -168/c s^5 (1 - s)^2 and its curvature
# -168/c^2 s^4 (1 - s)(5 - 7 s).
VALUE, SLOPE, CURVATURE = 0.85546875, -0.65625, -1.96875


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (envelope, [1.0, VALUE, 0.0, 0.0]),
        (envelope_slope, [0.0, SLOPE, 0.0, 0.0]),
        (envelope_curvature, [0.0, CURVATURE, 0.0, 0.0]),
    ],
)
def test_envelope_in_numbers(function: object, expected: list[float]) -> None:
    """At no distance, half the cutoff, the cutoff and beyond."""
    assert function(tensor(0, 1, 2, 3), 2.0).tolist() == expected  # type: ignore[operator]


def test_envelope_of_a_pair() -> None:
    """f' = f_c' d'. With bars 5 of f and 7 of f', d' = 3: d_bar = 5 f_c' + 7 f_c'' d', d'_bar = 7 f_c'."""
    planes = torch.stack((tensor(1), tensor(3))).requires_grad_()
    pair = envelope(Dual.of_planes(planes), 2.0)
    assert pair.value.tolist() == [VALUE]
    assert pair.tangent.tolist() == [3 * SLOPE]
    (5 * pair.value + 7 * pair.tangent).sum().backward()
    assert planes.grad is not None
    assert planes.grad.flatten().tolist() == [5 * SLOPE + 7 * 3 * CURVATURE, 7 * SLOPE]


def test_distance_features() -> None:
    bessel = DistanceFeature("bessel", 3, 2.0, torch.float64)
    assert bessel.centres_R is not None
    assert bessel.centres_R.tolist() == [math.pi / 2, math.pi, 3 * math.pi / 2]
    gaussian = DistanceFeature("gaussian", 3, 2.0, torch.float64)
    assert gaussian.centres_R is not None
    assert gaussian.centres_R.tolist() == [0, 1, 2]
    assert (bessel.num_features, gaussian.num_features, gaussian.spread) == (3, 3, 1)
    assert DistanceFeature("gaussian", 1, 2.0, torch.float64).spread == 2
    for kind in ("distance", "squared"):
        feature = DistanceFeature(kind, 3, 2.0, torch.float64)
        assert feature.centres_R is None
        assert feature.num_features == 1


def functions(splines: CubicSplines, weight_CK: torch.Tensor, distance_E: torch.Tensor) -> torch.Tensor:
    """What weights of all splines make of them, (C, E), without the size that all share."""
    values_E4, first_E = splines(distance_E)
    s_E = distance_E / splines.cutoff
    size_E = (splines.num_bessel / 2) ** 0.5 / torch.sqrt(s_E * s_E + 1 / 400)
    return weight_CK @ spread(values_E4, first_E, splines.num_splines).mT / size_E


def test_splines_in_numbers() -> None:
    """With knots 1 Å apart: 1/6, 4/6, 1/6 at a knot, 1/48, 23/48, 23/48, 1/48 in the middle."""
    splines, distance_E = CubicSplines(7, 2, 4.0), tensor(0, 1, 2.5, 4)
    assert splines(tensor(0, 1, 2.5, 4, 4.5))[1].tolist() == [0, 1, 2, 3, 3]
    every_KE = functions(splines, torch.eye(7, dtype=torch.float64), distance_E)
    expected = [
        [8, 32, 8, 0, 0, 0, 0],
        [0, 8, 32, 8, 0, 0, 0],
        [0, 0, 1, 23, 23, 1, 0],
        [0, 0, 0, 0, 8, 32, 8],
    ]
    torch.testing.assert_close(48 * every_KE.mT, torch.tensor(expected, dtype=torch.float64))


def test_splines_are_twice_differentiable_at_knots() -> None:
    """Values, slopes and curvatures are the same on both sides; the third derivative jumps."""
    splines, weight_CK = CubicSplines(9, 2, 6.0), torch.cos(3 * tensor(*range(9))).unsqueeze(0)
    sides = []
    for offset in (-1e-9, 1e-9):
        d_E = (tensor(1, 2, 3, 4, 5) + offset).requires_grad_()
        orders = [functions(splines, weight_CK, d_E).squeeze(0)]
        for _ in range(3):
            orders += torch.autograd.grad(orders[-1].sum(), d_E, create_graph=True)
        sides.append(torch.stack(orders).detach())
    difference = (sides[0] - sides[1]).abs().amax(-1) / sides[0].abs().amax(-1)
    assert difference[:3].max() < 1e-7
    assert difference[3] > 0.1


def test_splines_of_a_pair() -> None:
    """Tangents and the gradients of both planes are the derivatives that autograd has of the values."""
    splines, d_E, along_E = CubicSplines(9, 2, 6.0), tensor(0.4, 1.3, 3.1, 5.9), tensor(2, -1, 0.5, 3)
    planes = torch.stack((d_E, along_E)).requires_grad_()
    pair, first_E = splines(Dual.of_planes(planes))
    leaves = [x.clone().requires_grad_() for x in (d_E, along_E)]
    value_E4, plain_E = splines(leaves[0])
    assert torch.equal(first_E, plain_E)
    ones_E4 = torch.ones_like(value_E4).requires_grad_()
    (slope_E,) = torch.autograd.grad(value_E4, leaves[0], ones_E4, create_graph=True)
    (tangent_E4,) = torch.autograd.grad((slope_E * leaves[1]).sum(), ones_E4, create_graph=True)
    torch.testing.assert_close(pair.value, value_E4)
    torch.testing.assert_close(pair.tangent, tangent_E4)
    bars = torch.arange(32, dtype=torch.float64).view(2, 4, 4).cos()
    (found,) = torch.autograd.grad((torch.stack((pair.value, pair.tangent)) * bars).sum(), planes)
    wanted = torch.autograd.grad((torch.stack((value_E4, tangent_E4)) * bars).sum(), leaves)
    torch.testing.assert_close(found, torch.stack(wanted))


def test_splines_begin_as_bessel_functions() -> None:
    """Over many draws as large at each distance as combinations of Bessel functions, with weights as large as
    theirs, and smooth: independent weights differ from spline to spline by more than they are large."""
    bessel, splines = DistanceFeature("bessel", 4, 5.0, torch.float64), CubicSplines(43, 4, 5.0)
    weight_CK = torch.empty(2000, 43, dtype=torch.float64)
    splines.initial(Normal(0.5))(weight_CK, torch.Generator().manual_seed(0))
    d_E = torch.linspace(0.8, 4.8, 60, dtype=torch.float64)
    values_E4, first_E = splines(d_E)
    found_CE = weight_CK @ spread(values_E4, first_E, 43).mT
    expected_E = 0.5 * bessel(d_E).square().sum(-1).sqrt()
    torch.testing.assert_close(found_CE.square().mean(0).sqrt(), expected_E, rtol=0.1, atol=0)
    assert weight_CK.square().mean().sqrt().item() == pytest.approx(0.5, rel=0.1)
    assert weight_CK.diff(dim=-1).square().mean() < 0.05 * 2 * 0.5**2
