"""Errors are those of `megagnn evaluate`, time is that of steps, and what is done is not done again."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megagnn.cli import main as megagnn
from megagnn.data.store import Store, write_store
from megagnn.launch.context import parallel_context
from megagnn.train.fine_tune import run_config
from megagnn.train.trainer import Trainer
from tests.data.conftest import make_structure
from tools.peers import compare, table
from tools.peers.contract import Result, save_predictions
from tools.peers.frames import write_splits
from tools.peers.lines import Line, errors_of, read_lines
from tools.peers.megagnn import TimedTrainer
from tools.peers.megagnn import main as train_megagnn

CONFIG = """
[model]
width = 8
num_layers = 1
cutoff = 3.0
[data]
max_atoms = 16
max_edges = 400
[optim]
warmup_steps = 1
[train]
validate_every = 2
export_best = true
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    sides = np.array([0] * 8 + [1] * 3 + [2] * 3, np.uint8)
    structures = [make_structure(3 + k % 4, k, group=str(k)) for k in range(len(sides))]
    write_store(tmp_path / "store", structures, splits=sides, provenance={})
    (tmp_path / "small.toml").write_text(CONFIG)
    return tmp_path / "store"


def test_errors_are_those_that_evaluate_tells(store: Path, tmp_path: Path) -> None:
    frames, out = tmp_path / "frames", tmp_path / "out"
    write_splits(Store.open(store), frames)
    out.mkdir()
    files = ["--frames", str(frames), "--out", str(out)]
    options = [str(tmp_path / "small.toml"), "--data.paths", str(store)]
    assert train_megagnn([*files, "--epochs", "3", "--seed", "1", *options]) == 0
    result = Result.load(out)
    assert len(result.seconds) == 3
    assert len(result.step_seconds) >= 3
    assert sum(result.step_seconds) > 0
    assert min(result.seconds) > 0
    assert result.parameters > 100
    assert result.versions.keys() == {"megagnn", "torch"}
    assert json.loads((out / "run/config.json").read_text())["train"]["seed"] == 1
    for split in ("valid", "test"):
        told = tmp_path / f"{split}.json"
        checkpoint = str(out / "run/checkpoints/best.safetensors")
        assert megagnn(["evaluate", checkpoint, str(store), "--split", split, "--json", str(told)]) == 0
        expected = json.loads(told.read_text())["sources"]["A"]
        for name, value in errors_of(frames / f"{split}.xyz", out / f"{split}.npz").items():
            unit = "mev_per_atom" if name.startswith("energy") else "mev_per_angstrom"
            assert 1e3 * value == pytest.approx(expected[f"{name}_{unit}"], rel=2e-5)


