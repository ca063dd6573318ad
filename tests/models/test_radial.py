"""The cutoff envelope and the constants of the distance features, in numbers."""

import math

import pytest
import torch

from megagnn.models.radial import DistanceFeature, envelope, envelope_curvature, envelope_slope
from megagnn.ops.dual import Dual

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
