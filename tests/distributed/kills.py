"""kill -9 of random ranks at random moments, in training and in the middle of saves; then resume, to the end.

    OMP_NUM_THREADS=1 python -m tests.distributed.kills --kills 20 --ranks 2
    OMP_NUM_THREADS=1 python -m tests.distributed.kills --kills 20 --ranks 4 --tensor 2 --stage 3

Trains once undisturbed, and then with kills, until there were enough of them (one run after another where a
run ends first). The final checkpoints must be the same, bit for bit. Every other kill waits for a save to
begin; saves are made slow, by pauses before each of their parts, so that kills hit all of them. Ranks are
forks of this process, which has imported everything, and are ended as torchrun does: SIGTERM, later SIGKILL.
"""

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from megagnn import cli
from megagnn.checkpoint import manifest as checkpoint_manifest
from megagnn.checkpoint import writer as checkpoint_store
from megagnn.checkpoint.folder import checkpoint_steps
from megagnn.checkpoint.single_file import load_checkpoint
from megagnn.train.trainer import Trainer
from tests import runs
from tests.distributed.ranks import free_port

EVERY = 3  # steps between checkpoints
PAUSE = 0.1  # seconds before each part of a save, at most
OTHERS_SECONDS = 30.0  # that the others have to end after SIGTERM
START_SECONDS = 300.0  # of ranks that should begin to train
SLOW = [
    (checkpoint_store, "save_parts"),
    (checkpoint_store, "_leave"),
    (checkpoint_manifest, "write_durably"),
    (checkpoint_store, "point_links"),
    (checkpoint_store, "rotate"),
]


@dataclass
class Kill:
    """One of them, as it was seen from outside."""

    rank: int
    wanted: str
    seconds: float
    """After the ranks were started."""
    found: str
    """What the folder of checkpoints looked like."""


class Harness:
    """Starts ranks of one configuration, and kills them."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.folder, self.ranks = folder, arguments.ranks
        self.rng = random.Random(arguments.seed)
        (folder / "config.toml").write_text(runs.CONFIG)
        store = runs.write_data(folder / "store")
        options = {
            "data.paths": store,
            "data.max_atoms": 40,
            "train.num_steps": arguments.steps,
            "train.checkpoint_every": EVERY,
            "train.device": "cpu",
            "train.export_best": "false",
            "parallel.tensor": arguments.tensor,
            "parallel.zero_stage": arguments.stage,
            "optim.rule": arguments.rule,
        }
        self.command = ["train", str(folder / "config.toml")]
        self.command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
        self.kills: list[Kill] = []

    def start(self, out_dir: Path, slow: bool = True) -> list[BaseProcess]:
        """All ranks of a run that goes on, or begins."""
        port, fork = free_port(), multiprocessing.get_context("fork")
        command = [*self.command, "--out_dir", str(out_dir), "--resume"]
        processes = []
        for rank in range(self.ranks):
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
            environment |= {"WORLD_SIZE": str(self.ranks), "LOCAL_RANK": str(rank)}
            seed = self.rng.random() if slow else None
            log = self.folder / f"rank-{rank}.log"
            processes.append(fork.Process(target=_rank, args=(environment, command, log, seed)))
        for process in processes:
            process.start()
        return processes

    def undisturbed(self, out_dir: Path) -> None:
        """A whole run. Raises RuntimeError if it fails."""
        processes = self.start(out_dir, slow=False)
        for process in processes:
            process.join()
        self._check_ends(processes)

    def disturbed(self, out_dir: Path, num_kills: int) -> None:
        """A run with kills until there were so many in all; then to its end."""
        while True:
            processes = self.start(out_dir)
            started, before = time.monotonic(), checkpoint_steps(out_dir / "checkpoints")[-1:]
            if len(self.kills) >= num_kills or not self._kill_one(processes, out_dir, started):
                for process in processes:
                    process.join()
                self._check_ends(processes)
                return
            after = checkpoint_steps(out_dir / "checkpoints")[-1:]
            kill = self.kills[-1]
            print(
                f"kill {len(self.kills):2d}: rank {kill.rank} after {kill.seconds:5.2f} s, {kill.found}; "
                f"newest checkpoint {before or 'none'} -> {after or 'none'}",
                flush=True,
            )

    def _kill_one(self, processes: list[BaseProcess], out_dir: Path, started: float) -> bool:
        """False if the run has ended first."""
        wanted = ("training", "saving")[len(self.kills) % 2]
        folder = out_dir / "checkpoints"
        newest = checkpoint_steps(folder)[-1:]
        old = set(_saves(folder))
        deadline = time.monotonic() + START_SECONDS
        begun = out_dir / "begun"
        while not begun.exists():  # training, from the newest checkpoint
            if not all(process.is_alive() for process in processes):
                break
            assert time.monotonic() < deadline, f"no step was done; see {self.folder}"
            time.sleep(0.005)
        number = self.rng.randrange(3)  # of the save that is hit
        while wanted == "saving" and all(process.is_alive() for process in processes):
            assert time.monotonic() < deadline, f"no save was begun; see {self.folder}"
            new = [name for name in _saves(folder) if name not in old]
            if len(new) > number or checkpoint_steps(folder)[-1:] > newest:
                break
            time.sleep(0.002)
        self._sleep(wanted)
        alive = [process for process in processes if process.is_alive()]
        if len(alive) < len(processes):
            if all(process.exitcode in (None, 0) for process in processes):
                return False
            self._check_ends(processes)
        rank = self.rng.randrange(self.ranks)
        processes[rank].kill()
        found = _describe(folder)
        self.kills.append(Kill(rank, wanted, time.monotonic() - started, found))
        processes[rank].join()
        _end(processes)
        begun.unlink(missing_ok=True)
        return True

    def _sleep(self, wanted: str) -> None:
        time.sleep(self.rng.uniform(0, 1.5 if wanted == "training" else 5 * PAUSE))

    def _check_ends(self, processes: list[BaseProcess]) -> None:
        codes = [process.exitcode for process in processes]
        if any(codes):
            logs = "\n".join((self.folder / f"rank-{rank}.log").read_text() for rank in range(self.ranks))
            raise RuntimeError(f"ranks ended with {codes}\n{logs[-5000:]}")


def _rank(environment: dict[str, str], command: list[str], log: Path, seed: float | None) -> None:
    """A rank's whole life."""
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    if seed is not None:
        rng = random.Random(seed)
        for module, name in SLOW:
            setattr(module, name, _paused(getattr(module, name), rng))
        original = Trainer._step

        def step(self: Trainer, *arguments: Any) -> bool:
            stop = original(self, *arguments)
            (self.out_dir / "begun").touch()
            return stop

        Trainer._step = step  # type: ignore[method-assign]
    sys.exit(cli.main(command))


