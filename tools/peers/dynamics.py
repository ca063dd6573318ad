"""Time of a program's calculator in molecular dynamics of silicon crystals; for environments without megagnn.

    python -m tools.peers.dynamics PROGRAM FOLDER --sizes 8 64 --threads 1 --seconds 5

prints a line of JSON for each size: `atoms`, `seconds` of a step by the wall, the median, and `steps`. FOLDER
is what `contract` says of --out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import units
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.md.verlet import VelocityVerlet

WARM_UP = 3


def crystal(num_atoms: int) -> Any:
    """A cubic crystal of silicon, periodic, with velocities of 300 K.

    Raises ValueError for a number of atoms that makes no cube of its cell of eight.
    """
    repeat = round((num_atoms / 8) ** (1 / 3))
    if 8 * repeat**3 != num_atoms:
        raise ValueError(f"crystals have 8, 64, 216, 512, 1000, ... atoms, got {num_atoms}")
    atoms = bulk("Si", cubic=True).repeat(repeat)
    spread = np.sqrt(atoms.get_masses() * units.kB * 300)[:, None]
    atoms.set_momenta(spread * np.random.default_rng(0).normal(size=(num_atoms, 3)))
    return atoms


def time_of_steps(calculator: Calculator, num_atoms: int, seconds: float) -> dict[str, float]:
    """Steps of 1 fs at constant energy for so many seconds, five at the least, after a few that do not count.

    Every step is one call of the calculator, with new neighbours, and ASE's own work.
    """
    atoms = crystal(num_atoms)
    atoms.calc = calculator
    dynamics = VelocityVerlet(atoms, timestep=1.0 * units.fs)
    dynamics.run(WARM_UP)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        dynamics.run(1)
        times.append(time.perf_counter() - start)
    return {"atoms": num_atoms, "seconds": statistics.median(times), "steps": len(times)}


def main(argv: Sequence[str] | None = None) -> int:
    """Time one program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("program")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    calculator = importlib.import_module(f"tools.peers.{arguments.program}").calculator(arguments.folder)
    for size in arguments.sizes:
        print(json.dumps(time_of_steps(calculator, size, arguments.seconds)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
