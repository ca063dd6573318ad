"""Runs that are told to stop, or whose ranks are killed, end as an undisturbed run does, bit for bit."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megagnn.checkpoint.single_file import load_checkpoint
from megagnn.launch.watch import SAME_WISH_SECONDS
from megagnn.parallel.context import ParallelContext, grid_context
from megagnn.parallel.world import sum_over_dp
from megagnn.train.bad_steps import judge
from tests import runs
from tests.distributed.ranks import TIMEOUT_S, clean_environment, free_port, torchrun_like
from tests.distributed.spawn import spawn

LAST = "checkpoints/last"
OFTEN = ["--train.num_steps", "40", "--train.validate_every", "10", "--train.checkpoint_every", "2"]
OFTEN += ["--data.max_atoms", "40"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]


class Run:
    """A training run as processes of this test."""

    def __init__(self, files: tuple[Path, Path], out_dir: Path, *options: str) -> None:
        config, store = files
        self.out_dir = out_dir
        self.arguments = ["-m", "megagnn", "train", str(config), "--data.paths", str(store), *OFTEN]
        self.arguments += ["--out_dir", str(out_dir), *options]
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, command: list[str], **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*command, *self.arguments],
            env=clean_environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def start_two_ranks(self) -> None:
        port = free_port()
        for rank in range(2):
            self.start([sys.executable], **torchrun_like(rank, 2, port))

    def reach(self, step: int) -> None:
        """Waits for a checkpoint of that step or a later one."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.step < step:
            assert time.monotonic() < deadline, f"step {step} was not reached in time"
            assert all(p.poll() is None for p in self.processes), self.processes[0].communicate()
            time.sleep(0.1)

    @property
    def step(self) -> int:
        """Of the last checkpoint; 0 without any."""
        path = self.out_dir / LAST
        return load_checkpoint(path).progress.step if path.exists() else 0

    def wait(self) -> list[tuple[int, str, str]]:
        """(exit code, stdout, stderr) of each process."""
        ended = [(p.communicate(timeout=TIMEOUT_S), p.returncode) for p in self.processes]
        self.processes = []
        return [(code, out, err) for (out, err), code in ended]


def children(pid: int) -> dict[str, int]:
    """{rank: process} of torchrun's children."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        rank = [v.partition(b"=")[2].decode() for v in variables if v.startswith(b"RANK=")]
        found |= {r: int(child) for r in rank}
    return found


def same_end(first: Path, second: Path) -> None:
    """Every tensor of the last and of the best checkpoint, and where the runs stand."""
    for name in (LAST, "checkpoints/best"):
        a, b = (load_checkpoint(run / name, optimizer=True) for run in (first, second))
        assert a.progress == b.progress
        assert a.tensors.keys() == b.tensors.keys()
        assert all(torch.equal(a.tensors[n], t) for n, t in b.tensors.items()), name


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("survival")
    (folder / "config.toml").write_text(runs.CONFIG)
    return folder / "config.toml", runs.write_data(folder / "store")


@pytest.fixture(scope="module")
def undisturbed(files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data-parallel ranks."""
    run = Run(files, tmp_path_factory.mktemp("runs") / "undisturbed")
    run.start_two_ranks()
    assert [code for code, _, _ in run.wait()] == [0, 0]
    return run.out_dir


def test_one_rank_hears_the_signal_and_all_stop(files: tuple[Path, Path], tmp_path: Path) -> None:
    run = Run(files, tmp_path / "run")
    run.start_two_ranks()
    run.reach(4)
    run.processes[1].send_signal(signal.SIGUSR1)
    ended = run.wait()
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert all("error" not in err for _, _, err in ended), "nobody takes the others' leave for a failure"
    told = re.search(
        rf"stopped by a signal to another rank after step (\d+) of 40; saved \S+{LAST}\.", ended[0][1]
    )
    assert told, ended[0]
    assert "--resume continues" in ended[0][1]
    assert 4 <= run.step == int(told[1]) < 40


