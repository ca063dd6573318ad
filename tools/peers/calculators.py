"""Time per atom and step of the programs' calculators, in dynamics of silicon crystals: dynamics.py of each.

A model is given as PROGRAM=FOLDER, the folder of a finished training (contract.py), such as `whole` of one by
compare.py. `--rounds` times all of them in turns, and takes each one's fastest round.

    python -m tools.peers.calculators megagnn=runs/peers/mlearn-Si/megagnn/mlearn-toml-6min-s0/whole \\
        mace=runs/peers/mlearn-Si/mace/defaults-6min-s0/whole --threads 1
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tools.peers.compare import ROOT, environment, python_of

Times = dict[int, float]
"""Seconds of a step by number of atoms."""


def times_of(program: str, folder: Path, threads: int, arguments: argparse.Namespace) -> Times:
    """One round of a program, in its own environment.

    Raises ChildProcessError: the program failed.
    """
    command = [str(python_of(program, arguments.environments)), "-m", "tools.peers.dynamics", program]
    command += [str(folder.resolve()), "--threads", str(threads), "--seconds", str(arguments.seconds)]
    command += ["--sizes", *map(str, arguments.sizes)]
    done = subprocess.run(command, cwd=ROOT, env=environment(threads), capture_output=True, text=True)
    if done.returncode:
        raise ChildProcessError(f"{program} ended with status {done.returncode}: {done.stderr[-2000:]}")
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"atoms"')]
    return {line["atoms"]: line["seconds"] for line in found}


def table(times: dict[tuple[int, str], Times]) -> str:
    """Microseconds per atom and step in Markdown, by (threads, program)."""
    sizes = list(next(iter(times.values())))
    lines = [["threads", "program", *(f"{size:,} atoms" for size in sizes)], ["---"] * (2 + len(sizes))]
    for (threads, program), found in times.items():
        lines.append([str(threads), program, *(f"{1e6 * found[size] / size:.0f}" for size in sizes)])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Time all models, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="PROGRAM=FOLDER")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each size in a round (default 5)")
    parser.add_argument(
        "--environments", type=Path, default=Path("runs/peers/environments"), help="one of each program"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the results as lines of JSON")
    arguments = parser.parse_args(argv)
    models = [model.partition("=")[::2] for model in arguments.models]
    if wrong := [program for program, folder in models if not folder]:
        parser.error(f"a model is PROGRAM=FOLDER, got '{wrong[0]}'")
    best: dict[tuple[int, str], Times] = {}
    for threads in arguments.threads:
        for _ in range(arguments.rounds):
            for program, folder in models:
                found = times_of(program, Path(folder), threads, arguments)
                before = best.get((threads, program), found)
                best[threads, program] = {size: min(found[size], before[size]) for size in found}
    print(table(best))
    if arguments.json:
        with arguments.json.open("a") as file:
            for (threads, program), found in best.items():
                line = {"program": program, "threads": threads, "seconds": found}
                file.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
