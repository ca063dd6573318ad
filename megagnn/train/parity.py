"""The parity plot: predictions against labels, energies and forces, one colour per source."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megagnn.data import keys
from megagnn.models.potential import Potential
from megagnn.objective.loss import free_atoms
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.world import gather_objects

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
        """Take one batch."""
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
        """Draw and write the figure; the file's ending chooses the format."""
        figure = self.figure()
        if figure is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=120)
