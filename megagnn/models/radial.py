"""Functions of the interatomic distance: the features that messages see, and the cutoff envelope."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megagnn.ops import dual
from megagnn.ops.dual import Dual, T
from megagnn.ops.lift import lift
from megagnn.parallel.parameter import Initial


def envelope(distance_E: T, cutoff: float) -> T:
    """Smooth cutoff f_c: 1 at zero distance, 0 with vanishing first and second derivative at the cutoff,
    shape (E,).

    Polynomial of Gasteiger, Gross, Günnemann, "Directional message passing", ICLR 2020, eq. 8, with p = 6.
    """
    if isinstance(distance_E, Dual):
        planes: Tensor = _PlanesEnvelope.apply(distance_E.planes, cutoff)
        return Dual.of_planes(planes)
    s = distance_E / cutoff
    s3 = s * s * s
    s6 = s3 * s3
    return (1.0 + s6 * (-28.0 + s * (48.0 - 21.0 * s))) * (s < 1.0)


def envelope_slope(distance_E: Tensor, cutoff: float) -> Tensor:
    """The derivative of `envelope`, 1/Å, (E,): -168/c s^5 (1 - s)^2."""
    s = distance_E / cutoff
    s2, rest = s * s, 1.0 - s
    return s2 * s2 * s * (rest * rest) * (-168.0 / cutoff) * (s < 1.0)


def envelope_curvature(distance_E: Tensor, cutoff: float) -> Tensor:
    """The second derivative of `envelope`, 1/Å^2, (E,): -168/c^2 s^4 (1 - s) (5 - 7 s)."""
    s = distance_E / cutoff
    s2 = s * s
    return s2 * s2 * (1.0 - s) * (5.0 - 7.0 * s) * (-168.0 / cutoff**2) * (s < 1.0)


def cosine_cutoff(distance_E: T, cutoff: float) -> T:
    """(1 + cos(pi d/c)) / 2 within the cutoff c, else 0, (E,): Behler, J. Chem. Phys. 134, 074106 (2011),
    eq. 4. Its second derivative jumps at the cutoff."""
    cosine_E: T = lift(torch.cos)(distance_E * (math.pi / cutoff))
    within_E = (distance_E.value if isinstance(distance_E, Dual) else distance_E) < cutoff
    return (cosine_E + 1.0) * 0.5 * within_E


class _PlanesEnvelope(torch.autograd.Function):
    """f, f' = f_c'(d) d'; with bars of both, d_bar = f_c' f_bar + f_c'' d' f'_bar, d'_bar = f_c' f'_bar."""

    @staticmethod
    def forward(ctx: Any, planes: Tensor, cutoff: float) -> Tensor:
        ctx.save_for_backward(planes)
        ctx.cutoff = cutoff
        distance_E, tangent_E = planes.unbind(0)
        return torch.stack((envelope(distance_E, cutoff), envelope_slope(distance_E, cutoff) * tangent_E))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (planes,) = ctx.saved_tensors
        distance_E, tangent_E = planes.unbind(0)
        by_value, by_tangent = (grads[0] * envelope_slope(distance_E, ctx.cutoff)).unbind(0)
        second_E = envelope_curvature(distance_E, ctx.cutoff) * tangent_E
        return torch.stack((torch.addcmul(by_value, second_E, grads[0][1]), by_tangent)), None


