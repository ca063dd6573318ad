"""Loading of batches: oversized structures, mixed sources, worker processes."""

import os
import signal
import sys
import time
from multiprocessing.spawn import get_preparation_data
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from megagnn.checkpoint.single_file import load_checkpoint
from megagnn.data import keys
from megagnn.train import workers
from megagnn.train.workers import ReaderLostError, processes_needed
from tests import runs


def test_oversized_structures_are_refused_left_out_or_alone(store: Path, tmp_path: Path) -> None:
    """The clusters' largest batch is a crystal of four atoms: six and more are too many."""
    small = ("--data.max_atoms", "5")
    with pytest.raises(ValueError, match=r'data\.oversized = "alone"'):
        runs.make_trainer(store, tmp_path / "run", *small)
    skipping = runs.make_trainer(store, tmp_path / "run", *small, "--data.oversized", "skip")
    assert skipping.train.dataset.num_atoms.max() <= 5
    assert skipping.train.dataset.num_oversized == 24
    told = [line for line in skipping.told if "left out" in line]
    assert [line.split(" structures")[0] for line in told] == ["24 of 48", "6 of 12"]
    alone = runs.make_trainer(store, tmp_path / "run", *small, "--data.oversized", "alone")
    assert len(alone.train.dataset) == 48
    sizes = [batch[keys.NUM_ATOMS].tolist() for batch in alone.train.batches()]
    assert sorted(n for batch in sizes for n in batch) == sorted(alone.train.dataset.num_atoms)
    assert all(sum(batch) <= 5 or len(batch) == 1 for batch in sizes)
    assert "24 of 48 structures of the train split are larger" in alone.told[0]
    with pytest.raises(ValueError, match="48 structures, all of them larger than the budget"):
        runs.make_trainer(store, tmp_path / "run", "--data.max_atoms", "3", "--data.oversized", "skip")


def test_sources_are_mixed_in_training_alone(store: Path, tmp_path: Path) -> None:
    """Of 24 clusters and 24 crystals 6 clusters are kept; at a high temperature they are half of an epoch."""

    def numbers(*options: str) -> tuple[list[int], int]:
        trainer = runs.make_trainer(store, tmp_path / "run", "--data.num_structures", "30", *options)
        names = trainer.train.dataset.source_names()
        drawn = np.concatenate([b[keys.STRUCTURE].numpy() for b in trainer.train.batches()])
        valid = sum(len(b[keys.STRUCTURE]) for b in trainer.valid.batches())
        assert valid == len(trainer.valid.dataset)
        assert len(drawn) == 30
        return [int((names == s).sum()) for s in ("clusters", "crystals")], int(
            (names[drawn] == "clusters").sum()
        )

    (clusters, crystals), drawn = numbers()
    assert drawn == clusters != crystals
    mixed = numbers("--data.mixing_temperature", "1e6")[1]
    assert mixed == 15


