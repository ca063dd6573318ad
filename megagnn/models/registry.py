"""The model families: one line each, by which configuration, training and all tools find them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from megagnn.models.cartesian.config import PRESETS as CARTESIAN_PRESETS
from megagnn.models.cartesian.config import CartesianConfig
from megagnn.models.config import ModelConfig
from megagnn.models.egnn.config import PRESETS as EGNN_PRESETS
from megagnn.models.egnn.config import EGNNConfig
from megagnn.models.painn.config import PRESETS as PAINN_PRESETS
from megagnn.models.painn.config import PaiNNConfig

if TYPE_CHECKING:
    from megagnn.models.family import Model


class Family(NamedTuple):
    """Where the parts of a family are."""

    config: type[ModelConfig]
    """Its section [model]."""
    presets: dict[str, dict[str, Any]]
    """Named sets of defaults for the keys of that section."""
    model: str
    """Module and class of the model, which is imported when it is built: "package.module:Class"."""


FAMILIES: dict[str, Family] = {
    "egnn": Family(EGNNConfig, EGNN_PRESETS, "megagnn.models.egnn.model:EGNN"),
    "painn": Family(PaiNNConfig, PAINN_PRESETS, "megagnn.models.painn.model:PaiNN"),
    "cartesian": Family(CartesianConfig, CARTESIAN_PRESETS, "megagnn.models.cartesian.model:Cartesian"),
}


ModelConfig.variants.update({name: family.config for name, family in FAMILIES.items()})


def presets_of(values: Any) -> dict[str, dict[str, Any]]:
    """The presets of the family that the keys of a section [model] name; raises ValueError as `choose`."""
    return FAMILIES[ModelConfig.choose(values if isinstance(values, dict) else {}).family].presets


def model_class(config: ModelConfig) -> "type[Model]":
    """The class of the model that a configuration is for."""
    module, _, name = FAMILIES[config.family].model.partition(":")
    found: type[Model] = getattr(import_module(module), name)
    return found
