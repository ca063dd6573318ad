"""The section [model] of PaiNN, and its presets."""

from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from megagnn.models.config import ModelConfig
from megagnn.overrides import STRICT, Free, Refused


@dataclass(frozen=True, config=STRICT)
class PaiNNConfig(ModelConfig):
    """PaiNN (docs/model.md): scalar and vector features on every atom, edges channel by channel."""

    family: Refused[Literal["painn"]] = "painn"
    """The model family."""
    preset: Free[Literal["default", "published"]] = "default"
    """Named set of parts: the default, or Schütt et al. 2021 as in the package schnetpack."""
    radial_basis: Refused[Literal["bessel", "gaussian"]] = "bessel"
    """Functions of the distance, of which the filters are linear combinations."""
    envelope: Refused[Literal["polynomial", "cosine"]] = "polynomial"
    """Cutoff function of the filters; the cosine's second derivative jumps at the cutoff."""
    distance_epsilon: Refused[NonNegativeFloat] = 1e-3
    """Added in quadrature to distances, Å; with 0 coincident atoms give NaN."""
    norm_epsilon: Refused[PositiveFloat] = 1e-4
    """Added to squared norms of vector features: a small one makes large second derivatives where symmetry
    makes a vector vanish."""
    message_aggregation: Refused[Literal["constant", "sum"]] = "constant"
    """Divisor of the sums of messages: the training set's mean number of neighbours, or 1."""
    head_width: Refused[PositiveInt | None] = None
    """Hidden width of the energy head; half of `width` if not given."""


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "published": {
        "num_radial": 20,
        "envelope": "cosine",
        "distance_epsilon": 0.0,
        "norm_epsilon": 1e-8,
        "message_aggregation": "sum",
        "depth_scaling": False,
    },
}
