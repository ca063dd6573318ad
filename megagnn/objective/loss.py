"""The loss: a weighted sum of terms, each a sum over global counts.

The mean of rank means is not the global mean when ranks hold different numbers of atoms, so a rank's loss is
its sum of terms divided by the *global* count, and the ranks' losses and gradients add up to those of one
process.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megagnn.data import keys
from megagnn.objective.config import LossConfig
from megagnn.objective.terms import TERMS
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.world import sum_over_dp


@dataclass(frozen=True)
class LossCounts:
    """Global numbers in a batch: of each label, see `Term.count`; atoms; edges."""

    labels: Mapping[str, float]
    atoms: float
    edges: float


def label_counts(batch: dict[str, Tensor], context: ParallelContext) -> LossCounts:
    """Counts over the batches of all ranks."""
    return step_counts([batch], context)


def step_counts(batches: Sequence[dict[str, Tensor]], context: ParallelContext) -> LossCounts:
    """Counts over all batches of a step, of all ranks: one message, however many there are."""
    counts = torch.stack([_own_counts(batch) for batch in batches]).sum(0)
    *labels, atoms, edges = sum_over_dp(counts, context).tolist()
    return LossCounts(dict(zip(TERMS, labels, strict=True)), atoms, edges)


def _own_counts(batch: dict[str, Tensor]) -> Tensor:
    sizes = torch.tensor([len(batch[keys.ATOMIC_NUMBERS]), batch[keys.EDGE_INDEX].shape[1]])
    labels = [term.count(batch) for term in TERMS.values()]
    return torch.cat([torch.stack(labels), sizes.to(labels[0].device)]).double()


def check_labels(num_labelled: Mapping[str, int], config: LossConfig, free_forces: bool = True) -> None:
    """Raises ValueError if a term has a weight and the training data no label of its kind that counts.

    Args:
        num_labelled: training structures with a label of each kind.
        free_forces: whether some labelled force is of an atom that was not held fixed.
    """
    for term, kind in TERMS.items():
        setting = kind.weight_key
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
        self._terms = {name: term(config) for name, term in TERMS.items()}

    def __call__(
        self,
        outputs: dict[str, Tensor],
        batch: dict[str, Tensor],
        counts: LossCounts,
        terms: Collection[str] = tuple(TERMS),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, {term: unweighted share}), float64 scalars; `terms` are those to take.

        Raises:
            ValueError: a term of what the model does not predict.
        """
        total = outputs[keys.ENERGY].sum() * 0.0  # keeps the graph where a rank has no structure
        shares: dict[str, Tensor] = {}
        for name, term in self._terms.items():
            if name not in terms or self.weights[name] == 0 or counts.labels[name] == 0:
                continue
            if name not in outputs:
                key = f"loss.{term.weight_key}"
                raise ValueError(
                    f"{key} is {self.weights[name]:g} but the model predicts no {name}, only "
                    f"{', '.join(outputs)}; set {key} = 0, or give the model a head for it"
                )
            share = term.losses(outputs, batch).sum() / counts.labels[name]
            total = total + self.weights[name] * share
            shares[name] = share.detach()
        return total, shares


def weight_at(config: LossConfig, term: str, progress: float) -> float:
    """Weight of a term where this share of the run is done: its factor rises from 1 to the final one."""
    kind = TERMS[term]
    weight: float = getattr(config, kind.weight_key)
    if kind.factor_key is None:
        return weight
    final: float = getattr(config, kind.factor_key)
    begin, end = config.change
    if progress >= end:
        return weight * final
    risen = max(0.0, progress - begin) / (end - begin) if end > begin else 0.0
    return weight * (1 + (final - 1) * risen)


def weights_are_final(config: LossConfig, progress: float) -> bool:
    """Whether all terms weigh, where this share of the run is done, what they do at its end."""
    return all(weight_at(config, term, progress) == weight_at(config, term, 1.0) for term in TERMS)