def _paused(function: Any, rng: random.Random) -> Any:
    def paused(*arguments: Any, **named: Any) -> Any:
        time.sleep(rng.uniform(0, PAUSE))
        return function(*arguments, **named)

    return paused


def _saves(folder: Path) -> list[str]:
    """Folders of saves that are not committed."""
    return sorted(p.name for p in folder.glob(".step-*.tmp")) if folder.is_dir() else []


def _describe(folder: Path) -> str:
    """Where a save was when it was hit."""
    saves = _saves(folder)
    if not saves:
        return "between saves"
    try:
        names = sorted(p.name for p in (folder / saves[-1]).iterdir())
    except FileNotFoundError:
        return "in a save: just committed"
    if checkpoint_manifest.NAME in names:
        return "in a save: manifest written"
    files, markers = (sum(n.endswith(end) for n in names) for end in (".safetensors", ".json"))
    return f"in a save: {files} file(s), {markers} marker(s)"


def _end(processes: list[BaseProcess]) -> None:
    """The others, as torchrun ends them."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    deadline = time.monotonic() + OTHERS_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def compare(expected: Path, got: Path) -> int:
    """Number of tensors of two runs' last checkpoints, all equal bit for bit, and their progress.

    Raises AssertionError where they differ.
    """
    first, second = (load_checkpoint(run / "checkpoints" / "last", optimizer=True) for run in (expected, got))
    assert first.progress == second.progress, (first.progress, second.progress)
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), f"{name} differs in {got}"
    return len(first.tensors)


def main(arguments: argparse.Namespace, folder: Path) -> Counter[str]:
    """See the module; how many kills found what."""
    harness = Harness(folder, arguments)
    harness.undisturbed(folder / "whole")
    number = 0
    while len(harness.kills) < arguments.kills or number == 0:
        out_dir = folder / f"killed-{number}"
        harness.disturbed(out_dir, arguments.kills)
        num_tensors = compare(folder / "whole", out_dir)
        left = [p.name for p in (out_dir / "checkpoints").iterdir() if p.name.startswith(".")]
        assert not left, f"left behind: {left}"
        print(f"run {number}: {num_tensors} tensors and the progress equal those of the undisturbed run")
        number += 1
    found = Counter(kill.found.split(":")[0] for kill in harness.kills)
    ranks = Counter(kill.rank for kill in harness.kills)
    print(f"{len(harness.kills)} kills: {dict(found)}; of ranks {dict(sorted(ranks.items()))}")
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--rule", default="adamw")
    parser.add_argument("--steps", type=int, default=120, help="of a run")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="megagnn-kills-", ignore_cleanup_errors=True) as temporary:
        main(parse(), Path(temporary))
