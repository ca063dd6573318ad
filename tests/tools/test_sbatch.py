"""examples/slurm/train.sbatch with stand-ins for Slurm's commands."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples/slurm/train.sbatch"
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
