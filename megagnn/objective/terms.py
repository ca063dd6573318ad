"""The terms of the loss, one class for each kind of label."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from ase.data import atomic_numbers
from torch import Tensor

from megagnn.data import keys
from megagnn.data.references import NUM_ELEMENTS
from megagnn.objective.config import LossConfig


class Term(ABC):
    """The losses of one kind of label; their sum over the global count is the term.

    Attributes:
        weight_key: key of the configuration of its weight.
        factor_key: that of what the weight is multiplied with at the end of a run; None for a constant one.
    """

    weight_key: ClassVar[str]
    factor_key: ClassVar[str | None] = None

    def __init__(self, config: LossConfig) -> None:
        self.config = config

    @staticmethod
    @abstractmethod
    def count(batch: dict[str, Tensor]) -> Tensor:
        """How many numbers of a batch are labelled, components counted one by one."""

    @abstractmethod
    def losses(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Loss of each of these numbers, with the structures' weights, of any shape."""


class EnergyTerm(Term):
    """Errors per atom, eV, one of each labelled structure."""

    weight_key, factor_key = "energy_weight", "final_energy_factor"

    @staticmethod
    def count(batch: dict[str, Tensor]) -> Tensor:
        return batch[keys.HAS_ENERGY].sum()

    def losses(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        has_B = batch[keys.HAS_ENERGY]
        error = ((outputs[keys.ENERGY] - batch[keys.ENERGY]) / batch[keys.NUM_ATOMS])[has_B].double()
        return batch[keys.WEIGHTS][has_B, 0] * pointwise(self.config.energy, error, self.config.huber_delta)


class ForcesTerm(Term):
    """Errors in eV/Å, three of each free atom; with `norm` their share in one number."""

    weight_key, factor_key = "force_weight", "final_force_factor"

    def __init__(self, config: LossConfig) -> None:
        super().__init__(config)
        self._element_weights: Tensor | None = None
        if config.element_weights:
            self._element_weights = torch.ones(NUM_ELEMENTS, dtype=torch.float64)
            for symbol, weight in config.element_weights.items():
                self._element_weights[atomic_numbers[symbol]] = weight

    @staticmethod
    def count(batch: dict[str, Tensor]) -> Tensor:
        return 3 * free_atoms(batch).sum()

    def losses(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        free_N, delta = free_atoms(batch), self.config.huber_delta
        label_NC = batch[keys.FORCES][free_N]
        error_NC = (outputs[keys.FORCES][free_N] - label_NC).double()
        if self.config.forces == "norm":
            loss = 3 * torch.linalg.vector_norm(error_NC, dim=1, keepdim=True)
        elif self.config.forces == "stratified_huber":
            loss = pointwise("huber", error_NC, delta * self._strata(label_NC), unit=delta)
        else:
            loss = pointwise(self.config.forces, error_NC, delta)
        weight_N = batch[keys.WEIGHTS][batch[keys.BATCH][free_N], 1].double()
        if self._element_weights is not None:
            of_element = self._element_weights.to(weight_N.device)
            weight_N = weight_N * of_element[batch[keys.ATOMIC_NUMBERS][free_N]]
        return weight_N.unsqueeze(1) * loss

    def _strata(self, label_NC: Tensor) -> Tensor:
        """(N, 1) factor of the Huber delta, by the length of the label."""
        size_N = torch.linalg.vector_norm(label_NC.double(), dim=1)
        factor_N = torch.ones_like(size_N)
        for bound, factor in self.config.force_strata:
            factor_N = torch.where(size_N >= bound, factor, factor_N)
        return factor_N.unsqueeze(1)


class StressTerm(Term):
    """Errors in eV/Å^3, nine of each labelled structure."""

    weight_key, factor_key = "stress_weight", "final_stress_factor"

    @staticmethod
    def count(batch: dict[str, Tensor]) -> Tensor:
        return 9 * batch[keys.HAS_STRESS].sum()

    def losses(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        has_B = batch[keys.HAS_STRESS]
        error_B33 = (outputs[keys.STRESS] - batch[keys.STRESS])[has_B].double()
        weight_B11 = batch[keys.WEIGHTS][has_B, 2].reshape(-1, 1, 1)
        return weight_B11 * pointwise(self.config.stress, error_B33, self.config.huber_delta)


TERMS: dict[str, type[Term]] = {
    keys.ENERGY: EnergyTerm,
    keys.FORCES: ForcesTerm,
    keys.STRESS: StressTerm,
}
"""Label -> its term."""


def free_atoms(batch: dict[str, Tensor]) -> Tensor:
    """Atoms whose forces count, (N,) bool: labelled, and not held fixed by the labeller."""
    return batch[keys.HAS_FORCES][batch[keys.BATCH]] & ~batch[keys.FIXED]


def pointwise(kind: str, error: Tensor, delta: float | Tensor, unit: float | None = None) -> Tensor:
    """|e|, e^2, or Huber's e^2/2 below delta and delta (|e| - delta/2) above (Huber 1964), divided by delta.

    With the division the Huber loss has the slope of the MAE in its tails, so weights mean the same for both
    kinds.

    Args:
        kind: "mae", "mse" or "huber".
        error: of any shape.
        delta: of the Huber loss, in the unit of the error; may differ from error to error.
        unit: what the Huber loss is divided by, `delta` if not given.
    """
    if kind == "mae":
        return error.abs()
    if kind == "mse":
        return error * error
    size = error.abs()
    if unit is None:
        return torch.where(size < delta, 0.5 * error * error / delta, size - 0.5 * delta)
    return torch.where(size < delta, 0.5 * error * error, delta * (size - 0.5 * delta)) / unit
