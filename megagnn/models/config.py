"""The section [model] of a configuration: keys of every model family."""

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from megagnn.overrides import STRICT, Free, Refused, Told


@dataclass(frozen=True, config=STRICT)
class ModelConfig:
    """Size, outputs and parametrisation of a model; each family adds keys of its own."""

    family: Refused[str] = "egnn"
    """Model family, one of those in models/registry.py."""
    preset: Free[str] = "default"
    """Named set of defaults for the other keys, of the family."""
    width: Refused[PositiveInt] = 128
    """Channels of a node, F."""
    num_layers: Refused[PositiveInt] = 4
    """Message-passing layers, L."""
    cutoff: Refused[PositiveFloat] = 5.0
    """Neighbours are the atoms within this distance, Å."""
    forces: Refused[Literal["conservative", "direct", "none"]] = "conservative"
    """-dE/dx, an equivariant head of its own, or energies only."""
    stress: Free[bool] = False
    """Predict the stress from the strain derivative of the energy (needs conservative forces)."""
    num_radial: Refused[PositiveInt] = 16
    """Radial basis functions, R."""
    depth_scaling: Refused[bool] = True
    """Multiply each layer's node update by 1/sqrt(L) and its coordinate update by 1/L."""
    initialisation: Free[Literal["lecun", "torch"]] = "lecun"
    """Initial Linear weights: normal with variance 1/inputs and no bias, or PyTorch's default."""
    parametrisation: Free[Literal["standard", "mup"]] = "standard"
    """One learning rate for all parameters, or rates and initial outputs that follow width and depth, so that
    the best learning rate stays where it is (maximal update)."""
    base_width: Free[PositiveInt] = 64
    """Width at which `mup` is the standard parametrisation."""
    base_layers: Free[PositiveInt] = 4
    """Number of layers at which it is."""
    level_embedding: Refused[bool] = True
    """Embed the level of theory of a structure into its atoms (with one level it is left out)."""
    pair_splines: Refused[NonNegativeInt] = 0
    """Cubic splines of a potential for each pair of elements and each level of theory, at least 4, which is
    fitted to the training split before training; the network learns what it leaves. 0 for none."""
    recompute_layers: Told[bool] = False
    """Keep the inputs of each layer only, and run it again in the backward."""

    def __post_init__(self) -> None:
        if self.stress and self.forces != "conservative":
            raise ValueError(
                f"model.stress needs model.forces = 'conservative', got '{self.forces}'; set one of the two "
                "to match"
            )
        if 0 < self.pair_splines < 4:
            raise ValueError(
                f"model.pair_splines must be 0 or at least 4, got {self.pair_splines}; take 16, or 0 for no "
                "pair potentials"
            )

    variants: ClassVar[dict[str, type["ModelConfig"]]] = {}
    """The configurations of the families, by their names; filled by models/registry.py."""

    @classmethod
    def choose(cls, values: Mapping[str, Any]) -> type["ModelConfig"]:
        """The configuration that the keys of a section [model] are for; the EGNN's where they name none.

        Raises:
            ValueError: a family that is not there.
        """
        name = values.get("family", "egnn")
        if name in cls.variants:
            return cls.variants[name]
        near = difflib.get_close_matches(str(name), cls.variants, n=1, cutoff=0.4)
        hint = f"; nearest: '{near[0]}'" if near else ""
        raise ValueError(f"model.family must be one of {', '.join(cls.variants)}, got {name!r}{hint}")

    @property
    def has_self_edges(self) -> bool:
        """Whether every atom is a neighbour of itself."""
        return False

    def check_dtype(self, dtype: str) -> None:
        """Raises ValueError where the model cannot be trained with parameters of this type."""

    def technique(self) -> list[str]:
        """Words for tables of results: how edges are computed and what is kept."""
        return ["layers recomputed"] if self.recompute_layers else []
