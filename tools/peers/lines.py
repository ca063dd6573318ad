"""Results of the comparison: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import ase.io
import numpy as np

from megagnn.scaling.records import append_line
from tools.peers.contract import ENERGY, FORCES

Errors = dict[str, float]
"""energy_mae and energy_rmse in eV/atom, force_mae and force_rmse in eV/Å."""


@dataclass(frozen=True)
class Line:
    """One training and its errors."""

    program: str
    setting: str
    data: str
    """Name of the store."""
    minutes: float
    """Budget of processor minutes."""
    seed: int
    options: Sequence[str]
    seconds: float
    """Processor seconds that the steps took, with their batches."""
    epochs: int
    parameters: int
    errors: Mapping[str, Errors]
    """Of valid and test."""
    load: Sequence[float]
    """Processes that ran or waited on the machine, the mean of a minute, before the training and after it."""
    versions: Mapping[str, str]

    @property
    def key(self) -> tuple[str, str, str, float, int]:
        """What no two lines of a file have in common."""
        return self.program, self.setting, self.data, self.minutes, self.seed

    def append(self, path: Path) -> None:
        append_line(path, json.dumps(asdict(self), ensure_ascii=False))


def read_lines(path: Path) -> list[Line]:
    """All lines of a file, none where there is no file; a last line without an end is left out."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [Line(**json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines()]


def errors_of(frames: Path, predictions: Path) -> Errors:
    """Errors of predictions (`contract.save_predictions`) against the labels of the frames, as
    `megagnn evaluate` defines them: of energies per atom over structures, of forces over components.

    Raises:
        ValueError: they are not of the same atoms, or not finite.
    """
    labelled = ase.io.read(frames, index=":")
    energies = np.array([frame.info[ENERGY] for frame in labelled])
    forces = np.concatenate([frame.arrays[FORCES] for frame in labelled])
    with np.load(predictions) as found:
        if found["energies"].shape != energies.shape or found["forces"].shape != forces.shape:
            raise ValueError(
                f"{predictions} holds {len(found['energies'])} energies and forces of {len(found['forces'])} "
                f"atoms, {frames} has {len(energies)} and {len(forces)}; predict these frames, in their order"
            )
        num_atoms = np.array([len(frame) for frame in labelled])
        differences = {
            "energy": (found["energies"] - energies) / num_atoms,
            "force": found["forces"] - forces,
        }
    errors = {}
    for name, difference in differences.items():
        if not np.isfinite(difference).all():
            raise ValueError(f"{predictions} holds {name} values that are not finite: the training diverged")
        errors[f"{name}_mae"] = float(np.abs(difference).mean())
        errors[f"{name}_rmse"] = float(np.square(difference).mean() ** 0.5)
    return errors
