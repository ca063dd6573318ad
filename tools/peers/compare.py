"""Trains the programs of settings.toml on a store's frames, each for the same processor time.

One after another; each is planned by a trial of a few epochs just before it, for as many epochs as fit the
budget, over which the program's own schedule runs. Results are lines of JSON; what has a line is left out.

    python -m tools.peers.compare runs/data/mlearn-Si --results runs/peers/mlearn-Si.jsonl --minutes 6
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from megagnn.data.store import Store
from megagnn.scaling.records import slug
from tools.peers.clock import epochs_within
from tools.peers.contract import JUDGED, Result
from tools.peers.frames import write_splits
from tools.peers.lines import Line, errors_of, read_lines

ROOT = Path(__file__).parents[2]
SETTINGS = Path(__file__).with_name("settings.toml")


@dataclass(frozen=True)
class Training:
    """One program with one setting, budget and seed."""

    program: str
    setting: str
    options: tuple[str, ...]
    """As in settings.toml, where {store} stands for the data set's path."""
    minutes: float
    seed: int
    store: Path
    folder: Path
    """Its own."""

    def run(self, python: Path, frames: Path, trial_epochs: int) -> Line:
        """Plan, train and judge.

        Raises:
            ChildProcessError: the program failed.
            ValueError: the budget is too small, or see `errors_of`.
        """
        load = os.getloadavg()[0]
        trial = self._start(python, frames, "trial", trial_epochs)
        epochs = epochs_within(60 * self.minutes, trial.seconds)
        print(f"{self.folder}: {epochs} epochs", flush=True)
        result = self._start(python, frames, "whole", epochs)
        errors = {s: errors_of(frames / f"{s}.xyz", self.folder / "whole" / f"{s}.npz") for s in JUDGED}
        return Line(
            program=self.program,
            setting=self.setting,
            data=self.store.name,
            minutes=self.minutes,
            seed=self.seed,
            options=self.options,
            seconds=round(sum(result.seconds), 2),
            epochs=epochs,
            parameters=result.parameters,
            errors=errors,
            load=[load, os.getloadavg()[0]],
            versions=result.versions,
        )

    def _start(self, python: Path, frames: Path, part: str, epochs: int) -> Result:
        options = [option.replace("{store}", str(self.store)) for option in self.options]
        return train(
            self.program, python, frames, self.folder / part, ["--seed", str(self.seed), *options], epochs
        )


def train(
    program: str,
    python: Path,
    frames: Path,
    out: Path,
    options: Sequence[str],
    epochs: int,
    threads: int = 1,
) -> Result:
    """A training in a process and a folder of its own, by `contract`.

    Raises ChildProcessError: the program failed.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    command = [str(python), "-m", f"tools.peers.{program}", "--frames", str(frames), "--out", str(out)]
    command += ["--epochs", str(epochs), "--threads", str(threads), *options]
    with (out / "log.txt").open("w") as log:
        done = subprocess.run(command, cwd=ROOT, env=environment(threads), stdout=log, stderr=log)
    if done.returncode:
        raise ChildProcessError(f"{program} ended with status {done.returncode}; {out / 'log.txt'} tells why")
    return Result.load(out)


def environment(threads: int) -> dict[str, str]:
    """Variables of a program's process."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(names, str(threads)), "PYTHONPATH": str(ROOT)}


def python_of(program: str, environments: Path) -> Path:
    """This one for megagnn, and else the one of the program's own environment."""
    if program == "megagnn":
        return Path(sys.executable)
    return environments.resolve() / program / "bin/python"


def planned(arguments: argparse.Namespace) -> Iterator[Training]:
    """Every training that is asked for, of those that settings.toml knows.

    Raises:
        ValueError: a program or setting that it does not know.
    """
    known = tomllib.loads(arguments.file.read_text())
    programs = {name: {f"{name}/{key}" for key in table["settings"]} for name, table in known.items()}
    settings = set().union(*programs.values())
    for chosen in arguments.only or ():
        if chosen not in programs and chosen not in settings:
            raise ValueError(
                f"{arguments.file} has no '{chosen}'; it has {', '.join([*programs, *sorted(settings)])}"
            )
    for minutes in arguments.minutes:
        for seed in arguments.seeds:
            for program, table in known.items():
                for setting, options in table["settings"].items():
                    if arguments.only and not {program, f"{program}/{setting}"} & {*arguments.only}:
                        continue
                    given = (*table["options"], *options)
                    name = f"{slug(setting)}-{minutes:g}min-s{seed}"
                    folder = arguments.out / arguments.store.name / program / name
                    yield Training(program, setting, given, minutes, seed, arguments.store, folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Train what has no line yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path, help="a prepared data set")
    parser.add_argument("--results", type=Path, required=True, help="lines of results, appended to")
    parser.add_argument("--minutes", type=float, nargs="+", default=[6.0], help="budgets of processor time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", metavar="PROGRAM[/SETTING]", help="leave out all others")
    parser.add_argument("--trial-epochs", type=int, default=3)
    parser.add_argument("--file", type=Path, default=SETTINGS, help="programs and their settings")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"), help="folder of frames and trainings")
    parser.add_argument(
        "--environments", type=Path, default=Path("runs/peers/environments"), help="one of each program"
    )
    arguments = parser.parse_args(argv)
    arguments.out, arguments.store = arguments.out.resolve(), arguments.store.resolve()
    frames = arguments.out / arguments.store.name / "frames"
    write_splits(Store.open(arguments.store), frames)
    for training in planned(arguments):
        python = python_of(training.program, arguments.environments)
        key = (training.program, training.setting, training.store.name, training.minutes, training.seed)
        done = next((line for line in read_lines(arguments.results) if line.key == key), None)
        if done is None:
            training.run(python, frames, arguments.trial_epochs).append(arguments.results)
        elif tuple(done.options) != training.options:
            raise ValueError(
                f"{arguments.results} has {'/'.join(key[:2])} with {' '.join(done.options)}, and "
                f"{arguments.file} now has {' '.join(training.options)}; rename one of the settings"
            )
    return 0


if __name__ == "__main__":
    # so that the program that runs ends as well
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    raise SystemExit(main())
