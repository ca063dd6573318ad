"""Energy, force and stress losses as sums over global counts.

The mean of rank means is not the global mean when ranks hold different numbers of atoms, so a rank's loss is
its sum of terms divided by the *global* count, and the ranks' losses and gradients add up to those of one
process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from ase.data import atomic_numbers
from torch import Tensor

from megagnn.data import keys
from megagnn.data.references import NUM_ELEMENTS
from megagnn.objective.config import LossConfig
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.world import sum_over_dp

TERMS = ("energy", "forces", "stress")
# Of each term, the configuration's keys of its weight, and of the factor of that at the end of a run.
WEIGHT_KEYS = {"energy": "energy_weight", "forces": "force_weight", "stress": "stress_weight"}
FACTOR_KEYS = {
    "energy": "final_energy_factor",
    "forces": "final_force_factor",
    "stress": "final_stress_factor",
}


@dataclass(frozen=True)
class LossCounts:
    """Global numbers in a batch: labelled energies, force and stress components, atoms, edges."""

    energy: float
    forces: float
    stress: float
    atoms: float
    edges: float


def free_atoms(batch: dict[str, Tensor]) -> Tensor:
    """Atoms whose forces count, (N,) bool: labelled, and not held fixed by the labeller."""
    return batch[keys.HAS_FORCES][batch[keys.BATCH]] & ~batch[keys.FIXED]


def label_counts(batch: dict[str, Tensor], context: ParallelContext) -> LossCounts:
    """Counts over the batches of all ranks."""
    return step_counts([batch], context)


def step_counts(batches: Sequence[dict[str, Tensor]], context: ParallelContext) -> LossCounts:
    """Counts over all batches of a step, of all ranks: one message, however many there are."""
    counts = torch.stack([_own_counts(batch) for batch in batches]).sum(0)
    return LossCounts(*sum_over_dp(counts, context).tolist())


def _own_counts(batch: dict[str, Tensor]) -> Tensor:
    sizes = torch.tensor([len(batch[keys.ATOMIC_NUMBERS]), batch[keys.EDGE_INDEX].shape[1]])
    labels = [batch[keys.HAS_ENERGY].sum(), 3 * free_atoms(batch).sum(), 9 * batch[keys.HAS_STRESS].sum()]
    return torch.cat([torch.stack(labels), sizes.to(labels[0].device)]).double()


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


def check_labels(num_labelled: Mapping[str, int], config: LossConfig, free_forces: bool = True) -> None:
    """Raises ValueError if a term has a weight and the training data no label of its kind that counts.

    Args:
        num_labelled: training structures with a label of each kind.
        free_forces: whether some labelled force is of an atom that was not held fixed.
    """
    for term, setting in WEIGHT_KEYS.items():
        weight = getattr(config, setting)
        if weight > 0 and num_labelled[term] == 0:
            raise ValueError(
                f"loss.{setting} is {weight:g} but no training structure has a label '{term}'; set "
                f"loss.{setting} = 0, or prepare the data with --{term}-key naming it"
            )
        if weight > 0 and term == "forces" and not free_forces:
            raise ValueError(
                f"loss.{setting} is {weight:g} but all atoms of the {num_labelled[term]:,} training "
                "structures with forces are held fixed, and forces of fixed atoms do not count; set "
                f"loss.{setting} = 0, or prepare the data from files without these constraints"
            )


class Loss:
    """Weighted sum of the terms; calling it gives this rank's share of the global loss and of each term.

    Args:
        config: kinds and weights of the terms.
        progress: share of the run that is done, 0 to 1, where weights change over the run. At the end, the
            default, they are those by which validations judge.
    """

    def __init__(self, config: LossConfig, progress: float = 1.0) -> None:
        self.config = config
        self.weights = {term: weight_at(config, term, progress) for term in TERMS}
        self._element_weights: Tensor | None = None
        if config.element_weights:
            self._element_weights = torch.ones(NUM_ELEMENTS, dtype=torch.float64)
            for symbol, weight in config.element_weights.items():
                self._element_weights[atomic_numbers[symbol]] = weight

    def __call__(
        self, outputs: dict[str, Tensor], batch: dict[str, Tensor], counts: LossCounts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, {term: unweighted share}), float64 scalars."""
        total = outputs[keys.ENERGY].sum() * 0.0  # keeps the graph where a rank has no structure
        shares: dict[str, Tensor] = {}
        for term in TERMS:
            count = getattr(counts, term)
            if self.weights[term] == 0 or count == 0:
                continue
            share = getattr(self, f"_{term}")(outputs, batch).sum() / count
            total = total + self.weights[term] * share
            shares[term] = share.detach()
        return total, shares

    def _energy(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Loss of errors per atom, eV, one of each labelled structure."""
        has_B = batch[keys.HAS_ENERGY]
        error = ((outputs[keys.ENERGY] - batch[keys.ENERGY]) / batch[keys.NUM_ATOMS])[has_B].double()
        return batch[keys.WEIGHTS][has_B, 0] * pointwise(self.config.energy, error, self.config.huber_delta)

    def _forces(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Loss of errors in eV/Å, three of each free atom; with `norm` their share in one number."""
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

    def _stress(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Loss of errors in eV/Å^3, nine of each labelled structure."""
        has_B = batch[keys.HAS_STRESS]
        error_B33 = (outputs[keys.STRESS] - batch[keys.STRESS])[has_B].double()
        weight_B11 = batch[keys.WEIGHTS][has_B, 2].reshape(-1, 1, 1)
        return weight_B11 * pointwise(self.config.stress, error_B33, self.config.huber_delta)

    def _strata(self, label_NC: Tensor) -> Tensor:
        """(N, 1) factor of the Huber delta, by the length of the label."""
        size_N = torch.linalg.vector_norm(label_NC.double(), dim=1)
        factor_N = torch.ones_like(size_N)
        for bound, factor in self.config.force_strata:
            factor_N = torch.where(size_N >= bound, factor, factor_N)
        return factor_N.unsqueeze(1)


def weight_at(config: LossConfig, term: str, progress: float) -> float:
    """Weight of a term where this share of the run is done: its factor rises from 1 to the final one."""
    weight: float = getattr(config, WEIGHT_KEYS[term])
    final: float = getattr(config, FACTOR_KEYS[term])
    begin, end = config.change
    if progress >= end:
        return weight * final
    risen = max(0.0, progress - begin) / (end - begin) if end > begin else 0.0
    return weight * (1 + (final - 1) * risen)