def test_validation_takes_none_of_the_time(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    burnt = 0.0
    validate = Trainer._validate

    def slow(*args: object) -> tuple[bool, bool]:
        nonlocal burnt
        start = time.process_time()
        while time.process_time() - start < 0.2:
            pass
        burnt += 0.2
        return validate(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "_validate", slow)
    overrides = [
        "--data.paths",
        str(store),
        "--train.num_epochs",
        "2",
        "--out_dir",
        str(store.parent / "run"),
    ]
    config = run_config(store.parent / "small.toml", overrides)
    with parallel_context("cpu", 1, config.parallel) as context:
        trainer = TimedTrainer(config, context)
        start = time.process_time()
        trainer.run()
        whole = time.process_time() - start
    assert burnt >= 0.4
    assert 0 < sum(trainer.seconds.values()) < whole - burnt


def test_predictions_of_other_atoms_or_without_numbers_are_refused(store: Path, tmp_path: Path) -> None:
    write_splits(Store.open(store), tmp_path)
    num_atoms = [3 + k % 4 for k in (11, 12, 13)]
    forces = [np.zeros((n, 3)) for n in num_atoms]
    save_predictions(tmp_path, "test", [0.0, 0.0, 0.0], forces)
    assert errors_of(tmp_path / "test.xyz", tmp_path / "test.npz").keys() >= {"energy_mae", "force_rmse"}
    save_predictions(tmp_path, "test", [0.0, 0.0], forces)
    with pytest.raises(ValueError, match=f"holds 2 energies .* has 3 and {sum(num_atoms)}; predict these"):
        errors_of(tmp_path / "test.xyz", tmp_path / "test.npz")
    save_predictions(tmp_path, "test", [0.0, np.nan, 0.0], forces)
    with pytest.raises(ValueError, match="energy values that are not finite: the training diverged"):
        errors_of(tmp_path / "test.xyz", tmp_path / "test.npz")


def line(program: str, setting: str, seed: int, force: float, energy: float, **changes: object) -> Line:
    test = {"force_mae": force, "energy_mae": energy}
    valid = {name: value / 2 for name, value in test.items()}
    return dataclasses.replace(
        Line(
            program,
            setting,
            "store",
            6,
            seed,
            ("-x",),
            354.0,
            40,
            45584,
            {"valid": valid, "test": test},
            [],
            {},
        ),
        **changes,  # type: ignore[arg-type]
    )


SETTINGS = """
[mace]
options = ["-x", "{store}"]
[mace.settings]
"defaults" = []
"falling rate" = ["--final-rate=0.01"]
[other.settings]
"one" = []
[other]
options = []
"""


def test_what_has_its_line_is_not_trained_again(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, results = tmp_path / "settings.toml", tmp_path / "lines.jsonl"
    file.write_text(SETTINGS.replace('[other.settings]\n"one" = []\n[other]\noptions = []\n', ""))
    trained: list[compare.Training] = []

    def run(self: compare.Training, python: Path, frames: Path, trial_epochs: int) -> Line:
        trained.append(self)
        assert python == tmp_path / "environments" / self.program / "bin/python"
        assert (frames / "test.xyz").exists()
        changes = {"minutes": self.minutes, "options": self.options}
        return line(self.program, self.setting, self.seed, 0.1, 0.02, **changes)

    monkeypatch.setattr(compare.Training, "run", run)
    command = [str(store), "--results", str(results), "--file", str(file), "--out", str(tmp_path / "runs")]
    command += ["--environments", str(tmp_path / "environments")]
    assert compare.main([*command, "--seeds", "0", "1", "--only", "mace/falling rate"]) == 0
    assert [(t.setting, t.seed) for t in trained] == [("falling rate", 0), ("falling rate", 1)]
    assert trained[0].options == ("-x", "{store}", "--final-rate=0.01")
    with results.open("a") as lines:
        lines.write('{"program": "mace", "set')  # a process that was killed while it wrote
    assert compare.main([*command, "--minutes", "3", "6"]) == 0
    assert [(t.setting, t.minutes) for t in trained[2:]] == [
        ("defaults", 3), ("falling rate", 3), ("defaults", 6)
    ]  # fmt: skip
    assert [found.key for found in read_lines(results)] == [
        (t.program, t.setting, "store", t.minutes, t.seed) for t in trained
    ]
    file.write_text(file.read_text().replace("0.01", "0.02"))
    with pytest.raises(ValueError, match=r"has mace/falling rate with .*0.01, and .* now has .*0.02; rename"):
        compare.main(command)
    with pytest.raises(ValueError, match="has no 'maze'; it has mace, mace/defaults, mace/falling rate"):
        compare.main([*command, "--only", "maze"])


PROGRAM = """#!{python}
# Predicts the labels with every energy too high by 1 eV per atom; each epoch takes 2 s, the first one 5.
import sys
import ase.io
from tools.peers.contract import ENERGY, FORCES, JUDGED, Result, parser, save_predictions

known, options = parser("").parse_known_args(sys.argv[3:])
assert sys.argv[1:3] == ["-m", "tools.peers.toy"] and known.seed == 3 and options == {options!r}, sys.argv
assert known.out.name == ("trial" if known.epochs == 4 else "whole")
for split in JUDGED:
    frames = ase.io.read(known.frames / f"{{split}}.xyz", index=":")
    energies = [frame.info[ENERGY] + len(frame) for frame in frames]
    save_predictions(known.out, split, energies, [frame.arrays[FORCES] for frame in frames])
Result([5.0] + [2.0] * (known.epochs - 1), 7, {{"toy": "1"}}).save(known.out)
"""


def test_a_program_is_tried_planned_and_judged(store: Path, tmp_path: Path) -> None:
    write_splits(Store.open(store), tmp_path / "frames")
    python = tmp_path / "python"
    python.write_text(PROGRAM.format(python=sys.executable, options=["-x", str(store)]))
    python.chmod(0o755)
    training = compare.Training("toy", "x", ("-x", "{store}"), 1.0, 3, store, tmp_path / "run")
    found = training.run(python, tmp_path / "frames", 4)
    assert found.key == ("toy", "x", "store", 1.0, 3)
    assert (found.epochs, found.seconds, found.parameters) == (28, 59.0, 7)
    assert found.options == ("-x", "{store}")
    assert found.versions == {"toy": "1"}
    assert len(found.load) == 2
    for split in ("valid", "test"):
        expected = {"energy_mae": 1.0, "energy_rmse": 1.0, "force_mae": 0.0, "force_rmse": 0.0}
        assert found.errors[split] == pytest.approx(expected)


def test_a_program_that_fails_is_told_with_its_log(tmp_path: Path) -> None:
    training = compare.Training("nothing", "x", (), 1.0, 0, tmp_path, tmp_path / "run")
    with pytest.raises(ChildProcessError, match=r"nothing ended with status 1; .*trial/log.txt tells why"):
        training.run(Path("/bin/false"), tmp_path, 2)


def test_the_table_marks_what_validation_chooses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lines.jsonl"
    lines = [line("mace", "a", 0, 0.09, 0.02), line("mace", "a", 1, 0.11, 0.03)]
    lines += [line("mace", "b", 0, 0.08, 0.02), line("megagnn", "c", 0, 0.2, 0.01)]
    lines.append(line("mace", "a", 0, 0.3, 0.2, minutes=3, seconds=180.0))
    for each in lines:
        each.append(path)
    assert read_lines(path) == [dataclasses.replace(each, options=["-x"]) for each in lines]
    assert table.main([str(path), "--figure", str(tmp_path / "figure.png")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "store"
    assert told[4:] == [
        "| mace | a | 45,584 | 3.0 | 1 | **150 / 100.0** | **300 / 200.0** |",
        "| mace | a | 45,584 | 5.9 | 2 | 50 ± 5 / 12.5 ± 2.5 | 100 ± 10 / 25.0 ± 5.0 |",
        "| mace | b | 45,584 | 5.9 | 1 | **40 / 10.0** | **80 / 20.0** |",
        "| megagnn | c | 45,584 | 5.9 | 1 | **100 / 5.0** | **200 / 10.0** |",
        "",
    ]
    left, right = table.figure(lines).axes
    drawn = {curve.get_label(): np.transpose(curve.get_data()).tolist() for curve in left.lines}
    assert drawn["mace"] == [pytest.approx([3.0, 300.0]), pytest.approx([5.9, 80.0])]
    assert drawn["megagnn"] == [pytest.approx([5.9, 200.0])]
    others = [curve.get_data() for curve in right.lines if curve.get_alpha() < 1]
    assert np.concatenate(others, axis=1).T.tolist() == [pytest.approx([100.0, 25.0])]
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    line("mace", "a", 0, 0.1, 0.1, data="other").append(path)
    with pytest.raises(ValueError, match="a figure is of one data set, and the lines are of store, other"):
        table.main([str(path), "--figure", str(tmp_path / "figure.png")])
