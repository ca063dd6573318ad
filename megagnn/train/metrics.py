"""Errors per source against labels and baselines, summed over batches and ranks."""

from typing import Any

import torch
from torch import Tensor

from megagnn.data import keys
from megagnn.models.potential import Potential
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.world import all_reduce_sum
from megagnn.train.loss import free_atoms

# Quantities whose absolute and squared values are summed, per source; the baselines know per-element energies
# and zero forces ("elements"), or the mean energy per atom ("mean").
QUANTITIES = ("energy", "energy_elements", "energy_mean", "forces", "forces_zero", "stress", "stress_zero")


class ErrorSums:
    """Running sums of errors; `add` batches, `reduce` over ranks, then read `per_source`."""

    def __init__(self, potential: Potential, context: ParallelContext) -> None:
        self.potential, self.context = potential, context
        num_sources = len(potential.statistics.sources)
        # (source, quantity, [count, sum of |e|, sum of e^2])
        self.sums = torch.zeros(num_sources, len(QUANTITIES), 3, dtype=torch.float64, device=context.device)
        self.structures = torch.zeros(num_sources, dtype=torch.float64, device=context.device)
        mean = torch.tensor(potential.statistics.mean_energy, dtype=torch.float64)
        self.mean_energy = mean.to(context.device)

    @torch.no_grad()
    def add(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
        """Take the errors of one batch."""
        source_B, num_atoms_B = batch[keys.SOURCE], batch[keys.NUM_ATOMS]
        self.structures.index_add_(0, source_B, torch.ones_like(source_B, dtype=torch.float64))
        has_B = batch[keys.HAS_ENERGY]
        label_B = batch[keys.ENERGY]
        predictions = {
            "energy": outputs[keys.ENERGY],
            "energy_elements": self.potential.model.reference_energy(batch),
            "energy_mean": self.mean_energy[source_B] * num_atoms_B,
        }
        for name, energy_B in predictions.items():
            self._add(name, ((energy_B - label_B) / num_atoms_B)[has_B], source_B[has_B])
        if keys.FORCES in outputs:
            free_N = free_atoms(batch)
            label_NC, source_N = batch[keys.FORCES][free_N], source_B[batch[keys.BATCH]][free_N]
            self._add("forces", outputs[keys.FORCES][free_N] - label_NC, source_N)
            self._add("forces_zero", label_NC, source_N)
        if keys.STRESS in outputs:
            has_B = batch[keys.HAS_STRESS]
            self._add(
                "stress", (outputs[keys.STRESS] - batch[keys.STRESS])[has_B].flatten(1), source_B[has_B]
            )
            self._add("stress_zero", batch[keys.STRESS][has_B].flatten(1), source_B[has_B])

    def _add(self, name: str, error: Tensor, source: Tensor) -> None:
        """`error` is (K,) or (K, components); `source` is (K,)."""
        if len(source) == 0:  # no label of this kind in the batch, or no structure at all
            return
        error = error.double().reshape(len(source), -1)
        count = torch.full_like(source, error.shape[1], dtype=torch.float64)
        terms_K3 = torch.stack([count, error.abs().sum(1), error.square().sum(1)], 1)
        self.sums[:, QUANTITIES.index(name)].index_add_(0, source, terms_K3)

    def reduce(self) -> None:
        """Sum over the ranks; call once, after the last batch."""
        all_reduce_sum(self.sums, self.context)
        all_reduce_sum(self.structures, self.context)

    def per_source(self) -> dict[str, dict[str, float]]:
        """MAE and RMSE of each source, in meV/atom, meV/Å and meV/Å^3, beside the baselines'."""
        result: dict[str, dict[str, float]] = {}
        for index, source in enumerate(self.potential.statistics.sources):
            if self.structures[index] == 0:
                continue
            metrics: dict[str, float] = {"num_test": int(self.structures[index])}
            for name, keyword in _NAMES.items():
                count, absolute, square = self.sums[index, QUANTITIES.index(name)].tolist()
                if count:
                    metrics[keyword.format("mae")] = 1e3 * absolute / count
                    metrics[keyword.format("rmse")] = 1e3 * (square / count) ** 0.5
            result[source] = metrics
        return result


_NAMES = {
    "energy": "energy_{}_mev_per_atom",
    "energy_elements": "baseline_energy_{}_mev_per_atom",
    "energy_mean": "mean_baseline_energy_{}_mev_per_atom",
    "forces": "force_{}_mev_per_angstrom",
    "forces_zero": "baseline_force_{}_mev_per_angstrom",
    "stress": "stress_{}_mev_per_cubic_angstrom",
    "stress_zero": "baseline_stress_{}_mev_per_cubic_angstrom",
}


_COLUMNS = (
    ("energy MAE", "meV/atom", "energy_mae_mev_per_atom"),
    ("per-element", "meV/atom", "baseline_energy_mae_mev_per_atom"),
    ("mean", "meV/atom", "mean_baseline_energy_mae_mev_per_atom"),
    ("force MAE", "meV/Å", "force_mae_mev_per_angstrom"),
    ("zero force", "meV/Å", "baseline_force_mae_mev_per_angstrom"),
    ("stress MAE", "meV/Å^3", "stress_mae_mev_per_cubic_angstrom"),
    ("zero stress", "meV/Å^3", "baseline_stress_mae_mev_per_cubic_angstrom"),
)


def format_table(per_source: dict[str, dict[str, Any]]) -> str:
    """A plain-text table of mean absolute errors beside their baselines; empty columns left out."""
    columns = [c for c in _COLUMNS if any(c[2] in metrics for metrics in per_source.values())]
    width = max([len("source"), *map(len, per_source)]) + 2
    header = f"{'source':<{width}}{'structures':>11}" + "".join(f"{title:>13}" for title, _, _ in columns)
    rows = [header, " " * (width + 11) + "".join(f"{unit:>13}" for _, unit, _ in columns), "-" * len(header)]
    for source, metrics in per_source.items():
        values = [f"{metrics[key]:>13.1f}" if key in metrics else f"{'-':>13}" for _, _, key in columns]
        rows.append(f"{source:<{width}}{metrics['num_test']:>11d}" + "".join(values))
    return "\n".join(rows)