class DistanceFeature(nn.Module):
    """Features of distances (E,), tensors or Dual numbers: `distance_features` with its constants.

    `bessel`: frequencies n pi / cutoff, n = 1..R. Its values are those of the published basis times
    cutoff^(3/2)/sqrt(2); without that factor they are near 0.2, and at the start of training the network
    hardly sees the distance beside the node features (docs/model.md). `gaussian`: R centres from 0 to the
    cutoff, as wide as their spacing. `distance` and `squared`: the distance itself, or |r|^2, as one feature.
    """

    centres_R: Tensor | None

    def __init__(self, kind: str, num_radial: int, cutoff: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.cutoff = kind, cutoff
        self.num_features = num_radial if kind in ("bessel", "gaussian") else 1
        self.spread = cutoff / max(num_radial - 1, 1)
        centres = None
        if kind == "bessel":
            centres = (torch.arange(1, num_radial + 1, dtype=torch.float64) * (math.pi / cutoff)).to(dtype)
        elif kind == "gaussian":
            centres = torch.linspace(0, cutoff, num_radial, dtype=dtype)
        self.register_buffer("centres_R", centres, persistent=False)

    def forward(self, d_E: T) -> T:
        features: T = lift(distance_features)(self.kind, d_E, None, self.centres_R, self.cutoff, self.spread)
        return features


def distance_features(
    kind: str, d_E: Tensor, squared_E: Tensor | None, centres_R: Tensor | None, cutoff: float, spread: float
) -> Tensor:
    """Features that messages see of the distance d = sqrt(|r|^2 + eps^2), Å: (E,) to (E, R).

    bessel: sin(k_n d) c/d, Gasteiger et al., ICLR 2020, eq. 7, times c^(3/2)/sqrt(2); gaussian: exp(-(d -
    mu_n)^2 / (2 w^2)), Schütt et al., NeurIPS 2017, section 4.1; distance: d; squared: |r|^2.
    """
    if kind == "distance":
        return d_E.unsqueeze(-1)
    if kind == "squared":
        assert squared_E is not None
        return squared_E.unsqueeze(-1)
    assert centres_R is not None
    d_E1 = d_E.unsqueeze(-1)
    if kind == "bessel":
        return torch.sin(d_E1 * centres_R) * (cutoff / d_E1)
    offset_ER = (d_E1 - centres_R) / spread
    return torch.exp(-0.5 * offset_ER * offset_ER)


@dataclass(frozen=True)
class CubicSplines:
    """K uniform cubic B-splines on [0, cutoff], of which four are not zero at any distance.

    With h = cutoff / (K - 3), spline k is centred at (k - 1) h, and those of the interval
    [f h, (f + 1) h] are f to f + 3 (de Boor, "A Practical Guide to Splines", 2001, chapter IX). They are
    multiplied by sqrt(R / 2) / sqrt((d / cutoff)^2 + 1/400), about the root mean square of R Bessel functions
    with weights of variance 1, so that weights of the same size give functions of the same size.
    """

    num_splines: int
    """K, at least 4."""
    num_bessel: int
    """R."""
    cutoff: float
    """Å."""

    def __call__(self, distance_E: T) -> tuple[T, Tensor]:
        """The four at distances (E,), tensors or Dual numbers, and the number of the first of them.

        Shapes (E, 4), twice differentiable, and (E,), int64, from 0 to K - 4.
        """
        intervals, s_E = self.num_splines - 3, distance_E / self.cutoff
        places_E = s_E * intervals
        value_E = places_E.value if isinstance(places_E, Dual) else places_E
        first_E = value_E.detach().long().clamp(max=intervals - 1)
        size_E = dual.rsqrt(s_E * s_E + 0.05**2) * (self.num_bessel / 2) ** 0.5
        pieces_E4: Any
        if isinstance(places_E, Dual):
            planes = _PlanesPieces.apply(places_E.planes, first_E)
            pieces_E4 = Dual.of_planes(planes)
        else:
            pieces_E4 = _cubic_pieces(places_E - first_E)
        return pieces_E4 * size_E.unsqueeze(-1), first_E

    def initial(self, law: Initial) -> Initial:
        """A law of weights (..., K): the functions that weights (..., R) of a law make of Bessel functions.

        They are equal but for the splines' error. Independent weights would change from spline to spline.
        """

        def fill(whole: Tensor, generator: torch.Generator) -> None:
            waves = whole.new_empty(*whole.shape[:-1], self.num_bessel)
            law(waves, generator)
            whole.copy_(waves @ self._sines().to(waves))

        return fill

    def _sines(self) -> Tensor:
        """Weights of the splines that are sqrt(2 / R) sin(n pi d / cutoff) at their centres, (R, K)."""
        n_R1 = torch.arange(1, self.num_bessel + 1, dtype=torch.float64).unsqueeze(-1)
        angle_R1 = n_R1 * (math.pi / (self.num_splines - 3))
        centres_K = torch.arange(-1, self.num_splines - 1, dtype=torch.float64)
        # splines with weights sin(k a) are (2 + cos a) / 3 sin(k a) at the centres
        amplitude_R1 = (2 / self.num_bessel) ** 0.5 * 3 / (2 + torch.cos(angle_R1))
        return amplitude_R1 * torch.sin(angle_R1 * centres_K)


def _cubic_pieces(u_E: Tensor) -> Tensor:
    """The four pieces of a uniform cubic B-spline, last to first, at u in [0, 1], (E, 4)."""
    rest_E, square_E = 1 - u_E, u_E * u_E
    cube_E = square_E * u_E
    inner = (3 * cube_E - 6 * square_E + 4, 3 * (u_E + square_E - cube_E) + 1)
    return torch.stack((rest_E * rest_E * rest_E, *inner, cube_E), -1) / 6


def _cubic_slopes(u_E: Tensor) -> Tensor:
    """The derivatives of `_cubic_pieces`, (E, 4)."""
    rest_E, square_E = 1 - u_E, u_E * u_E
    inner = (3 * square_E - 4 * u_E, 1 + 2 * u_E - 3 * square_E)
    return torch.stack((-rest_E * rest_E, *inner, square_E), -1) / 2


def _cubic_curvatures(u_E: Tensor) -> Tensor:
    """The second derivatives of `_cubic_pieces`, (E, 4)."""
    return torch.stack((1 - u_E, 3 * u_E - 2, 1 - 3 * u_E, u_E), -1)


class _PlanesPieces(torch.autograd.Function):
    """p, p' = p_u(u) u' with u = places - first; with bars of both, u_bar = p_u p_bar + p_uu u' p'_bar and
    u'_bar = p_u p'_bar, summed over the four."""

    @staticmethod
    def forward(ctx: Any, planes: Tensor, first_E: Tensor) -> Tensor:
        ctx.save_for_backward(planes, first_E)
        u_E, tangent_E = planes[0] - first_E, planes[1]
        return torch.stack((_cubic_pieces(u_E), _cubic_slopes(u_E) * tangent_E.unsqueeze(-1)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        planes, first_E = ctx.saved_tensors
        u_E, tangent_E = planes[0] - first_E, planes[1]
        by_value, by_tangent = (grads[0] * _cubic_slopes(u_E)).sum(-1).unbind(0)
        second_E = (grads[0][1] * _cubic_curvatures(u_E)).sum(-1) * tangent_E
        return torch.stack((by_value + second_E, by_tangent)), None


def spread(values: T, first_E: Tensor, size: int) -> T:
    """Values (E, n) at first, first + 1, ... of rows of zeros, (E, size)."""

    def place(x: Tensor) -> Tensor:
        index = (first_E.unsqueeze(-1) + torch.arange(x.shape[-1], device=x.device)).expand(x.shape)
        return x.new_zeros(*x.shape[:-1], size).scatter(-1, index, x)

    return dual.linear_map(values, place)