def test_torchrun_restarts_and_hands_on_the_signal(
    files: tuple[Path, Path], undisturbed: Path, tmp_path: Path
) -> None:
    """A rank is killed: the run continues, though nobody says --resume. A SIGTERM: it saves."""
    run = Run(files, tmp_path / "run")
    agent = run.start([*TORCHRUN, "--standalone", "--max-restarts=2"])
    run.reach(4)
    os.kill(children(agent.pid)["1"], signal.SIGKILL)
    run.reach(run.step + 4)
    agent.send_signal(signal.SIGTERM)
    [(_, out, err)] = run.wait()
    assert err.count("started again by torchrun: continuing") == 1
    assert "stopped by SIGTERM after step" in out, err
    assert 8 <= run.step < 40
    run.arguments.append("--resume")
    run.start_two_ranks()
    assert [code for code, _, _ in run.wait()] == [0, 0]
    same_end(run.out_dir, undisturbed)


def test_two_machines_that_count_restarts_differently(
    files: tuple[Path, Path], undisturbed: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The agent of the machine whose rank is killed counts a failure; the other one may count none."""
    if not request.config.getoption("--full"):
        pytest.skip("starts eight processes; --full runs it")
    run, port = Run(files, tmp_path / "run"), free_port()
    nodes = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
    nodes += [f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
    agents = [run.start([*TORCHRUN[:3], *nodes]) for _ in range(2)]
    run.reach(4)
    victim = next(pid for agent in agents for rank, pid in children(agent.pid).items() if rank == "1")
    os.kill(victim, signal.SIGKILL)
    ended = run.wait()
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert sum(err.count("started again by torchrun: continuing") for _, _, err in ended) >= 1
    same_end(run.out_dir, undisturbed)


WAITER = """
import sys, time, torch
from megagnn.launch.context import parallel_context
from megagnn.parallel.world import sum_over_dp
from megagnn.train.signals import StopSignals
with parallel_context("cpu", 1) as context, StopSignals():
    print("ready", flush=True)
    time.sleep(600 if context.rank else 0)
    sum_over_dp(torch.ones(1), context)
"""


def test_a_second_sigterm_ends_a_rank_that_waits_for_another() -> None:
    """Inside a collective no Python handler runs: the first signal is noted, the second the guard's."""
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WAITER],
            env=clean_environment(**torchrun_like(rank, 2, port)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        time.sleep(1.0)
        ranks[0].send_signal(signal.SIGTERM)
        time.sleep(SAME_WISH_SECONDS + 1.5)
        assert ranks[0].poll() is None, "the first is a wish"
        ranks[0].send_signal(signal.SIGTERM)
        _, err = ranks[0].communicate(timeout=TIMEOUT_S)
        assert ranks[0].returncode == 143
        assert "was ended by a signal (SIGTERM)" in err
        _, err = ranks[1].communicate(timeout=TIMEOUT_S)
        assert ranks[1].returncode == 1
        assert "rank 0 (dp0-pp0-tp0, " in err, "the other one is told"
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


# --- what all ranks decide ---

GRIDS = ((4, 1, 1), (2, 1, 2), (1, 1, 4))
NORMS = [1.0] * 30


def decide(context: ParallelContext, who: int, what: str) -> str:
    """The decision of this rank when one rank alone sees something."""
    mine = context.rank == who
    loss = torch.tensor(float("nan") if mine and what == "loss" else 1.0)
    norm = torch.tensor({"norm": float("inf"), "spike": 7.0}.get(what, 1.0) if mine else 1.0)
    return json.dumps(vars(judge(loss, norm, NORMS, 5.0, mine and what == "stop", context)), sort_keys=True)


def on_rank(context: ParallelContext) -> dict[str, str]:
    found = {}
    for grid in GRIDS:
        here = grid_context(*grid)
        for what in ("nothing", "stop", "loss", "norm", "spike"):
            for who in (0, 3):
                found[f"{grid} {what} {who}"] = decide(here, who, what)
    here = grid_context(2, 1, 2)
    found["mistake"] = str(sum_over_dp(torch.tensor([float(here.rank == 3)]), here).item())
    return found


def test_all_ranks_decide_alike_whoever_sees_it() -> None:
    results = spawn(4, on_rank)
    mistaken = [result.pop("mistake") for result in results]
    assert len(set(mistaken)) == 2, "votes that are summed over the data-parallel ranks alone would fail"
    for key, text in results[0].items():
        _, what, _ = key.rsplit(" ", 2)
        found = json.loads(text)
        assert found["stop"] == (what == "stop"), key
        assert bool(found["fault"]) == (what in ("loss", "norm", "spike")), key
        for other in results[1:]:
            seen = json.loads(other[key])
            assert (seen["stop"], bool(seen["fault"])) == (found["stop"], bool(found["fault"])), key
