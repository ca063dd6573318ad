"""The command `megagnn sweep`: runs packed onto the cores, or one of them for a job array."""

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import IO

from tqdm import tqdm

from megagnn.parallel.context import ParallelContext
from megagnn.scaling.sweep import PlannedRun, Sweep, describe, load_sweep
from megagnn.scaling.sweep_run import run_one
from megagnn.train.run_lock import locked

POLL_SECONDS = 0.2
PR_SET_PDEATHSIG = 1  # linux/prctl.h
GRACE_SECONDS = 20.0  # of a terminated run, before it is killed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megagnn sweep`."""
    parser.add_argument("sweep", type=Path, metavar="SWEEP.toml", help="the table of runs")
    parser.add_argument(
        "--index",
        type=int,
        metavar="K",
        help="run only the K-th, in this process or on torchrun's ranks (Slurm array: its task's number)",
    )
    parser.add_argument("--processes", type=int, metavar="N", help="runs at a time (default: the file's)")
    parser.add_argument("--die-with-parent", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true", help="print the runs and their state, and stop")


def run(arguments: argparse.Namespace) -> int:
    """`megagnn sweep SWEEP.toml [--index K | --list] [--processes N]`; 1 where a run failed."""
    sweep = load_sweep(arguments.sweep)
    if arguments.list:
        print(describe(sweep))
        return 0
    if arguments.index is not None:
        if arguments.die_with_parent:
            _die_with_parent()
        if not 0 <= arguments.index < len(sweep.runs):
            raise ValueError(f"--index must lie in 0..{len(sweep.runs) - 1}, got {arguments.index}")
        run_one(sweep, sweep.runs[arguments.index])
        return 0
    if arguments.processes is not None and arguments.processes < 1:
        raise ValueError(f"--processes must be at least 1, got {arguments.processes}")
    with locked(sweep.out_dir, ParallelContext(), "start single runs by --index"):
        return run_all(sweep, arguments.processes or sweep.processes)


class _Stopped(KeyboardInterrupt):
    """A signal asked to stop."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped


def run_all(sweep: Sweep, processes: int) -> int:
    """Run what has no result yet, so many at a time; a failing run does not stop the others.

    Interrupted or terminated, it ends its runs; the next call continues them from their checkpoints.
    """
    waiting = sweep.pending()
    if processes > 1:  # the largest first, so that none is left over at the end
        waiting.sort(key=lambda k: -sweep.runs[k].work)
    total = sum(sweep.runs[k].work for k in waiting)
    num_done = len(sweep.runs) - len(waiting)
    running: dict[int, subprocess.Popen[bytes]] = {}
    failed: list[PlannedRun] = []
    previous = signal.signal(signal.SIGTERM, _stop)
    # by work, not by runs: the large ones take most of the time
    layout = "sweep: {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left{postfix}"
    interval = 0.5 if sys.stderr.isatty() else 30.0
    try:
        with tqdm(total=total, bar_format=layout, mininterval=interval, maxinterval=interval) as bar:
            while waiting or running:
                while waiting and len(running) < processes:
                    index = waiting.pop(0)
                    running[index] = _start(sweep, index)
                time.sleep(POLL_SECONDS)
                for index in [k for k, process in running.items() if process.poll() is not None]:
                    code = running.pop(index).returncode
                    done = sweep.runs[index]
                    num_done += code == 0
                    if code != 0:
                        failed.append(done)
                        bar.write(f"failed: {done.name}, {_last_line(done)}", file=sys.stderr)
                    bar.set_postfix_str(f"{num_done} of {len(sweep.runs)} runs done", refresh=False)
                    bar.update(done.work)
    finally:
        _end(list(running.values()))
        signal.signal(signal.SIGTERM, previous)
    print(f"{num_done} of {len(sweep.runs)} runs done: {sweep.results}")
    if failed:
        print(f"{len(failed)} failed; fix the cause and call this again: {', '.join(r.name for r in failed)}")
    return 1 if failed else 0


def _start(sweep: Sweep, index: int) -> subprocess.Popen[bytes]:
    folder = sweep.runs[index].out_dir
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "megagnn", "sweep", str(sweep.path), "--index", str(index)]
    command.append("--die-with-parent")
    environment = {**os.environ, "OMP_NUM_THREADS": str(sweep.threads)}
    with open(_log(sweep.runs[index]), "ab") as log:
        # a group of its own: Ctrl-C reaches this process alone, which then ends its runs in order
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _die_with_parent() -> None:
    """Linux: end this run when the sweep that started it is killed, so that it can be started again."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _log(run: PlannedRun) -> Path:
    return run.out_dir / "log.txt"


def _last_line(run: PlannedRun) -> str:
    file: IO[str]
    with open(_log(run), encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file.read()[-4000:].splitlines() if line.strip()]
    return f"see {_log(run)}: {lines[-1] if lines else 'no output'}"


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
