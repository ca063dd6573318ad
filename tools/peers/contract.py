"""What every program of the comparison is asked and leaves behind; for environments without megagnn.

    python -m tools.peers.PROGRAM --frames FOLDER --out FOLDER --epochs N --seed S [OPTION...]

trains on FOLDER/train.xyz, chooses by valid.xyz, and leaves `result.json` and, of the final model,
`valid.npz` and `test.npz`: energies (S,) in eV and forces (N, 3) in eV/Å of all atoms, in the order of the
frames. What it does not know are options of the program itself. `tools.peers.PROGRAM.calculator(FOLDER)` is
the calculator of that model, as the program's documentation recommends it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import ase.io
import numpy as np
from ase.calculators.calculator import Calculator

from tools.peers.clock import StepClock

ENERGY, FORCES = "REF_energy", "REF_forces"
"""Names of the labels in the frames, which no reader takes for a calculator's results."""
JUDGED = ("valid", "test")


@dataclass(frozen=True)
class Result:
    """Of one training."""

    seconds: list[float]
    """Processor seconds of each epoch's steps with their batches; validation is not in them."""
    parameters: int
    versions: dict[str, str]
    step_seconds: list[float] = field(default_factory=list)
    """By the wall, of each step without the loading of its batch."""
    peak_bytes: float = 0.0
    """See `StepClock`."""

    @classmethod
    def of(
        cls, seconds: Iterable[float], steps: StepClock, parameters: int, versions: dict[str, str]
    ) -> Result:
        return cls([*seconds], parameters, versions, steps.seconds, steps.peak_bytes)

    def save(self, folder: Path) -> None:
        (folder / "result.json").write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Result:
        return cls(**json.loads((folder / "result.json").read_text()))


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all programs have in common."""
    made = argparse.ArgumentParser(description=description, allow_abbrev=False)
    made.add_argument("--frames", type=Path, required=True, help="folder of train.xyz, valid.xyz, test.xyz")
    made.add_argument("--out", type=Path, required=True, help="an empty folder")
    made.add_argument("--epochs", type=int, required=True)
    made.add_argument("--seed", type=int, required=True)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--profile-step", type=int, help="number of a step whose memory is wanted")
    return made


def versions(*packages: str) -> dict[str, str]:
    """Versions of the packages in this environment."""
    return {name: version(name) for name in packages}


def predict(calculator: Calculator, frames: Path, out: Path) -> None:
    """Write what a calculator of ASE predicts for the validation and test frames."""
    for split in JUDGED:
        energies, forces = [], []
        for frame in ase.io.iread(frames / f"{split}.xyz"):
            frame.calc = calculator
            energies.append(frame.get_potential_energy())
            forces.append(frame.get_forces())
        save_predictions(out, split, energies, forces)


def save_predictions(out: Path, split: str, energies: Iterable[float], forces: Iterable[np.ndarray]) -> None:
    """Energies (S,) and the forces (N_s, 3) of each structure, as `errors_of` reads them."""
    arrays = {"energies": np.array(list(energies), "f8"), "forces": np.concatenate([*forces]).astype("f8")}
    np.savez(out / f"{split}.npz", **arrays)
