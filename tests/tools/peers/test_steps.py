"""Times of steps are of whole batches, and tables of steps and calculators say what was measured."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import ase.io
import pytest
import torch
from ase.calculators.lj import LennardJones

from megagnn.data import keys
from megagnn.data.store import Store
from tools.peers import calculators, dynamics, steps
from tools.peers.clock import StepClock
from tools.peers.contract import Result

SETTINGS = """
[mace]
options = ["--batch_size=16"]
[mace.settings]
"small" = ["--hidden_irreps=32x0e"]
[megagnn]
options = ["--data.paths", "{store}"]
[megagnn.settings]
"a, direct" = ["a.toml"]
"b" = ["b.toml"]
"""


def test_steps_are_timed_and_their_memory_is_found() -> None:
    clock = StepClock()
    clock.profiled = 1

    def step(megabytes: int) -> int:
        for share in (2, 1):
            torch.empty(megabytes << 20, dtype=torch.uint8)[::share].clone()
        time.sleep(0.01)
        return megabytes

    timed = clock.timed(step)
    assert [timed(1), timed(3), timed(2)] == [1, 3, 2]
    time.sleep(0.2)
    assert len(clock.seconds) == 3
    assert all(seconds >= 0.01 for seconds in clock.seconds)
    assert sum(clock.seconds) < 0.2
    assert clock.peak_bytes == 6 << 20, "the second step held 3 MiB and their copy"


def test_frames_are_silicon_within_reach(tmp_path: Path) -> None:
    store, frames = steps.write_frames(tmp_path, repeat=1)
    read = ase.io.read(frames / "train.xyz", index=":")
    assert [len(frame) for frame in read] == [8] * steps.FRAMES
    assert not (read[0].positions == read[1].positions).all()
    assert Store.open(store).structure(0)[keys.FORCES].shape == (8, 3)
    assert len(steps.rattled_silicon(0).positions) == 64


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    (tmp_path / "steps.toml").write_text(SETTINGS)
    options = ["--file", str(tmp_path / "steps.toml"), "--out", str(tmp_path / "out"), "--repeat", "1"]
    return [*options, "--environments", str(tmp_path / "environments"), "--steps", "3"]


def test_a_table_of_steps(
    settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def train(
        program: str, python: Path, frames: Path, out: Path, options: list[str], epochs: int, threads: int
    ) -> Result:
        assert (frames / "train.xyz").exists()
        assert epochs == 6
        if program == "megagnn":
            assert python == Path(sys.executable)
            assert options[-2:] == ["--data.paths", str(tmp_path / "out/store")]
            each = 0.02 / threads
        else:
            assert python == tmp_path / "environments/mace/bin/python"
            given = ["--seed", "0", "--profile-step", "2"]
            assert options == [*given, "--hidden_irreps=32x0e", "--batch_size=16"]
            each = 0.05
        return Result([], 1000, {}, [9.0, 9.0, 9.0, each, 3 * each, each], 2.5e8)

    monkeypatch.setattr(steps, "train", train)
    told = tmp_path / "rows.json"
    assert steps.main([*settings, "--threads", "1", "2", "--json", str(told)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-6:] == [
        "| mace | small | 1,000 | 1 | 50 | 1.0 | 250 |",
        "| megagnn | a, direct | 1,000 | 1 | 20 | 0.4 | 250 |",
        "| megagnn | b | 1,000 | 1 | 20 | 0.4 | 250 |",
        "| mace | small | 1,000 | 2 | 50 | 1.0 | 250 |",
        "| megagnn | a, direct | 1,000 | 2 | 10 | 0.2 | 250 |",
        "| megagnn | b | 1,000 | 2 | 10 | 0.2 | 250 |",
    ]
    assert [row["seconds"] for row in json.loads(told.read_text())] == [0.05, 0.02, 0.02, 0.05, 0.01, 0.01]


def test_epochs_of_several_steps_are_refused(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "train", lambda *_: Result([], 1, {}, [0.1] * 12, 0.0))
    with pytest.raises(ValueError, match=r"mace, small: 6 epochs must be as many steps, got 12; make the"):
        steps.main([*settings, "--only", "mace"])


def test_every_setting_has_batches_of_all_frames() -> None:
    """`steps.rows` refuses others; here for programs that are not installed."""
    options = {
        name: " ".join(table["options"])
        for name, table in steps.tomllib.loads(steps.SETTINGS.read_text()).items()
    }
    assert options.keys() == {"megagnn", "mace", "nequip", "schnetpack"}
    for program in ("mace", "nequip", "schnetpack"):
        assert f"batch_size={steps.FRAMES}" in options[program]
    assert f"--data.max_atoms {64 * steps.FRAMES}" in options["megagnn"]


def test_dynamics_calls_the_calculator_once_a_step() -> None:
    calls = []

    class Counted(LennardJones):
        def calculate(self, *arguments: object, **keywords: object) -> None:
            calls.append(self)
            super().calculate(*arguments, **keywords)

    found = dynamics.time_of_steps(Counted(sigma=2.0, epsilon=0.1, rc=3.0), 8, seconds=0.0)
    assert found["atoms"] == 8
    assert found["steps"] == 5
    assert found["seconds"] > 0
    assert len(calls) == 1 + dynamics.WARM_UP + 5
    with pytest.raises(ValueError, match=r"crystals have 8, 64, 216, .* got 100"):
        dynamics.crystal(100)


PROGRAM = """#!{python}
import json, sys
assert sys.argv[1:5] == ["-m", "tools.peers.dynamics", "mace", {folder!r}], sys.argv
print("a library says something")
for size in (8, 64):
    print(json.dumps({{"atoms": size, "seconds": 1e-3 * size, "steps": 5}}))
sys.exit({status})
"""


@pytest.mark.parametrize("status", [0, 3])
def test_a_table_of_calculators(status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = tmp_path / "environments/mace/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PROGRAM.format(python=sys.executable, folder=str(tmp_path / "whole"), status=status))
    python.chmod(0o755)
    command = [f"mace={tmp_path / 'whole'}", "--sizes", "8", "64", "--rounds", "2"]
    command += ["--environments", str(tmp_path / "environments")]
    if status:
        with pytest.raises(ChildProcessError, match="mace ended with status 3"):
            calculators.main(command)
        return
    assert calculators.main(command) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| threads | program | 8 atoms | 64 atoms |",
        "| --- | --- | --- | --- |",
        "| 1 | mace | 1000 | 1000 |",
    ]
    with pytest.raises(SystemExit):
        calculators.main(["mace"])
