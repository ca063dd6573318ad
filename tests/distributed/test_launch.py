"""Real launchers start the same grid; ranks that were started differently are told so before they begin."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megagnn.cli import main
from tests import runs
from tests.distributed.ranks import TIMEOUT_S, clean_environment, free_port, run_ranks, torchrun_like

HEALTHY = ["tests.distributed.faulty", "99", "none", "0.5", "5", "1"]  # no rank comes to grief
TENSOR_2 = '{"parallel": {"tensor": 2}}'
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


def launch(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, env=clean_environment(), check=False, timeout=TIMEOUT_S
    )


def mpiexec(*arguments: str) -> list[str]:
    program = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}") or shutil.which("mpiexec")
    assert program, "no mpiexec: pip install mpi4py mpich, or the extra `test`"
    return [program, "-n", "2", sys.executable, "-m", *arguments]


@pytest.fixture
def tensor_2(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(TENSOR_2)
    return str(tmp_path / "config.json")


def check_tensor_grid(out: str) -> None:
    for rank in range(2):
        assert f"rank {rank} is dp0-pp0-tp{rank}, pid" in out
    assert out.count("2 rank(s) (data 1 x pipeline 1 x tensor 2)") == 2
    assert out.count("done") == 2


def test_torchrun(tensor_2: str) -> None:
    done = launch([*TORCHRUN, *HEALTHY, tensor_2])
    assert done.returncode == 0, done.stderr
    check_tensor_grid(done.stdout)


def test_mpiexec(tensor_2: str) -> None:
    done = launch(mpiexec(*HEALTHY, tensor_2))
    assert done.returncode == 0, done.stderr
    check_tensor_grid(done.stdout)


def test_srun(tensor_2: str) -> None:
    """What srun sets for two tasks on this machine."""
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NODEID": "0"}
    nodes = {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2"}
    assert socket.gethostbyname("localhost").startswith("127.")
    ranks = [{**job, **nodes, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    ended = run_ranks([[*HEALTHY, tensor_2]] * 2, ranks)
    assert [end.code for end in ended] == [0, 0], [end.err for end in ended]
    check_tensor_grid("".join(end.out for end in ended))


def train(tmp_path: Path, *overrides: str) -> list[str]:
    (tmp_path / "config.toml").write_text(runs.CONFIG)
    return ["megagnn", "train", str(tmp_path / "config.toml"), "--data.paths", "none", *overrides]


def test_different_configurations(tmp_path: Path) -> None:
    """Told by both ranks, in the same words; threads may differ."""
    port = free_port()
    commands = [
        train(tmp_path, "--model.width", width, "--train.threads", threads)
        for width, threads in (("128", "1"), ("64", "2"))
    ]
    ended = run_ranks(commands, [torchrun_like(rank, 2, port) for rank in range(2)])
    assert [end.code for end in ended] == [2, 2]
    for rank, end in enumerate(ended):
        assert end.err == (
            f"megagnn train [rank {rank}]: error: rank 1 (host {socket.gethostname()}) was started with "
            "model.width = 64, rank 0 with model.width = 128: start every rank with the same configuration\n"
        )


def test_sizes_that_do_not_make_the_ranks(tmp_path: Path) -> None:
    done = launch(mpiexec(*train(tmp_path, "--parallel.tensor", "3")))
    assert done.returncode == 2
    for rank in range(2):
        text = f"[rank {rank}]: error: 2 rank(s) cannot be divided into pipeline 1 x tensor 3"
        assert text in done.stderr


def test_one_process_in_the_shell_of_a_batch_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("PROCID", "0"), ("NTASKS", "4"), ("JOB_ID", "7"), ("JOB_NODELIST", "a[1-2]")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert main(train(tmp_path, "--parallel.data", "2")[1:]) == 2
    assert "data 2 x pipeline 1 x tensor 1 = 2 ranks, but 1 were started" in capsys.readouterr().err
