"""PaiNN, trained by SchNetPack's own command `spktrain`; for an environment that has schnetpack.

Options are overrides of experiment/painn.yaml, as `model.representation.n_atom_basis=64`, and --final-rate R:
the rate then falls exponentially from its first value to R times that in the last epoch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import ase
import ase.io
import numpy as np
import torch
from torch.utils.data import dataloader

from tools.peers.contract import ENERGY, FORCES, Result, parser, predict, versions
from tools.peers.schnetpack_clock import EpochClock

if not hasattr(dataloader, "T_co"):  # a type's name that newer releases of torch lack and schnetpack imports
    dataloader.T_co = None
from schnetpack import cli
from schnetpack.data import ASEAtomsData
from schnetpack.interfaces import SpkCalculator
from schnetpack.transform import MatScipyNeighborList

SPLITS = {"train": "train_idx", "valid": "val_idx", "test": "test_idx"}


def convert(frames: Path, out: Path) -> dict[str, int]:
    """Write frames.db and split.npz; how many frames each split has."""
    units = {"energy": "eV", "forces": "eV/Ang"}
    data = ASEAtomsData.create(str(out / "frames.db"), distance_unit="Ang", property_unit_dict=units)
    indices, first = {}, 0
    for split in SPLITS:
        labelled = ase.io.read(frames / f"{split}.xyz", index=":")
        bare = [ase.Atoms(f.numbers, f.positions, cell=f.cell, pbc=f.pbc) for f in labelled]
        data.add_systems(
            [{"energy": np.array([f.info[ENERGY]]), "forces": f.arrays[FORCES]} for f in labelled], bare
        )
        indices[SPLITS[split]] = np.arange(first, first + len(labelled))
        first += len(labelled)
    np.savez(out / "split.npz", **indices)
    return {split: len(indices[name]) for split, name in SPLITS.items()}


def calculator(folder: Path) -> SpkCalculator:
    """That of a finished training."""
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # it saves and reads whole modules
    neighbours = MatScipyNeighborList(cutoff=5.0)
    return SpkCalculator(str(folder / "run/best_model"), neighbours, energy_unit="eV", position_unit="Ang")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and predict with the averaged weights of the checkpoint of the lowest validation loss."""
    arguments = parser(__doc__)
    arguments.add_argument("--final-rate", type=float, help="last learning rate by the first")
    known, options = arguments.parse_known_args(argv)
    torch.set_num_threads(known.threads)
    EpochClock.steps.profiled = known.profile_step
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # it saves and reads whole modules
    counts = convert(known.frames, known.out)
    if known.final_rate is not None:
        gamma = known.final_rate ** (1 / max(known.epochs - 1, 1))
        options += ["task.scheduler_cls=torch.optim.lr_scheduler.ExponentialLR", "~task.scheduler_args"]
        options += [f"+task.scheduler_args={{gamma: {gamma}}}", "task.scheduler_monitor=null"]
    sys.argv = ["spktrain", f"--config-dir={Path(__file__).parent}", "experiment=painn", "print_config=false"]
    sys.argv += [
        f"run.path={known.out}",
        "run.id=run",
        f"run.data_dir={known.out}",
        f"data.datapath={known.out / 'frames.db'}",
        f"+data.split_file={known.out / 'split.npz'}",
        f"data.num_train={counts['train']}",
        f"data.num_val={counts['valid']}",
        f"trainer.max_epochs={known.epochs}",
        f"+seed={known.seed}",
        *options,
    ]
    cli.train()
    trained = calculator(known.out)
    predict(trained, known.frames, known.out)
    parameters = sum(p.numel() for p in trained.model.parameters())
    used = EpochClock.seconds, EpochClock.steps
    Result.of(*used, parameters, versions("schnetpack", "torch")).save(known.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
