"""The command `megagnn export`: a checkpoint as one safetensors file."""

import argparse
from pathlib import Path

from megagnn.checkpoint.single_file import WEIGHTS, everything, load_checkpoint, save_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megagnn export`."""
    parser.add_argument("checkpoint", type=Path, help="a run's checkpoints/best, checkpoints/last, ...")
    parser.add_argument("out", type=Path, metavar="OUT.safetensors", help="the file to write")
    parser.add_argument(
        "--optimizer",
        action="store_true",
        help="with the optimizer's state, so that `megagnn import` makes a checkpoint to go on from",
    )


def run(arguments: argparse.Namespace) -> int:
    """`megagnn export CHECKPOINT OUT.safetensors [--optimizer]`."""
    if arguments.out.suffix != ".safetensors":
        raise ValueError(f"the file must end in .safetensors, got {arguments.out}")
    export_checkpoint(arguments.checkpoint, arguments.out, arguments.optimizer)
    print(f"wrote {arguments.out}")
    return 0


def export_checkpoint(checkpoint: Path, out: Path, optimizer: bool = False) -> None:
    """Write a checkpoint as one file: weights, their average and, if asked for, the optimizer's state.

    Takes the memory of all that is written. Raises as `load_checkpoint`, and ValueError if the checkpoint has
    no optimizer's state.
    """
    loaded = load_checkpoint(checkpoint, optimizer)
    kinds = everything(loaded.config) if optimizer else WEIGHTS
    tensors = {name: t for name, t in loaded.tensors.items() if name.split("/")[0] in kinds}
    absent = sorted(set(kinds) - {name.split("/")[0] for name in tensors})
    if absent:
        raise ValueError(f"{checkpoint} does not hold {', '.join(absent)}; export without --optimizer")
    save_checkpoint(out, loaded.config, loaded.statistics, loaded.progress, tensors)
