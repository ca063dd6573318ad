"""Tables of runs, and two tiny sweeps that train."""

import dataclasses
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megagnn.checkpoint.folder import checkpoint_steps
from megagnn.cli import main
from megagnn.config import RunConfig, flat_config, load_config
from megagnn.data.store import write_store
from megagnn.scaling import sweep as sweep_module
from megagnn.scaling import sweep_command
from megagnn.scaling.records import read_records
from megagnn.scaling.sweep import Sweep, load_sweep, run_name
from megagnn.scaling.sweep_run import technique
from megagnn.train import run_lock
from tests import runs
from tests.train.test_run_lock import HOLDER

STUDY = Path(__file__).parents[2] / "examples/sweeps/study"

SWEEP = """
config = "base.toml"
out_dir = "{folder}/out"
recipe = "tiny"
processes = 2
[set]
"data.paths" = ["{folder}/store"]
"train.num_steps" = {steps}
"train.validate_every" = 10
[grid]
width = [8, 16]
seed = [0]
[[runs]]
width = 8
structures = 12
"""


def write_sweep(folder: Path, text: str = SWEEP, steps: int = 10) -> Path:
    (folder / "base.toml").write_text(runs.CONFIG)
    (folder / "sweep.toml").write_text(text.format(folder=folder, steps=steps))
    return folder / "sweep.toml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of three runs, finished."""
    made = tmp_path_factory.mktemp("sweep")
    runs.write_data(made / "store")
    text = SWEEP.replace("processes = 2", 'processes = 2\nsplit = ["test", "valid"]')
    assert main(["sweep", str(write_sweep(made, text))]) == 0
    return made


def test_the_table(tmp_path: Path) -> None:
    sweep = load_sweep(write_sweep(tmp_path))
    assert [run.name for run in sweep.runs] == ["w8-s0", "w16-s0", "w8-n12"]
    config = sweep.runs[1].config
    assert (config.model.width, config.train.seed, config.model.num_layers) == (16, 0, 2)
    assert config.data.num_structures is None
    assert sweep.runs[2].config.data.num_structures == 12
    assert config.out_dir == f"{tmp_path}/out/w16-s0"
    assert sweep.pending() == [0, 1, 2]
    assert run_name({"learning_rate": 3e-4, "model.edge_memory": "save"}) == "lr0.0003-edge_memory_save"


@pytest.mark.parametrize(("processes", "order"), [(1, [0, 1, 2]), (2, [1, 0, 2])])
def test_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, order: list[int]) -> None:
    """One at a time as in the table, for what is needed first; several at a time the largest first."""
    started = []

    class Ended:
        returncode = 0

        def poll(self) -> int:
            return 0

    def start(sweep: Sweep, index: int) -> Ended:
        started.append(index)
        return Ended()

    monkeypatch.setattr(sweep_command, "_start", start)
    assert sweep_command.run_all(load_sweep(write_sweep(tmp_path)), processes) == 0
    assert started == order


def test_recipes_of_their_own(tmp_path: Path) -> None:
    """Several grids, some with a recipe; it names their runs and goes into their results."""
    text = SWEEP.split("[grid]")[0]
    text += '[[grid]]\nrecipe = "small, no norm"\nwidth = [8, 16]\n"model.normalisation" = ["none"]\n'
    text += '[[grid]]\nwidth = [8]\n[[runs]]\nrecipe = "single"\nwidth = 8\n'
    sweep = load_sweep(write_sweep(tmp_path, text))
    names = ["small-no-norm-w8", "small-no-norm-w16", "w8", "single-w8"]
    assert [run.name for run in sweep.runs] == names
    assert [run.recipe for run in sweep.runs] == ["small, no norm"] * 2 + ["tiny", "single"]
    assert [run.config.model.normalisation for run in sweep.runs] == ["none", "none", "rms", "rms"]
    for wrong in ("3", '""', '"-"'):
        with pytest.raises(ValueError, match="recipe must be a name, got"):
            load_sweep(write_sweep(tmp_path, text.replace('"single"', wrong)))


