"""The command `megagnn import`: a single file to a checkpoint that a run continues from."""

import argparse
import dataclasses
from pathlib import Path

from torch import Tensor

from megagnn.checkpoint.folder import checkpoint_steps, folder_name
from megagnn.checkpoint.progress import Progress
from megagnn.checkpoint.single_file import Checkpoint, everything, load_checkpoint
from megagnn.checkpoint.writer import CheckpointStore
from megagnn.models.potential import build_potential
from megagnn.optim.config import OptimConfig
from megagnn.optim.optimizer import make_optimizer
from megagnn.optim.pieces import Piece
from megagnn.optim.rules.adamw import ADAMW
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import ParameterLayout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megagnn import`."""
    parser.add_argument("file", type=Path, help="a file of `megagnn export --optimizer`")
    parser.add_argument(
        "out_dir", type=Path, help="folder of a run, which `megagnn train --resume` continues"
    )


def run(arguments: argparse.Namespace) -> int:
    """`megagnn import FILE.safetensors OUT_DIR`."""
    print(f"wrote {import_checkpoint(arguments.file, arguments.out_dir)}")
    return 0


def import_checkpoint(file: Path, out_dir: Path) -> Path:
    """Write the checkpoint of a file into a run's folder; returns its path.

    Raises:
        ValueError: the file lacks the optimizer's state, or the folder has checkpoints already.
    """
    checkpoint = load_checkpoint(file, optimizer=True)
    tensors, progress = _named(checkpoint)
    absent = sorted(set(everything(checkpoint.config)) - {name.split("/")[0] for name in tensors})
    if absent:
        raise ValueError(
            f"{file} does not hold {', '.join(absent)}: no run can go on from it; export it with --optimizer"
        )
    folder = out_dir / "checkpoints"
    if checkpoint_steps(folder):
        raise ValueError(f"{folder} has checkpoints already; choose another out_dir")
    store = CheckpointStore(folder, ParallelContext(), asynchronous=False)
    pieces = [
        Piece(*_name_and_kind(key), ParameterLayout(tuple(t.shape)), 0, t.numel(), t.reshape(-1), True)
        for key, t in tensors.items()
    ]
    store.save(pieces, checkpoint.config, checkpoint.statistics, progress)
    return folder / folder_name(progress.step)


def _named(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], Progress]:
    """{"KIND/NAME": tensor}, and the progress of a run that starts with this checkpoint alone."""
    progress = checkpoint.progress
    if progress.best_step != progress.step:  # the best is another, which is not here
        progress = dataclasses.replace(progress, best_step=None, best_loss=float("inf"))
    tensors = {
        n: t for n, t in checkpoint.tensors.items() if n.split("/")[0] in everything(checkpoint.config)
    }
    numbered = {n: t for n, t in checkpoint.tensors.items() if n.startswith("optimizer/")}
    if numbered:  # format 1
        progress = dataclasses.replace(progress, optimizer_steps=progress.step)
        model = build_potential(checkpoint.config.model, checkpoint.statistics).model
        names = {p: name for name, p in model.named_parameters()}
        order = [p for group in make_optimizer(model, OptimConfig()).param_groups for p in group["params"]]
        for key, tensor in numbered.items():
            _, index, kind = key.split("/")
            if kind in ADAMW.state:
                tensors[f"{kind}/{names[order[int(index)]]}"] = tensor
    return tensors, progress


def _name_and_kind(key: str) -> tuple[str, str]:
    kind, name = key.split("/", 1)
    return name, kind
