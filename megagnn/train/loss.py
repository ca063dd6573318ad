"""Energy, force and stress losses as sums over global counts.

The mean of rank means is not the global mean when ranks hold different numbers of atoms, so a rank's loss is
its sum of terms divided by the *global* count, and the ranks' losses and gradients add up to those of one
process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megagnn.config import LossConfig
from megagnn.data import keys
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.world import all_reduce_sum

TERMS = ("energy", "forces", "stress")


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
    return LossCounts(*all_reduce_sum(counts, context).tolist())


def _own_counts(batch: dict[str, Tensor]) -> Tensor:
    sizes = torch.tensor([len(batch[keys.ATOMIC_NUMBERS]), batch[keys.EDGE_INDEX].shape[1]])
    labels = [batch[keys.HAS_ENERGY].sum(), 3 * free_atoms(batch).sum(), 9 * batch[keys.HAS_STRESS].sum()]
    return torch.cat([torch.stack(labels), sizes.to(labels[0].device)]).double()


def pointwise(kind: str, error: Tensor, delta: float) -> Tensor:
    """|e|, e^2, or Huber's e^2/2 below delta and delta (|e| - delta/2) above (Huber 1964), divided by delta.

    With the division the Huber loss has the slope of the MAE in its tails, so weights mean the same for both
    kinds.
    """
    if kind == "mae":
        return error.abs()
    if kind == "mse":
        return error * error
    size = error.abs()
    return torch.where(size < delta, 0.5 * error * error / delta, size - 0.5 * delta)


def check_labels(num_labelled: Mapping[str, int], config: LossConfig) -> None:
    """Raises ValueError if a term has a weight and the training data no label of its kind."""
    settings = {"energy": "energy_weight", "forces": "force_weight", "stress": "stress_weight"}
    for term, setting in settings.items():
        weight = getattr(config, setting)
        if weight > 0 and num_labelled[term] == 0:
            raise ValueError(
                f"loss.{setting} is {weight:g} but no training structure has a label '{term}'; set "
                f"loss.{setting} = 0, or prepare the data with --{term}-key naming it"
            )


class Loss:
    """Weighted sum of the terms; calling it gives this rank's share of the global loss and of each term."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config
        self.weights = {
            "energy": config.energy_weight,
            "forces": config.force_weight,
            "stress": config.stress_weight,
        }

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
            errors = self._errors(term, outputs, batch).double()
            share = pointwise(getattr(self.config, term), errors, self.config.huber_delta).sum() / count
            total = total + self.weights[term] * share
            shares[term] = share.detach()
        return total, shares

    @staticmethod
    def _errors(term: str, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        """Errors where labels exist: energy per atom (eV), components of forces (eV/Å), stress (eV/Å^3)."""
        if term == "energy":
            error_B = (outputs[keys.ENERGY] - batch[keys.ENERGY]) / batch[keys.NUM_ATOMS]
            return error_B[batch[keys.HAS_ENERGY]]
        if term == "forces":
            return (outputs[keys.FORCES] - batch[keys.FORCES])[free_atoms(batch)]
        return (outputs[keys.STRESS] - batch[keys.STRESS])[batch[keys.HAS_STRESS]]