def test_in_terms_of_the_data(tmp_path: Path) -> None:
    """Steps, warm-up and validations follow from epochs; results go where they are wanted."""
    text = SWEEP.split("[grid]")[0].replace('"train.num_steps" = {steps}\n"train.validate_every" = 10\n', "")
    text = text.replace("processes = 2", 'processes = 2\nresults = "{folder}/kept.jsonl"')
    text += '"data.max_structures" = 8\nepochs = 3\nwarmup = 0.1\nvalidations = 4\n'
    text += "[grid]\nstructures = [100, 990]"
    sweep = load_sweep(write_sweep(tmp_path, text))
    small, large = (run.config for run in sweep.runs)
    assert (small.train.num_steps, small.optim.warmup_steps, small.train.validate_every) == (39, 4, 10)
    assert (large.train.num_steps, large.optim.warmup_steps, large.train.checkpoint_every) == (372, 37, 93)
    assert sweep.results == tmp_path / "kept.jsonl"


def test_new_keys_change_no_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that lie under version control stay valid as long as nothing that they depend on changes."""
    before = [run.digest for run in load_sweep(write_sweep(tmp_path)).runs]
    flat = sweep_module.flat_config
    monkeypatch.setattr(sweep_module, "flat_config", lambda config: {**flat(config), "model.new": 1})
    assert [run.digest for run in load_sweep(tmp_path / "sweep.toml").runs] == before
    other = write_sweep(tmp_path, SWEEP.replace("width = 8\n", "width = 9\n"))
    assert [run.digest == d for run, d in zip(load_sweep(other).runs, before, strict=True)] == [
        True,
        True,
        False,
    ]


def test_new_keys_of_another_family_change_no_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = SWEEP.replace("[set]", '[set]\n"model.family" = "cartesian"')
    before = [run.digest for run in load_sweep(write_sweep(tmp_path, text)).runs]
    assert before != [run.digest for run in load_sweep(write_sweep(tmp_path)).runs]
    write_sweep(tmp_path, text)
    flat = sweep_module.flat_config

    def with_new(config: RunConfig) -> dict[str, Any]:
        new = {"model.new": 1} if config.model.family == "cartesian" else {}
        return {**flat(config), **new}

    monkeypatch.setattr(sweep_module, "flat_config", with_new)
    assert [run.digest for run in load_sweep(tmp_path / "sweep.toml").runs] == before


def test_a_changed_default_makes_other_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line made when the default was another is no line of a run with today's, and stays one of a run that
    writes the old one out."""
    written = SWEEP.replace("[set]", '[set]\n"optim.final_ratio" = 0.01')
    before = [run.digest for run in load_sweep(write_sweep(tmp_path)).runs]
    assert [run.digest for run in load_sweep(write_sweep(tmp_path, written)).runs] == before
    # as if it had been 0.5 first, and were 0.01 since then
    first = {**sweep_module.FIRST_DEFAULTS, "optim.final_ratio": 0.5}
    monkeypatch.setattr(sweep_module, "FIRST_DEFAULTS", first)
    today = [run.digest for run in load_sweep(write_sweep(tmp_path)).runs]
    assert all(new != old for new, old in zip(today, before, strict=True))
    old = written.replace("0.01", "0.5")
    assert [run.digest for run in load_sweep(write_sweep(tmp_path, old)).runs] == before


def test_every_first_default_is_known() -> None:
    """first_defaults.json has the default of each key from the day it was made. A new key belongs there with
    its default; one whose default changes belongs into FIRST_DEFAULTS with the old one."""
    first = json.loads((Path(__file__).parent / "first_defaults.json").read_text())
    usual = {**flat_config(RunConfig()), **sweep_module.FIRST_DEFAULTS}
    assert {key: usual.get(key) for key in first} == first
    assert not set(usual) - set(first), "add these keys to tests/scaling/first_defaults.json"


