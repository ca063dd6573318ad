"""Two runs in one folder would take each other's checkpoints away."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megagnn.parallel.context import ParallelContext
from megagnn.train import run_lock
from tests import runs

HOLDER = """
import os, sys, time
from pathlib import Path
from megagnn.parallel.context import ParallelContext
from megagnn.train.run_lock import locked
with locked(Path(sys.argv[1]), ParallelContext()):
    # as processes that read data, which outlive the killed rank
    child = len(sys.argv) > 2 or os.fork()
    if child:
        print(child, flush=True)
    time.sleep(600)
"""


def test_the_second_run_is_refused_until_the_first_is_gone(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with monkeypatch.context() as patch:
            patch.setattr(run_lock, "PATIENCE_SECONDS", 0.2)
            assert runs.train(store, run, "--resume") == 2
        message = capsys.readouterr().err
        assert f"another run is at work in {run} (process {holder.pid} on " in message
        assert not (run / "checkpoints").exists()
        holder.kill()
        holder.wait()
        with run_lock.locked(run, ParallelContext()):
            assert (run / "lock").read_text().startswith(f"process {os.getpid()} ")
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()
