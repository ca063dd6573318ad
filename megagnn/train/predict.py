"""The command `megagnn predict`: energies, forces, stress and atomic energies of the frames of a file."""

import argparse
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ase
import numpy as np
from tqdm import tqdm

from megagnn.checkpoint.single_file import open_checkpoint
from megagnn.data import keys
from megagnn.data.batch import Graph
from megagnn.data.formats import (
    ReadOptions,
    Units,
    detect_format,
    parse_species,
    parse_units,
    read_structures,
)
from megagnn.data.formats.ase_files import read_frames
from megagnn.data.record import Structure
from megagnn.launch.context import parallel_context
from megagnn.train.predicted_frames import check_format, output_format, with_predictions, write_frames
from megagnn.train.predictor import Predictor, Results

MAX_WARNINGS = 5
Frame = tuple[int, ase.Atoms, Graph]
"""Number of a frame in its file, the frame, and the graph made of it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megagnn predict`."""
    parser.description = (
        "Energies (eV), forces (eV/Å), stress (eV/Å^3, of frames periodic in three directions) and atomic "
        "energies (eV) of every frame of a file. In OUT they are the results of ASE's names: energy, forces, "
        "stress; atomic energies are the array atomic_energies in extended XYZ, atomic_energies in the data "
        "of a database, and the result energies in other formats. Labels that FILE has under these names are "
        "kept as REF_energy, REF_forces, ..., so that they cannot be confused with predictions; labels under "
        "names of their own stay as they are."
    )
    parser.add_argument("checkpoint", type=Path, help="a run's checkpoints/best, or an exported file")
    parser.add_argument("file", type=Path, metavar="FILE", help="structures, any file that prepare reads")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="OUT", help="any file ASE writes, .extxyz first"
    )
    parser.add_argument(
        "--out-format", metavar="NAME", help="ASE's name of its format (default: by its ending)"
    )
    parser.add_argument("--ase-format", metavar="NAME", help="ASE's name of the format of FILE")
    parser.add_argument("--species", help="elements of species or types of FILE, as prepare takes them")
    parser.add_argument(
        "--units",
        metavar="QUANTITY=UNIT,...",
        help="units of FILE where they are others than eV and Å, as prepare takes them (length=bohr); OUT is "
        "in eV and Å, labels kept as REF_energy, REF_forces, ... included",
    )
    parser.add_argument("--source", help="source whose reference energies apply, if the model has several")
    parser.add_argument("--level", help="level of theory, if the source has several")
    parser.add_argument(
        "--skip-unknown",
        action="store_true",
        help="leave frames with elements that the model does not know out, count them, and give each frame "
        "written its number in FILE, from 0, as input_frame",
    )
    parser.add_argument("--max-atoms", type=int, metavar="N", help="of a batch (default: as in training)")
    parser.add_argument("--max-edges", type=int, metavar="N", help="of a batch (default: as in training)")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64", help="default: float64")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there already")