@pytest.mark.parametrize("path", sorted(STUDY.rglob("*.toml")), ids=lambda p: f"{p.parent.stem}-{p.stem}")
def test_the_results_under_version_control_are_of_their_sweeps(path: Path) -> None:
    """Every line is of a run of the table, made with its settings; `finished` refuses others."""
    sweep = load_sweep(path)
    results = STUDY.parents[2] / sweep.results
    done = dataclasses.replace(sweep, results=results).finished()
    assert set(done) <= {run.name for run in sweep.runs}
    assert bool(done) == results.is_file()
    assert done or path.parent != STUDY, "the runs of these are all made"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("recipe =", "recipi =", r"sweep\.toml: unknown key 'recipi'; nearest: 'recipe'"),
        ("width = [8, 16]", "widht = [8, 16]", r"unknown key 'widht' of a run; nearest: 'width'"),
        ("width = [8, 16]", "width = 8", r"grid\.width must be a list of values, got 8"),
        ("width = [8, 16]", "width = [8, 8]", r"two runs are 'w8-s0'"),
        ("width = [8, 16]", "width = [8, -1]", r"run w-1-s0: configuration key 'model\.width'"),
        ("processes = 2", "processes = 0", r"processes must be a whole number, at least 1, got 0"),
        ("processes = 2", 'split = "train"', r"split must be 'test' or 'valid', or a list of both"),
        ("processes = 2", 'evaluate = "store"', r"evaluate must be a list of stores, .*, got 'store'"),
        ("processes = 2", 'split = ["test", "test"]', r"or a list of both, got \['test', 'test'\]"),
        ('config = "base.toml"', "", r"'config' is missing"),
        ("seed = [0]", "epochs = [5]", r"run w8-e5: epochs needs structures, and data\.max_structures"),
        ("seed = [0]", "warmup = [-1]", r"warmup must be a positive number, got -1"),
        ("seed = [0]", "epoch = [5]", r"unknown key 'epoch' of a run; nearest: 'epochs'"),
        ("recipe =", "recipe", r"is not valid TOML"),
    ],
)
def test_what_is_wrong_with_a_table(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write_sweep(tmp_path, SWEEP.replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_sweep(path)


def test_no_runs_and_no_files(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, SWEEP.split("[grid]")[0])
    with pytest.raises(ValueError, match=r"no runs; give \[grid\] or \[\[runs\]\]"):
        load_sweep(path)
    with pytest.raises(FileNotFoundError, match="no file at"):
        load_sweep(tmp_path / "other.toml")
    (tmp_path / "base.toml").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file at .*base\.toml"):
        load_sweep(path)


def test_results(folder: Path) -> None:
    """What the lines say is what was trained."""
    records = {r.run: r for r in read_records([folder / "out" / "runs.jsonl"])}
    assert set(records) == {"w8-s0", "w16-s0", "w8-n12"}
    whole, part = records["w16-s0"], records["w8-n12"]
    assert (whole.width, whole.depth, whole.structures, whole.steps, whole.recipe) == (16, 2, 48, 10, "tiny")
    assert (part.structures, part.seed) == (12, 0)
    assert part.atoms < whole.atoms
    assert whole.parameters > part.parameters
    assert whole.flops > part.flops
    assert part.epochs > whole.epochs > 0
    assert whole.losses["force_mae"][1] == "eV/Å"
    sources = [whole.losses[f"{s}/force_mae"][0] for s in ("clusters", "crystals")]
    assert whole.losses["force_mae"][0] == pytest.approx(sum(sources) / 2)
    assert whole.technique == "fused edges, save"
    assert whole.seconds is not None
    assert whole.memory_gib is not None


@pytest.mark.parametrize(("split", "prefix"), [("test", ""), ("valid", "valid/")])
def test_losses_are_those_of_evaluate(folder: Path, split: str, prefix: str) -> None:
    run = folder / "out" / "w16-s0"
    out = folder / "metrics.json"
    arguments = [str(run / "checkpoints" / "best.safetensors"), str(folder / "store"), "--split", split]
    assert main(["evaluate", *arguments, "--json", str(out)]) == 0
    expected = json.loads(out.read_text())["sources"]["clusters"]["force_mae_mev_per_angstrom"]
    (record,) = [r for r in read_records([folder / "out" / "runs.jsonl"]) if r.run == "w16-s0"]
    assert 1e3 * record.losses[f"{prefix}clusters/force_mae"][0] == pytest.approx(expected, rel=1e-6)


def test_errors_on_another_store(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`evaluate` names the structures of the errors; a group that it has on another side is refused."""
    records = runs.structures()
    runs.write_data(tmp_path / "other", records[::2])
    text = SWEEP.split("[grid]")[0].replace("processes = 2", 'evaluate = ["{other}"]')
    text += "[grid]\nwidth = [8]\n"
    filled = {"folder": folder, "steps": 6}
    path, best = folder / "elsewhere.toml", folder / "out-elsewhere" / "w8" / "checkpoints" / "best"
    text = text.replace("/out", "/out-elsewhere")
    path.write_text(text.format(**filled, other=tmp_path / "other"))
    assert main(["sweep", str(path), "--index", "0"]) == 0
    (record,) = read_records([folder / "out-elsewhere" / "runs.jsonl"])
    assert record.structures == 48
    found = {}
    for store in (tmp_path / "other", folder / "store"):
        assert main(["evaluate", str(best), str(store), "--json", str(tmp_path / "m.json")]) == 0
        sources = json.loads((tmp_path / "m.json").read_text())["sources"]
        found[store.name] = sources["clusters"]["force_mae_mev_per_angstrom"]
    assert 1e3 * record.losses["clusters/force_mae"][0] == pytest.approx(found["other"], rel=1e-6)
    assert found["other"] != pytest.approx(found["store"], rel=1e-3)
    # the digest tells where the errors are from
    path.write_text(text.format(**filled, other=folder / "store"))
    with pytest.raises(ValueError, match="made with other settings"):
        load_sweep(path).finished()
    write_store(tmp_path / "torn", records, splits=np.full(len(records), 2, dtype=np.uint8))
    path.write_text(text.format(**filled, other=tmp_path / "torn").replace("elsewhere", "torn"))
    capsys.readouterr()
    assert main(["sweep", str(path), "--index", "0"]) == 2
    assert "a group must lie on one side" in capsys.readouterr().err
    assert not best.parents[2].with_name("out-torn").joinpath("w8", "checkpoints").exists()
    # as is what the run cannot be judged on
    runs.write_gold(tmp_path / "gold")
    path.write_text(text.format(**filled, other=tmp_path / "gold").replace("elsewhere", "gold"))
    assert main(["sweep", str(path), "--index", "0"]) == 2
    assert "gold" in capsys.readouterr().err
    assert not best.parents[2].with_name("out-gold").joinpath("w8", "checkpoints").exists()


def test_nothing_is_done_twice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = folder / "out" / "runs.jsonl"
    before = results.read_bytes()
    assert main(["sweep", str(folder / "sweep.toml")]) == 0
    assert main(["sweep", str(folder / "sweep.toml"), "--index", "0"]) == 0
    assert results.read_bytes() == before
    capsys.readouterr()
    assert main(["sweep", str(folder / "sweep.toml"), "--list"]) == 0
    assert "3 of 3 runs done" in capsys.readouterr().out


def test_results_of_other_settings_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = folder / "other.toml"
    other.write_text(SWEEP.format(folder=folder, steps=11))
    assert main(["sweep", str(other)]) == 2
    assert "has a run 'w8-s0' made with other settings than" in capsys.readouterr().err


def test_killed_and_continued(tmp_path: Path) -> None:
    """SIGKILL in the middle: the runs end with the sweep; the next call goes on from their checkpoints."""
    runs.write_data(tmp_path / "store")
    text = SWEEP.split("[[runs]]")[0].replace("width = [8, 16]", "width = [8]")
    path = write_sweep(tmp_path, text, steps=40)
    command = [sys.executable, "-m", "megagnn", "sweep", str(path)]
    checkpoints = tmp_path / "out" / "w8-s0" / "checkpoints"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not checkpoint_steps(checkpoints) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert checkpoint_steps(checkpoints)
    deadline = time.monotonic() + 60
    while _locked(tmp_path / "out" / "w8-s0" / "lock") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert main(["sweep", str(path)]) == 0
    (record,) = read_records([tmp_path / "out" / "runs.jsonl"])
    assert record.steps == 40
    log = (tmp_path / "out" / "w8-s0" / "log.txt").read_text()
    assert "steps 0 to 40" in log
    assert re.search(r"steps [1-9]\d* to 40", log), "it began anew"


def _locked(path: Path) -> bool:
    with open(path, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_run_that_fails_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.write_data(tmp_path / "store")
    text = SWEEP.split("[grid]")[0] + "[grid]\nstructures = [1000, 12]\nwidth = [8]\n"
    assert main(["sweep", str(write_sweep(tmp_path, text, steps=6))]) == 1
    captured = capsys.readouterr()
    assert "failed: n1000-w8, see" in captured.err
    assert "data.num_structures is 1000, but the training split has 48 structures" in captured.err
    assert "1 of 2 runs done" in captured.out
    assert [r.run for r in read_records([tmp_path / "out" / "runs.jsonl"])] == ["n12-w8"]


def test_one_lock_for_sweeps_and_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a sweep nor a run of it starts where training or a sweep is at work, whose note stays."""
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 0.2)
    path, run = write_sweep(tmp_path), tmp_path / "out" / "w8-s0"
    for folder, arguments, way_out in (
        (tmp_path / "out", (), "start single runs by --index"),
        (run, ("--index", "0"), "start another run by --index"),
    ):
        command = [sys.executable, "-c", HOLDER, str(folder), "alone"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            try:
                assert main(["sweep", str(path), *arguments]) == 2
            finally:
                holder.kill()
            who = f"process {holder.pid} on "
            assert f"another run is at work in {folder} ({who}" in (told := capsys.readouterr().err)
            assert way_out in told
            assert (folder / "lock").read_text().startswith(who)
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), "fused edges, save"),
        (("--train.dtype", "bfloat16"), "fused edges, save, bfloat16"),
        (("--parallel.pipeline", "2"), "fused edges, save, pipeline 2 (conservative)"),
        (
            ("--parallel.pipeline", "2", "--parallel.schedule", "two-pass", "--parallel.tensor", "2"),
            "fused edges, save, pipeline 2 (two-pass), tensor 2",
        ),
    ],
)
def test_the_technique_tells_pipeline_and_type(
    tmp_path: Path, overrides: tuple[str, ...], words: str
) -> None:
    (tmp_path / "base.toml").write_text("")
    config = load_config(tmp_path / "base.toml", overrides)
    assert technique(config.model, config) == words


def test_wrong_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_sweep(tmp_path)
    for arguments, message in (
        (("--index", "3"), "--index must lie in 0..2, got 3"),
        (("--processes", "0"), "--processes must be at least 1, got 0"),
    ):
        assert main(["sweep", str(path), *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "out" / "w8-s0")


def test_a_sweep_of_fine_tuning_takes_the_model_of_its_checkpoint(folder: Path) -> None:
    best = folder / "out" / "w16-s0" / "checkpoints" / "best.safetensors"
    (folder / "tune.toml").write_text(f'init_from = "{best}"\n[optim]\nwarmup_steps = 1\n')
    path = folder / "tune-sweep.toml"
    path.write_text(
        f'config = "tune.toml"\nout_dir = "{folder}/tuned"\n[set]\n"data.paths" = ["{folder}/store"]\n'
        "[grid]\nlearning_rate = [1e-3, 3e-3]\n"
    )
    assert [run.config.model.width for run in load_sweep(path).runs] == [16, 16]
