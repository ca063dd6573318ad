"""examples/slurm/train.sbatch and grid.sbatch with stand-ins for Slurm's commands."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT, GRID = (ROOT / "examples/slurm" / name for name in ("train.sbatch", "grid.sbatch"))
# srun hands on what it is sent; a run that is told to stop saves and ends with 0
SRUN = """#!/usr/bin/env bash
trap 'echo saved > "$HERE/saved"; exit 0' USR1
echo "$@" > "$HERE/arguments"
for _ in $(seq "$LENGTH"); do sleep 0.1; done
exit "$CODE"
"""
SCONTROL = '#!/usr/bin/env bash\necho "$@" > "$HERE/requeued"\n'


def start(folder: Path, length: int, code: int) -> subprocess.Popen[bytes]:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    variables = {"HERE": str(folder), "LENGTH": str(length), "CODE": str(code), "SLURM_JOB_ID": "42"}
    variables |= {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(folder)}
    return subprocess.Popen(
        ["bash", str(SCRIPT), "a.toml", "--out_dir", "b"], env={**os.environ, **variables}
    )


def test_told_before_the_end_it_saves_and_queues_itself_again(tmp_path: Path) -> None:
    process = start(tmp_path, 600, 1)
    deadline = time.monotonic() + 60
    while not (tmp_path / "arguments").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 42\n"
    assert (tmp_path / "arguments").read_text().endswith("-m megagnn train a.toml --out_dir b --resume\n")


@pytest.mark.parametrize("code", [0, 2])
def test_otherwise_it_ends_as_the_run_does(tmp_path: Path, code: int) -> None:
    assert start(tmp_path, 1, code).wait(timeout=60) == code
    assert not (tmp_path / "requeued").exists()


def grid(folder: Path, ranks: int, **sizes: str) -> "subprocess.CompletedProcess[str]":
    """grid.sbatch on so many ranks, four to a node."""
    (folder / "srun").write_text(SRUN)
    (folder / "srun").chmod(0o755)
    variables = {"HERE": str(folder), "LENGTH": "0", "CODE": "0", "SLURM_NTASKS": str(ranks)}
    variables |= {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT), **sizes}
    variables |= {"SLURM_JOB_ID": "42", "SLURM_NTASKS_PER_NODE": "4"}
    return subprocess.run(
        ["bash", str(GRID), "a.toml", "--out_dir", "b c"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_grid(tmp_path: Path) -> None:
    done = grid(tmp_path, 16)
    assert (done.returncode, done.stderr) == (0, "")
    asked = "--parallel.tensor 4 --parallel.pipeline 2 --optim.accumulate_steps 4"
    arguments = (tmp_path / "arguments").read_text()
    assert arguments.endswith(f"-m megagnn train a.toml {asked} --out_dir b c --resume\n")
    done = grid(tmp_path, 12, TENSOR="3", PIPELINE="4", BATCHES="12")
    assert done.returncode == 0
    assert "warning: tensor 3 does not divide the 4 ranks of a node" in done.stderr
    asked = "--parallel.tensor 3 --parallel.pipeline 4 --optim.accumulate_steps 12"
    assert asked in (tmp_path / "arguments").read_text()


def test_grid_that_does_not_fit(tmp_path: Path) -> None:
    done = grid(tmp_path, 12)
    assert done.returncode == 2
    assert "12 ranks are no multiple of tensor 4 x pipeline 2; change --nodes" in done.stderr
    assert not (tmp_path / "arguments").exists()