DIRECT = ("--model.forces", "direct", "--model.stress", "false", "--loss.stress_weight", "0")
CARTESIAN = ("--model.family", "cartesian")
MODELS = {"egnn, conservative": (), "cartesian, direct": (*CARTESIAN, *DIRECT)}
OTHERS = {"egnn, direct": DIRECT, "cartesian, conservative": CARTESIAN}


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_processes_change_no_bit(
    name: str,
    store: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over two epochs and a half and a validation between them, with a process for each split, reading kept
    neighbours where the other run finds them."""
    if name in OTHERS and not request.config.getoption("full"):
        pytest.skip("only with --full: a cover of families and forces runs always")
    model = {**MODELS, **OTHERS}[name]
    short = ("--train.num_steps", "12", "--train.validate_every", "6", "--data.max_structures", "10")
    assert runs.train(store, tmp_path / "here", *model, *short, "--data.num_workers", "0") == 0
    others, begun = ["--data.num_workers", "1", "--data.cache_edges", "1"], []
    if "cartesian" in name:  # begun in the middle of an epoch, after a trial
        others = others[2:]
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
        monkeypatch.setattr(workers, "TRIAL_SECONDS", 0.0)

        def one(*measured: float) -> int:
            begun.append(measured)
            return 1

        monkeypatch.setattr(workers, "processes_needed", one)
    assert runs.train(store, tmp_path / "there", *model, *short, *others) == 0
    here, there = (
        load_checkpoint(tmp_path / run / "checkpoints/last", optimizer=True) for run in ("here", "there")
    )
    assert len(begun) == ("cartesian" in name) * 2
    assert here.progress == there.progress
    assert here.progress.epoch == 2
    for key, tensor in here.tensors.items():
        assert torch.equal(tensor, there.tensors[key]), key
    assert runs.readers() == []
    assert [file.name[:10] for file in store.glob("edges-*")] == ["edges-4.0-"] * 2


def test_a_process_that_dies_is_told(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kill -9, as a machine out of memory does; the run is over at once."""
    original = runs.Trainer._step

    def step(trainer: runs.Trainer, *arguments: object) -> bool:
        if trainer.progress.step == 4:
            os.kill(runs.readers()[0], signal.SIGKILL)
            time.sleep(0.2)
        return original(trainer, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(runs.Trainer, "_step", step)
    start = time.monotonic()
    assert runs.train(store, tmp_path / "run", "--data.num_workers", "1") == 2
    assert time.monotonic() - start < 60
    told = capsys.readouterr().err
    assert "error: a process that reads data (data.num_workers) died: killed, or out of memory?" in told
    assert "--resume continues" in told


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="something else"), workers.deaths_explained():
        raise RuntimeError("something else")
    met = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback ..."
    with pytest.raises(RuntimeError, match="Caught"), workers.deaths_explained():
        raise RuntimeError(met)
    for death in ("(pid 3) is killed by signal: Killed.", "(pid(s) 3) exited unexpectedly"):
        with pytest.raises(ReaderLostError), workers.deaths_explained():
            raise RuntimeError(f"DataLoader worker {death}")


def test_what_a_step_takes() -> None:
    """Two batches to a step; the first step is slow, and a validation lies in the fourth."""
    seconds = [9.0, 9.0, 0.0, 1.0, 0.1, 1.0, 0.0, 50.0, 0.0, 1.0, 0.3]
    assert workers.of_a_step(seconds, 2) == pytest.approx(1.05)
    assert workers.of_a_step([30.0, 2.0], 1) == 2.0


def test_how_many_processes_are_worth_while() -> None:
    assert processes_needed(0.01, 1.0, 8) == 0, "two per cent of a step"
    assert processes_needed(0.1, 1.0, 8) == 1
    assert processes_needed(1.0, 1.0, 8) == 2
    assert processes_needed(5.0, 1.0, 4) == 4
    assert processes_needed(5.0, 1.0, 0) == 0, "no core is left"


def test_auto_takes_cores_that_are_left(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a trial, of the batches that are left; none where training has all cores."""
    monkeypatch.setattr(workers, "TRIAL_SECONDS", 0.0)
    seen: list[tuple[float, float, int]] = []

    def needed(making: float, using: float, spare: int) -> int:
        seen.append((making, using, spare))
        return 0

    monkeypatch.setattr(workers, "processes_needed", needed)
    trainer = runs.make_trainer(store, tmp_path / "run")
    expected = [b[keys.STRUCTURE].tolist() for b in trainer.valid.batches()]
    loader = trainer.train
    whole = loader.sampler.batches(0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: loader.context.cores - 1)
    loader.num_workers = "auto"
    found = [b[keys.STRUCTURE].tolist() for b in loader.batches()]
    assert found == [b.tolist() for b in whole]
    assert seen[-1][2] == 1
    assert min(seen[-1][:2]) > 0
    assert loader.num_workers == 0, "as the trial found"
    monkeypatch.setattr(torch, "get_num_threads", lambda: loader.context.cores)
    loader.num_workers = "auto"
    count = len(seen)
    assert len(list(loader.batches())) == len(whole)
    assert len(seen) == count
    assert sorted(k for b in expected for k in b) == list(range(len(trainer.valid.dataset)))


def test_a_store_that_cannot_be_written_is_told(store: Path, tmp_path: Path) -> None:
    options = ("--data.cache_edges", "0.5")
    trainer = runs.make_trainer(store, tmp_path / "run", *options)
    assert trainer.told == []
    trainer.train.dataset._caches = [None]
    assert trainer.train.told() == [
        f"data.cache_edges: no neighbour lists can be kept in {store}; they are found each time"
    ]


def test_a_script_is_not_run_again_by_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be its last line the one that begins them, without a guard: they are told of no main module."""
    script = ModuleType("__main__")
    script.__file__ = "/somewhere/script.py"
    monkeypatch.setitem(sys.modules, "__main__", script)
    told = {"init_main_from_name", "init_main_from_path"}
    assert told & set(get_preparation_data("reader"))
    with workers.beginning():
        assert not told & set(get_preparation_data("reader"))
    assert told & set(get_preparation_data("reader"))
