"""Errors against labels and baselines, per source and other groups, over batches and ranks; parity plots."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megagnn.data import keys
from megagnn.models.potential import Potential
from megagnn.objective.terms import free_atoms
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.world import gather_objects, sum_over_dp

# Quantities whose absolute and squared values are summed, per group; the baselines know per-element energies
# and zero forces ("elements"), or the mean energy per atom ("mean").
QUANTITIES = (
    *("energy", "energy_elements", "energy_mean", "forces", "forces_zero", "stress", "stress_zero"),
    *(word for name in keys.OTHER_LABELS for word in (name, f"{name}_zero")),
)


@dataclass(frozen=True)
class Grouping:
    """A division of a data set's structures into named groups, beside that by source."""

    names: tuple[str, ...]
    index_S: NDArray[np.int64]
    """(S,) group of each structure, numbered as `keys.STRUCTURE`."""


def grouping(labels: NDArray[np.str_]) -> Grouping:
    """The groups of structures with equal labels, (S,); "(none)" are those whose label is empty."""
    names, index = np.unique(labels, return_inverse=True)
    return Grouping(tuple(str(name) or "(none)" for name in names), index.astype(np.int64))


class ErrorSums:
    """Running sums of errors; `add` batches, `reduce` over ranks, then read `per_source` or `per_group`.

    groupings: {name: how to divide the structures}, beside the division by source.
    """

    def __init__(
        self,
        potential: Potential,
        context: ParallelContext,
        groupings: Mapping[str, Grouping] | None = None,
    ) -> None:
        self.potential, self.context = potential, context
        groupings = groupings or {}
        self._names = {"source": potential.statistics.sources}
        self._names |= {kind: grouping.names for kind, grouping in groupings.items()}
        self._index_S = [torch.from_numpy(g.index_S).to(context.device) for g in groupings.values()]
        num_groups = sum(map(len, self._names.values()))
        # (group, quantity, [count, sum of |e|, sum of e^2]), the groups of one division after another
        self.sums = torch.zeros(num_groups, len(QUANTITIES), 3, dtype=torch.float64, device=context.device)
        self.structures = torch.zeros(num_groups, dtype=torch.float64, device=context.device)
        mean = torch.tensor(potential.statistics.mean_energy, dtype=torch.float64)
        self.mean_energy = mean.to(context.device)

    @torch.no_grad()
    def add(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
        source_B, num_atoms_B = batch[keys.SOURCE], batch[keys.NUM_ATOMS]
        rows_BG = self._rows(batch)
        self.structures.index_add_(
            0, rows_BG.flatten(), torch.ones_like(rows_BG.flatten(), dtype=torch.float64)
        )
        has_B = batch[keys.HAS_ENERGY]
        label_B = batch[keys.ENERGY]
        predictions = {
            "energy": outputs[keys.ENERGY],
            "energy_elements": self.potential.model.reference_energy(batch),
            "energy_mean": self.mean_energy[source_B] * num_atoms_B,
        }
        for name, energy_B in predictions.items():
            self._add(name, ((energy_B - label_B) / num_atoms_B)[has_B], rows_BG[has_B])
        if keys.FORCES in outputs:
            free_N = free_atoms(batch)
            label_NC, rows_NG = batch[keys.FORCES][free_N], rows_BG[batch[keys.BATCH]][free_N]
            self._add("forces", outputs[keys.FORCES][free_N] - label_NC, rows_NG)
            self._add("forces_zero", label_NC, rows_NG)
        if keys.STRESS in outputs:
            has_B = batch[keys.HAS_STRESS]
            error_B9 = (outputs[keys.STRESS] - batch[keys.STRESS])[has_B].flatten(1)
            self._add("stress", error_B9, rows_BG[has_B])
            self._add("stress_zero", batch[keys.STRESS][has_B].flatten(1), rows_BG[has_B])
        for name in filter(outputs.__contains__, keys.OTHER_LABELS):
            has, rows, label = batch[keys.has(name)], rows_BG, batch[name]
            if keys.LABELS[name].per_atom:
                has, rows = has[batch[keys.BATCH]], rows[batch[keys.BATCH]]
            self._add(name, (outputs[name] - label)[has], rows[has])
            self._add(f"{name}_zero", label[has], rows[has])

    def _rows(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, G) rows of `sums` that each structure belongs to: one of each division."""
        columns = [batch[keys.SOURCE], *(index_S[batch[keys.STRUCTURE]] for index_S in self._index_S)]
        sizes = [len(names) for names in self._names.values()]
        return torch.stack([column + sum(sizes[:k]) for k, column in enumerate(columns)], 1)

    def _add(self, name: str, error: Tensor, rows_KG: Tensor) -> None:
        """`error` is (K,) or (K, components)."""
        if len(rows_KG) == 0:  # no label of this kind in the batch, or no structure at all
            return
        error = error.double().reshape(len(rows_KG), -1)
        count = torch.full_like(error[:, 0], error.shape[1])
        terms_K3 = torch.stack([count, error.abs().sum(1), error.square().sum(1)], 1)
        for rows_K in rows_KG.unbind(1):
            self.sums[:, QUANTITIES.index(name)].index_add_(0, rows_K, terms_K3)

    def reduce(self) -> None:
        """Sum over the ranks; call once, after the last batch."""
        sum_over_dp(self.sums, self.context)
        sum_over_dp(self.structures, self.context)

    def per_source(self) -> dict[str, dict[str, float]]:
        """MAE and RMSE of each source, in meV/atom, meV/Å and meV/Å^3, beside the baselines'."""
        return self.per_group("source")

    def per_group(self, kind: str) -> dict[str, dict[str, float]]:
        """The same of each group of a division by its name."""
        first = 0
        for name, names in self._names.items():
            if name == kind:
                break
            first += len(names)
        rows = {group: first + k for k, group in enumerate(self._names[kind])}
        return {group: self._metrics(row) for group, row in rows.items() if self.structures[row] > 0}

    def _metrics(self, row: int) -> dict[str, float]:
        metrics: dict[str, float] = {"num_test": int(self.structures[row])}
        for name, keyword in _NAMES.items():
            count, absolute, square = self.sums[row, QUANTITIES.index(name)].tolist()
            if count:
                metrics[keyword.format("mae")] = 1e3 * absolute / count
                metrics[keyword.format("rmse")] = 1e3 * (square / count) ** 0.5
        return metrics


_NAMES = {
    "energy": "energy_{}_mev_per_atom",
    "energy_elements": "baseline_energy_{}_mev_per_atom",
    "energy_mean": "mean_baseline_energy_{}_mev_per_atom",
    "forces": "force_{}_mev_per_angstrom",
    "forces_zero": "baseline_force_{}_mev_per_angstrom",
    "stress": "stress_{}_mev_per_cubic_angstrom",
    "stress_zero": "baseline_stress_{}_mev_per_cubic_angstrom",
}
for _name in keys.OTHER_LABELS:
    _NAMES[_name] = f"{_name}_{{}}_thousandths"
    _NAMES[f"{_name}_zero"] = f"baseline_{_name}_{{}}_thousandths"


_COLUMNS = (
    ("energy MAE", "meV/atom", "energy_mae_mev_per_atom"),
    ("per-element", "meV/atom", "baseline_energy_mae_mev_per_atom"),
    ("mean", "meV/atom", "mean_baseline_energy_mae_mev_per_atom"),
    ("force MAE", "meV/Å", "force_mae_mev_per_angstrom"),
    ("zero force", "meV/Å", "baseline_force_mae_mev_per_angstrom"),
    ("stress MAE", "meV/Å^3", "stress_mae_mev_per_cubic_angstrom"),
    ("zero stress", "meV/Å^3", "baseline_stress_mae_mev_per_cubic_angstrom"),
    *(
        (f"{word}{name}", f"m{keys.LABELS[name].unit}", _NAMES[name + end].format("mae"))
        for name in keys.OTHER_LABELS
        for word, end in (("", ""), ("zero ", "_zero"))
    ),
)


def format_table(groups: dict[str, dict[str, Any]], title: str = "source") -> str:
    """A plain-text table of mean absolute errors beside their baselines; empty columns left out."""
    columns = [c for c in _COLUMNS if any(c[2] in metrics for metrics in groups.values())]
    width = max([len(title), *map(len, groups)]) + 2
    header = f"{title:<{width}}{'structures':>11}" + "".join(f"{title:>13}" for title, _, _ in columns)
    rows = [header, " " * (width + 11) + "".join(f"{unit:>13}" for _, unit, _ in columns), "-" * len(header)]
    for group, metrics in groups.items():
        values = [f"{metrics[key]:>13.1f}" if key in metrics else f"{'-':>13}" for _, _, key in columns]
        rows.append(f"{group:<{width}}{metrics['num_test']:>11d}" + "".join(values))
    return "\n".join(rows)


MAX_POINTS = 3000  # of each kind, source and rank: more only darken the plot


class ParityPoints:
    """Labels and predictions of the first structures of each source; `add` batches, then `figure` on the
    main rank.

    Energies are per atom and after subtraction of the references, eV; forces are components, eV/Å.
    """

    def __init__(self, potential: Potential, context: ParallelContext) -> None:
        self.potential, self.context = potential, context
        # parts of one source each, with rows of (source, label, prediction)
        self.rows: dict[str, list[NDArray[np.float64]]] = {"energy": [], "forces": []}

    @torch.no_grad()
    def add(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
        has_B = batch[keys.HAS_ENERGY]
        reference_B = self.potential.model.reference_energy(batch)
        label_B = (batch[keys.ENERGY] - reference_B) / batch[keys.NUM_ATOMS]
        predicted_B = (outputs[keys.ENERGY] - reference_B) / batch[keys.NUM_ATOMS]
        self._add("energy", batch[keys.SOURCE][has_B], label_B[has_B], predicted_B[has_B])
        if keys.FORCES in outputs:
            free_N = free_atoms(batch)
            source_N = batch[keys.SOURCE][batch[keys.BATCH]][free_N].repeat_interleave(3)
            self._add(
                "forces",
                source_N,
                batch[keys.FORCES][free_N].flatten(),
                outputs[keys.FORCES][free_N].flatten(),
            )

    def _add(self, kind: str, source: Tensor, label: Tensor, predicted: Tensor) -> None:
        rows = torch.stack([source.double(), label.double(), predicted.double()], 1).cpu().numpy()
        for index in range(len(self.potential.statistics.sources)):
            have = sum(int((part[0, 0] == index) * len(part)) for part in self.rows[kind])
            chosen = rows[rows[:, 0] == index][: MAX_POINTS - have]
            if len(chosen):
                self.rows[kind].append(chosen)

    def figure(self) -> Any:
        """A matplotlib figure of all ranks' points on the main rank, None on the others; all must call it."""
        own = {kind: np.concatenate([np.zeros((0, 3)), *parts]) for kind, parts in self.rows.items()}
        gathered = gather_objects(own, self.context)
        if gathered is None:
            return None
        from matplotlib.figure import Figure  # needs a moment to import

        panels = [
            ("energy", "energy per atom without references, eV"),
            ("forces", "force components, eV/Å"),
        ]
        figure = Figure(figsize=(10, 5), layout="constrained")
        for axes, (kind, title) in zip(figure.subplots(1, 2), panels, strict=True):
            points = np.concatenate([part[kind] for part in gathered])
            for index, source in enumerate(self.potential.statistics.sources):
                _, label, predicted = points[points[:, 0] == index].T
                if len(label):
                    axes.plot(label, predicted, ".", markersize=3, alpha=0.4, label=source, rasterized=True)
            if len(points):
                ends = [points[:, 1:].min(), points[:, 1:].max()]
                axes.plot(ends, ends, color="black", linewidth=0.8)
                axes.legend(markerscale=4)
            axes.set(title=title, xlabel="label", ylabel="prediction")
        return figure

    def save(self, path: Path) -> None:
        figure = self.figure()
        if figure is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=120)
