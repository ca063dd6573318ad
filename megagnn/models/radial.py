"""Functions of the interatomic distance: radial bases and the cutoff envelope."""

import math

import torch
from torch import Tensor, nn


def envelope(distance_E: Tensor, cutoff: float) -> Tensor:
    """Smooth cutoff f_c: 1 at zero distance, 0 with vanishing first and second derivative at the cutoff,
    shape (E,).

    Polynomial of Gasteiger, Gross, Günnemann, "Directional message passing", ICLR 2020, eq. 8, with p = 6.
    """
    s = distance_E / cutoff
    s3 = s * s * s
    s6 = s3 * s3
    return (1.0 + s6 * (-28.0 + s * (48.0 - 21.0 * s))) * (s < 1.0)


class BesselBasis(nn.Module):
    """sin(n pi s) / s with s = d/c, for n = 1..R, shape (E,) -> (E, R); Gasteiger et al. 2020, eq. 7, times
    c^(3/2)/sqrt(2).

    Without that factor the values are near 0.2, and at the start of training the network hardly sees the
    distance beside the
    node features (docs/model.md).
    """

    frequencies_R: Tensor

    def __init__(self, num_radial: int, cutoff: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_features = num_radial
        self.cutoff = cutoff
        frequencies = torch.arange(1, num_radial + 1, dtype=torch.float64) * (math.pi / cutoff)
        self.register_buffer("frequencies_R", frequencies.to(dtype), persistent=False)

    def forward(self, distance_E: Tensor, squared_E: Tensor) -> Tensor:
        d_E1 = distance_E.unsqueeze(-1)
        return torch.sin(d_E1 * self.frequencies_R) * (self.cutoff / d_E1)


class GaussianBasis(nn.Module):
    """exp(-(d - mu_n)^2 / (2 w^2)) with R centres from 0 to the cutoff, w their spacing, shape (E,) -> (E,
    R).

    Schütt et al., "SchNet", NeurIPS 2017, section 4.1.
    """

    centres_R: Tensor

    def __init__(self, num_radial: int, cutoff: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_features = num_radial
        self.width = cutoff / max(num_radial - 1, 1)
        self.register_buffer(
            "centres_R", torch.linspace(0, cutoff, num_radial, dtype=dtype), persistent=False
        )

    def forward(self, distance_E: Tensor, squared_E: Tensor) -> Tensor:
        offset_ER = (distance_E.unsqueeze(-1) - self.centres_R) / self.width
        return torch.exp(-0.5 * offset_ER * offset_ER)


class PlainDistance(nn.Module):
    """The distance itself, or its exact square |r|^2, as one feature, shape (E,) -> (E, 1)."""

    def __init__(self, squared: bool) -> None:
        super().__init__()
        self.num_features = 1
        self.squared = squared

    def forward(self, distance_E: Tensor, squared_E: Tensor) -> Tensor:
        return (squared_E if self.squared else distance_E).unsqueeze(-1)


DistanceFeature = BesselBasis | GaussianBasis | PlainDistance


def make_distance_feature(kind: str, num_radial: int, cutoff: float, dtype: torch.dtype) -> DistanceFeature:
    """`ModelConfig.distance_feature` as a module: (d (E,), |r|^2 (E,)) -> (E, num_features)."""
    if kind == "bessel":
        return BesselBasis(num_radial, cutoff, dtype)
    if kind == "gaussian":
        return GaussianBasis(num_radial, cutoff, dtype)
    return PlainDistance(squared=kind == "squared")
