"""The section [loss] of a configuration, and its named presets."""

from typing import Any, Literal

from ase.data import atomic_numbers
from pydantic import Field, NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass

from megagnn.overrides import STRICT, Factors, Judged

_CONSTANT: dict[str, Any] = {"final_energy_factor": 1.0}
_MACE: dict[str, Any] = {"energy_weight": 1.0, "force_weight": 100.0, **_CONSTANT}
_SQUARES: dict[str, Any] = {"energy": "mse", "forces": "mse", "stress": "mse"}

LOSS_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "mace-weighted": {**_SQUARES, **_MACE},
    "mace-stress": {**_SQUARES, **_MACE, "stress_weight": 1.0},
    "mace-huber": {"energy": "huber", "forces": "huber", "stress": "huber", "huber_delta": 0.01, **_MACE},
    "mace-universal": {
        "energy": "huber",
        "forces": "stratified_huber",
        "stress": "huber",
        "huber_delta": 0.01,
        **_MACE,
    },
    "mace-l1l2": {"energy": "mae", "forces": "norm", **_MACE},
    "nequip": {**_SQUARES, "energy_weight": 1.0, "force_weight": 1.0, **_CONSTANT},
}

LossKind = Literal["mae", "mse", "huber"]
ForceLossKind = Literal["mae", "mse", "huber", "norm", "stratified_huber"]


@dataclass(frozen=True, config=STRICT)
class LossConfig:
    """Weights and kinds of the loss terms; errors in eV per atom, eV/Å, eV/Å^3, sums over global counts."""

    energy: Judged[LossKind] = "mse"
    """Kind of the energy-per-atom loss."""
    forces: Judged[ForceLossKind] = "mse"
    """Kind of the force loss, of components; `norm` is the mean length of the error vectors, and
    `stratified_huber` has a delta that depends on the size of the label (`force_strata`)."""
    stress: Judged[LossKind] = "huber"
    """Kind of the stress loss."""
    energy_weight: Judged[NonNegativeFloat] = 10.0
    """Weight of the energy-per-atom loss."""
    force_weight: Judged[NonNegativeFloat] = 1.0
    """Weight of the force loss."""
    stress_weight: Judged[NonNegativeFloat] = 0.0
    """Weight of the stress loss (needs model.stress)."""
    huber_delta: Judged[PositiveFloat] = 0.1
    """Error at which the Huber loss turns from square to linear, in the unit of each term."""
    force_strata: Judged[tuple[tuple[NonNegativeFloat, PositiveFloat], ...]] = (
        (0.0, 1.0),
        (100.0, 0.7),
        (200.0, 0.4),
        (300.0, 0.1),
    )
    """`stratified_huber`: pairs (size of the label in eV/Å, factor of `huber_delta` from there on)."""
    element_weights: Judged[Factors] = Field(default_factory=dict)
    """Weights of atoms in the force term by element, 1 for those not named: {H = 0.5}."""
    final_energy_factor: Judged[NonNegativeFloat] = 10.0
    """What `energy_weight` is multiplied with in the last part of the run, and where validations judge."""
    final_force_factor: Judged[NonNegativeFloat] = 1.0
    """The same of `force_weight`."""
    final_stress_factor: Judged[NonNegativeFloat] = 1.0
    """The same of `stress_weight`."""
    change: Judged[tuple[float, float]] = (0.6, 0.9)
    """Shares of the run between which these factors rise from 1 in a straight line; two equal numbers for a
    switch."""
    preset: Judged[
        Literal[
            "default", "mace-weighted", "mace-stress", "mace-huber", "mace-universal", "mace-l1l2", "nequip"
        ]
    ] = "default"
    """Named set of kinds and weights, as those of MACE and NequIP; keys that are set come before it."""

    def __post_init__(self) -> None:
        if not 0 <= self.change[0] <= self.change[1] <= 1:
            raise ValueError(
                f"loss.change = {list(self.change)} must be two rising shares of the run between 0 and 1, "
                "such as [0.5, 0.75]"
            )
        bounds = [bound for bound, _ in self.force_strata]
        if bounds != sorted(bounds):
            raise ValueError(f"loss.force_strata must have rising sizes, got {bounds}; put them in order")
        for symbol in self.element_weights:
            if atomic_numbers.get(symbol, 0) < 1:
                raise ValueError(
                    f"loss.element_weights names '{symbol}', which is no element; use symbols such as H or Si"
                )