def run(arguments: argparse.Namespace) -> int:
    """`megagnn predict CHECKPOINT FILE --out OUT`: write the frames with predictions, say how many."""
    file, out = arguments.file, arguments.out
    for name in ("max_atoms", "max_edges"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    if out.exists() and (out.is_dir() or not arguments.overwrite):
        raise ValueError(f"{out} exists; add --overwrite to replace a file, or choose another --out")
    if out.exists() and file.exists() and out.samefile(file):
        raise ValueError(f"--out {out} is the input file; choose another file for the predictions")
    species = {} if arguments.species is None else parse_species(arguments.species)
    units = Units() if arguments.units is None else parse_units(arguments.units)
    options = ReadOptions(ase_format=arguments.ase_format, species=species, units=units)
    format = output_format(out, arguments.out_format)
    checkpoint = open_checkpoint(arguments.checkpoint)
    data = checkpoint.config.data
    with parallel_context(arguments.device, arguments.threads) as context:
        if context.world_size > 1:
            raise ValueError(
                f"predict works in one process, got {context.world_size} ranks; start it without torchrun, "
                "once for each part of the file"
            )
        predictor = Predictor(
            checkpoint, arguments.source, arguments.level, arguments.dtype, str(context.device)
        )
        lost = check_format(out, format, predictor.has_forces, predictor.has_stress)
        if lost:
            print(f"note: files of the format '{format}' do not hold: {', '.join(lost)}", file=sys.stderr)
        budget = (arguments.max_atoms or data.max_atoms, arguments.max_edges or data.max_edges)
        tally = Tally(file)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            frames = predicted(file, options, predictor, budget, arguments.skip_unknown, format, tally)
            write_frames(out, frames, format)
    print(f"wrote {out}: {tally}")
    told = list(dict.fromkeys(str(one.message) for one in caught if one.category is UserWarning))
    for line in told[:MAX_WARNINGS]:
        print(f"warning: {line}", file=sys.stderr)
    if len(told) > MAX_WARNINGS:
        print(f"warning: {len(told) - MAX_WARNINGS:,} more of the kind", file=sys.stderr)
    return 0


@dataclass
class Tally:
    """Counts of what was predicted and what left out, for the last line."""

    file: Path
    frames: int = 0
    atoms: int = 0
    with_stress: int = 0
    forces: bool = False
    unknown: int = 0
    symbols: set[str] = field(default_factory=set)

    def count(self, results: Results) -> None:
        self.frames, self.atoms = self.frames + 1, self.atoms + len(results["energies"])
        self.with_stress += "stress" in results
        self.forces = "forces" in results

    def __str__(self) -> str:
        what = "energies and forces" if self.forces else "energies"
        line = f"{what} of {self.frames:,} frame(s), {self.atoms:,} atom(s)"
        if self.with_stress:
            line += f"; stress of {self.with_stress:,}"
        if self.unknown:
            elements = ", ".join(sorted(self.symbols))
            line += (
                f"\nleft out {self.unknown:,} frame(s) with elements that the model does not know: {elements}"
            )
        return line


def predicted(
    file: Path,
    options: ReadOptions,
    predictor: Predictor,
    budget: tuple[int, int],
    skip_unknown: bool,
    format: str,
    tally: Tally,
) -> Iterator[ase.Atoms]:
    """The frames of a file with predictions, in their order, batch by batch.

    Args:
        options: of the reader; names of species, units and ASE's name of the format.
        budget: atoms and edges of a batch; a larger frame makes one of its own.
        skip_unknown: leave frames with unknown elements out.
        format: of the output, see `with_predictions`.
        tally: counts.

    Raises:
        ValueError: an unreadable file or one without frames, or a frame that cannot be predicted, by number.
    """
    graphs = _graphs(file, options, predictor, skip_unknown, tally)
    with tqdm(desc="predict", unit=" frames", file=sys.stderr, disable=None) as bar:
        for batch in _batches(graphs, budget):
            found = predictor.results([graph for _, _, graph in batch])
            for (number, atoms, _), results in zip(batch, found, strict=True):
                if not all(np.isfinite(value).all() for value in results.values()):
                    raise ValueError(
                        f"{file}, frame {number}: the prediction is not finite; look at the frame for atoms "
                        "on one place"
                    )
                tally.count(results)
                bar.update()
                yield with_predictions(atoms, results, format, number if skip_unknown else None)
    if not tally.frames:
        left = f" that the model knows, of {tally.unknown}" if tally.unknown else ""
        raise ValueError(f"{file} holds no frames{left}; nothing to predict")


def _batches(frames: Iterator[Frame], budget: tuple[int, int]) -> Iterator[list[Frame]]:
    batch: list[Frame] = []
    used = [0, 0]
    for frame in frames:
        size = [len(frame[1]), frame[2][keys.EDGE_INDEX].shape[1]]
        if batch and any(u + s > most for u, s, most in zip(used, size, budget, strict=True)):
            yield batch
            batch, used = [], [0, 0]
        batch.append(frame)
        used = [u + s for u, s in zip(used, size, strict=True)]
    if batch:
        yield batch


def _graphs(
    file: Path, options: ReadOptions, predictor: Predictor, skip_unknown: bool, tally: Tally
) -> Iterator[Frame]:
    known = set(predictor.statistics.source_elements[predictor.source_index])
    for number, atoms in _frames(file, options):
        unknown = {s for s, z in zip(atoms.symbols, atoms.numbers, strict=True) if int(z) not in known}
        if unknown and skip_unknown:
            tally.unknown += 1
            tally.symbols |= unknown
            continue
        way_out = "leave such frames out with --skip-unknown"
        yield number, atoms, predictor.graph(atoms, f"{file}, frame {number}", way_out)


def _frames(file: Path, options: ReadOptions) -> Iterator[tuple[int, ase.Atoms]]:
    """Number and atoms of each frame of any file that `prepare` reads, labelled or not."""
    format = "ase" if options.ase_format and file.exists() else detect_format(file)
    if format == "store":
        raise ValueError(f"{file} is a packed store; `megagnn evaluate` takes stores, predict takes files")
    if format == "ase":
        yield from read_frames(file, options)
        return
    for number, structure in enumerate(read_structures(file, options, format)):
        yield number, _atoms_of(structure)


def _atoms_of(structure: Structure) -> ase.Atoms:
    atoms = ase.Atoms(structure.atomic_numbers, structure.positions, cell=structure.cell, pbc=structure.pbc)
    if structure.energy is not None:
        atoms.info["REF_energy"] = structure.energy
    if structure.forces is not None:
        atoms.new_array("REF_forces", structure.forces)
    if structure.stress is not None:
        atoms.info["REF_stress"] = structure.stress
    if structure.config_type:
        atoms.info["config_type"] = structure.config_type
    return atoms
