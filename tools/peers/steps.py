"""Time and memory of whole training steps, each program by its own training loop on the same frames.

A step is forward, loss on energies and forces, backward, optimizer and average of weights, of one batch of 16
frames of 64 silicon atoms within 5 Å; the batch is there before. The settings are those of steps.toml.

    python -m tools.peers.steps --threads 1 --environments runs/peers/environments
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from ase.build import bulk

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from megagnn.data.record import Structure
from megagnn.data.store import Store, write_store
from megagnn.scaling.records import slug
from tools.peers.compare import python_of, train
from tools.peers.frames import write_splits

SETTINGS = Path(__file__).with_name("steps.toml")
FRAMES = 16
WARM_UP = 3
"""Steps that are left out of the median: the first ones compile and allocate, the last one is profiled."""
HEAD = ("program", "setting", "parameters", "threads", "step, ms", "of the first", "memory, MB")


@dataclass(frozen=True)
class Row:
    """The steps of one setting."""

    program: str
    setting: str
    parameters: int
    threads: int
    seconds: float
    """Median of the steps after the first WARM_UP, by the wall."""
    peak_bytes: float
    """The most that tensors held in a step above what they held before: activations and temporaries."""


def rattled_silicon(seed: int, repeat: int = 2) -> Structure:
    """A crystal of 8 repeat^3 atoms off their sites by 0.1 Å, with random labels: a step takes as long."""
    rng = np.random.default_rng(seed)
    atoms = bulk("Si", cubic=True).repeat(repeat)
    return Structure(
        atomic_numbers=atoms.numbers.astype(np.uint8),
        positions=atoms.positions + rng.normal(scale=0.1 / 3**0.5, size=(len(atoms), 3)),
        cell=atoms.cell.array,
        pbc=np.ones(3, dtype=bool),
        energy=float(rng.normal(scale=len(atoms) ** 0.5)),
        forces=rng.normal(size=(len(atoms), 3)),
        group=str(seed),
        source="Si",
        level="none",
    )


def write_frames(folder: Path, repeat: int = 2) -> tuple[Path, Path]:
    """The store and the frames of one batch for training, and one frame each for validation and test."""
    structures = [rattled_silicon(seed, repeat) for seed in range(FRAMES + 2)]
    sides = np.array([0] * FRAMES + [1, 2], np.uint8)
    write_store(folder / "store", structures, splits=sides, provenance={}, overwrite=True)
    write_splits(Store.open(folder / "store"), folder / "frames")
    return folder / "store", folder / "frames"


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Every setting of the file that is asked for, trained for a few steps.

    Raises:
        ChildProcessError: a program failed.
        ValueError: a batch did not hold all frames, so that an epoch was more than a step.
    """
    store, frames = write_frames(arguments.out, arguments.repeat)
    epochs = WARM_UP + arguments.steps
    for threads in arguments.threads:
        for program, table in tomllib.loads(arguments.file.read_text()).items():
            if arguments.only and program not in arguments.only:
                continue
            for setting, own in table["settings"].items():
                given = ["--seed", "0", "--profile-step", str(WARM_UP - 1)]
                given += [option.replace("{store}", str(store)) for option in (*own, *table["options"])]
                folder = arguments.out / program / slug(setting)
                python = python_of(program, arguments.environments)
                found = train(program, python, frames, folder, given, epochs, threads)
                if len(found.step_seconds) != epochs:
                    raise ValueError(
                        f"{program}, {setting}: {epochs} epochs must be as many steps, got "
                        f"{len(found.step_seconds)}; make the batch hold all {FRAMES} frames"
                    )
                seconds = statistics.median(found.step_seconds[WARM_UP:])
                yield Row(program, setting, found.parameters, threads, seconds, found.peak_bytes)


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown; times also in units of the first row's with as many threads."""
    lines = [HEAD, ["---"] * len(HEAD)]
    for row in rows:
        first = next(other for other in rows if other.threads == row.threads)
        sizes = (f"{row.parameters:,}", str(row.threads), f"{1e3 * row.seconds:.0f}")
        ends = (f"{row.seconds / first.seconds:.1f}", f"{row.peak_bytes / 1e6:.0f}")
        lines.append((row.program, row.setting, *sizes, *ends))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Train each setting for a few steps, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each setting (default 8)")
    parser.add_argument("--repeat", type=int, default=2, help="frames are of 8 times its cube atoms")
    parser.add_argument("--only", nargs="+", metavar="PROGRAM", help="leave out all others")
    parser.add_argument("--file", type=Path, default=SETTINGS, help="programs and their settings")
    parser.add_argument("--out", type=Path, default=Path("runs/peers/steps"), help="folder of the trainings")
    parser.add_argument("--json", type=Path, metavar="PATH", help="writes the rows there")
    parser.add_argument(
        "--environments", type=Path, default=Path("runs/peers/environments"), help="one of each program"
    )
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out.resolve()
    found = []
    for row in rows(arguments):
        print(f"{row.program}, {row.setting}: {1e3 * row.seconds:.0f} ms", flush=True)
        found.append(row)
    print(f"\n{table(found)}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
