"""The section [data] of a configuration."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from megagnn.overrides import STRICT, Factors, Judged, Place, Refused, Told, UserPath

Oversized = Literal["error", "skip", "alone"]


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """Which structures, and how many at once."""

    paths: Refused[tuple[UserPath, ...]] = ()
    """Packed stores, as made by `megagnn prepare` or `megagnn label`."""
    num_structures: Refused[PositiveInt | None] = None
    """Train on this many structures of the training split; all of them if not given. Smaller subsets are part
    of larger ones of the same seed."""
    subset_seed: Refused[NonNegativeInt] = 0
    """Which structures those are."""
    source_weights: Judged[Factors] = Field(default_factory=dict)
    """Weights of sources in the loss, 1 for those not named: {"old data" = 0.2}."""
    config_type_weights: Judged[Factors] = Field(default_factory=dict)
    """The same of kinds of structures, as their files name them (config_type)."""
    reference_energies: Told[UserPath | None] = None
    """File of reference energies, eV, by element or by source and element (docs/data.md); if not given, those
    that neither stores nor isolated atoms give are fitted."""
    max_atoms: Refused[PositiveInt] = 2048
    """Atoms of one batch on one rank, at most."""
    max_edges: Refused[PositiveInt] = 65536
    """Directed edges of one batch on one rank, at most."""
    max_structures: Refused[PositiveInt | None] = None
    """Structures of one batch on one rank, at most; no limit if not given."""
    oversized: Refused[Oversized] = "error"
    """Structures larger than that budget: "error" refuses them, "skip" leaves them out of every split,
    "alone" gives each a batch of its own, above the budget."""
    mixing_temperature: Refused[PositiveFloat] = 1.0
    """Share of a source of n structures in the batches: as n^(1/T); 1 takes every structure once an epoch
    (docs/training.md)."""
    num_workers: Place[NonNegativeInt | Literal["auto"]] = "auto"
    """Processes per rank that read structures and find neighbours; 0 does it in the training process, "auto"
    takes cores that are not used, as many as pay."""
    cache_edges: Place[NonNegativeFloat] = 0.0
    """Gigabytes beside each store for neighbour lists that were found, to be read again; 0 keeps none."""
