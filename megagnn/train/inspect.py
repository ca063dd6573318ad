"""The command `megagnn inspect`: what a checkpoint, a data set or a bad batch holds."""

import argparse
import json
from pathlib import Path

from ase.data import chemical_symbols

from megagnn.checkpoint.folder import FolderCheckpoint
from megagnn.checkpoint.single_file import Checkpoint, load_potential, open_checkpoint
from megagnn.config import config_to_dict
from megagnn.train.bad_steps import describe_bad_batch, is_bad_batch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megagnn inspect`."""
    parser.add_argument(
        "path",
        type=Path,
        help="a checkpoint (a folder or a file), a bad batch (.safetensors), a packed store, or a file "
        "that `megagnn prepare` reads",
    )
    parser.add_argument(
        "--html", type=Path, metavar="PAGE", help="of a packed store: also write a page of figures"
    )
    parser.add_argument("--cutoff", type=float, metavar="Å", help="of edges on that page (default: 5)")
    parser.add_argument(
        "--sample",
        type=int,
        metavar="N",
        help="structures of each source on that page, at most (default: 5000)",
    )


def run(arguments: argparse.Namespace) -> int:
    """`megagnn inspect PATH [--html PAGE]`.

    Raises:
        ValueError: a page asked for of something else than a store, or its options without one.
    """
    is_store = arguments.path.is_dir() and (arguments.path / "header.json").is_file()
    options = {"cutoff": arguments.cutoff, "num_sampled": arguments.sample}
    given = {name: value for name, value in options.items() if value is not None}
    if arguments.html is None and given:
        raise ValueError("--cutoff and --sample are of the page of figures; add --html PAGE")
    if arguments.html is not None and not is_store:
        raise ValueError(
            f"--html draws a packed store, which {arguments.path} is not; make one with `megagnn prepare`"
        )
    if is_store:
        from megagnn.data.inspect import describe
        from megagnn.data.store import Store

        store = Store.open(arguments.path)
        print(describe(store))
        if arguments.html is not None:
            from megagnn.data.page import write_page

            write_page(store, arguments.html, **given)
            print(f"wrote {arguments.html}")
    elif is_bad_batch(arguments.path):
        print(describe_bad_batch(arguments.path))
    elif _is_data(arguments.path):
        from megagnn.data.inspect_file import describe_file

        print(describe_file(arguments.path))
    else:
        print(describe_checkpoint(open_checkpoint(arguments.path)))
    return 0


def _is_data(path: Path) -> bool:
    """Whether a path may be one that `megagnn prepare` reads, and is no checkpoint."""
    from megagnn.data.formats import detect_format

    if path.is_dir():
        return detect_format(path) != "ase"
    return path.is_file() and path.suffix != ".safetensors"


def describe_checkpoint(checkpoint: Checkpoint | FolderCheckpoint) -> str:
    """Readable summary: parameters by part, progress, statistics, configuration."""
    model = load_potential(checkpoint).model
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    statistics, progress = checkpoint.statistics, checkpoint.progress
    lines = [
        f"checkpoint   {checkpoint.path}",
        f"progress     step {progress.step} (epoch {progress.epoch}), "
        f"best validation loss {progress.best_loss:.6g}",
        f"parameters   {model.num_parameters():,} in {model.precision}: "
        + ", ".join(f"{name} {count:,}" for name, count in parts.items() if count),
        f"elements     {' '.join(chemical_symbols[z] for z in statistics.elements)}",
        f"levels       {', '.join(statistics.levels)}",
        f"neighbours   {statistics.mean_neighbours:.2f} per atom within {checkpoint.config.model.cutoff:g} Å",
        f"output scale {statistics.output_scale:.4f} eV/Å",
        "reference energies, eV (of the training split, isolated atoms or given):",
    ]
    shifts = statistics.shifts or (0.0,) * len(statistics.sources)
    for source, row, shift in zip(statistics.sources, statistics.references, shifts, strict=True):
        shown = [
            f"{chemical_symbols[z]} {e:.4f}"
            for z, e in zip(statistics.elements, row, strict=True)
            if e != 0.0
        ] + [f"each atom {shift:+.4f}"] * (shift != 0.0)
        lines.append(f"  {source}: {', '.join(shown)}")
    lines += ["configuration:", json.dumps(config_to_dict(checkpoint.config), indent=2)]
    return "\n".join(lines)
