"""The section [model] of the Cartesian family, and its presets."""

from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from megagnn.models.config import ModelConfig
from megagnn.overrides import STRICT, Free, Refused, Told


@dataclass(frozen=True, config=STRICT)
class CartesianConfig(ModelConfig):
    """Scalars, vectors and symmetric traceless tensors on every atom, edges channel by channel."""

    family: Refused[Literal["cartesian"]] = "cartesian"
    """The model family."""
    preset: Free[Literal["default", "full", "lean", "painn"]] = "default"
    """Named set of parts."""
    num_radial: Refused[PositiveInt] = 8
    """Bessel functions of the distance, R, of which every path's weight is a linear combination."""
    num_splines: Refused[NonNegativeInt] = 0
    """Cubic B-splines of the distance, K, at least R + 3, in place of the Bessel functions: no more than four
    are not zero on an edge. The paths' weights begin as with R Bessel functions. 0 for none."""
    paths: Refused[Literal["full", "lean", "painn"]] = "full"
    """Products of a sender's features with the edge's direction: all 14 up to l = 2, the 5 that no product
    with the sender's vectors and tensors needs, or the 3 of PaiNN's messages, which has no tensors."""
    vector_width: Refused[PositiveInt | None] = None
    """Channels of the vectors; half of `width` if not given."""
    tensor_width: Refused[PositiveInt | None] = None
    """Channels of the tensors; a quarter of `width` if not given."""
    edge_width: Refused[PositiveInt | None] = None
    """Channels of the messages; half of `width` if not given."""
    edge_operation: Told[Literal["fused", "unfused"]] = "fused"
    """Messages and their sums in one pass over the edges, and norm, gates and products in a few over the
    atoms, or every message and product as a tensor (the reference)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paths == "painn" and self.tensor_width is not None:
            raise ValueError(
                f"model.tensor_width needs paths with tensors, got {self.tensor_width} beside model.paths = "
                "'painn'; leave it out, or take 'lean' or 'full'"
            )

        if 0 < self.num_splines < self.num_radial + 3:
            raise ValueError(
                f"model.num_splines must be 0 or at least model.num_radial + 3 = {self.num_radial + 3}, got "
                f"{self.num_splines}; take more of them, or a smaller num_radial"
            )

    @property
    def widths(self) -> dict[str, int]:
        """Channels of each field of the state: of `h`, `v` and, with tensors, `t`."""
        found = {"h": self.width, "v": self.vector_width or max(1, self.width // 2)}
        if self.paths != "painn":
            found["t"] = self.tensor_width or max(1, self.width // 4)
        return found

    @property
    def message_width(self) -> int:
        """Channels of the messages."""
        return self.edge_width or max(1, self.width // 2)

    def technique(self) -> list[str]:
        """See `ModelConfig`: `fused edges`."""
        return [f"{self.edge_operation} edges", *super().technique()]


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "full": {"paths": "full"},
    "lean": {"paths": "lean"},
    "painn": {"paths": "painn"},
}
