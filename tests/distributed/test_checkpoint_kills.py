"""kill -9 of random ranks, in training and in saves: the end is that of the undisturbed run, bit for bit."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megagnn.optim.adamw import FlatAdamW
from tests import runs
from tests.distributed.kills import compare
from tests.distributed.ranks import clean_environment

TIMEOUT_S = 3000


@pytest.mark.timeout(2 * TIMEOUT_S)
def test_killed_runs_end_as_the_undisturbed(request: pytest.FixtureRequest) -> None:
    """Three kills of two ranks with AdamW and with Muon; with --full 20, and 20 of four ranks with each."""
    cases = [
        ["--kills", "3", "--steps", "40"],
        ["--kills", "3", "--steps", "40", "--rule", "muon", "--stage", "2"],
    ]
    if request.config.getoption("--full"):
        cases = [["--kills", "20"], ["--kills", "20", "--ranks", "4", "--tensor", "2", "--stage", "3"]]
        cases += [[*cases[-1], "--rule", "muon"]]
    for case in cases:
        command = [sys.executable, "-m", "tests.distributed.kills", *case]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S, env=clean_environment()
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(r"tensors and the progress equal those of the undisturbed run", done.stdout)
        told = re.search(rf"^{case[1]} kills: .*$", done.stdout, re.MULTILINE)
        assert told, done.stdout
        assert "in a save" in told[0] or case[1] == "3", "of many kills"


@pytest.mark.parametrize("forgets", [False, True])
def test_the_comparison_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgets: bool) -> None:
    """The mistake: a resumed optimizer counts its steps from zero."""
    store, often = runs.write_data(tmp_path / "store"), ("--train.checkpoint_every", "6")
    steps = ("--train.num_steps", "12", "--train.export_best", "false")
    assert runs.train(store, tmp_path / "whole", *often, *steps) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "killed", symlinks=True)
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step-00000012")
    if forgets:
        original = FlatAdamW.pieces_loaded
        monkeypatch.setattr(FlatAdamW, "pieces_loaded", lambda self, num_steps: original(self, 0))
    assert runs.train(store, tmp_path / "killed", *often, *steps, "--resume") == 0
    if forgets:
        with pytest.raises(AssertionError):
            compare(tmp_path / "whole", tmp_path / "killed")
    else:
        assert compare(tmp_path / "whole", tmp_path / "killed") > 100
