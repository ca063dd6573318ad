"""The training loop: it learns, resumes to the same bits, and does not overwrite by accident."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megagnn.checkpoint.single_file import load_checkpoint
from megagnn.cli import main
from megagnn.optim.optimizer import WeightAverage
from megagnn.train.evaluate import evaluate
from tests import runs


def scalars(run_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return events


def test_the_loss_falls(run_dir: Path) -> None:
    losses = [event.value for event in scalars(run_dir).Scalars("loss/train")]
    assert len(losses) == 12
    assert losses[-1] < 0.5 * losses[0]


def test_tensorboard_has_what_people_look_for(run_dir: Path) -> None:
    tags = set(scalars(run_dir).Tags()["scalars"])
    expected = {"loss/train", "loss/train_energy", "loss/train_forces", "loss/train_stress", "loss/valid"}
    expected |= {"optim/learning_rate", "optim/gradient_norm"}
    expected |= {"speed/atoms_per_second", "speed/edges_per_second", "memory/peak_resident_gib"}
    for source in ("clusters", "crystals"):
        expected |= {f"error/energy_mae_mev_per_atom/{source}", f"error/force_mae_mev_per_angstrom/{source}"}
    assert expected <= tags


def test_the_run_keeps_its_configuration(run_dir: Path) -> None:
    config = json.loads((run_dir / "config.json").read_text())
    assert config["model"]["width"] == 16
    assert config["optim"]["betas"] == [0.9, 0.99]


def test_the_average_is_taken_after_the_step_and_validated(store: Path, tmp_path: Path) -> None:
    """One step from w0 to w1: the average is (w0 + 9 w1)/10, and the validation loss is its."""
    one = ("--train.num_steps", "1", "--optim.learning_rate", "0.05", "--optim.warmup_steps", "0")
    trainer = runs.make_trainer(store, tmp_path / "run", *one, "--train.dtype", "float64")
    weights = dict(trainer.potential.model.named_parameters())
    before = {name: p.detach().clone() for name, p in weights.items()}
    trainer.run()
    assert isinstance(trainer.average, WeightAverage)
    for name, average in trainer.average.average.items():
        after = weights[name].detach()
        torch.testing.assert_close(average, 0.1 * before[name] + 0.9 * after, rtol=0, atol=1e-14)
    assert sum(float((weights[name].detach() - p).abs().sum()) for name, p in before.items()) > 1
    raw = evaluate(trainer.potential, trainer.valid, trainer.context, trainer.loss).loss
    with trainer.average.applied():
        averaged = evaluate(trainer.potential, trainer.valid, trainer.context, trainer.loss).loss
    assert trainer.progress.best_loss == pytest.approx(averaged, rel=1e-12)
    assert abs(raw - averaged) > 1e-3 * averaged


def test_resume_gives_the_same_bits(store: Path, run_dir: Path, tmp_path: Path) -> None:
    """A run stopped at step 30, in the middle of an epoch, ends as the undisturbed one, every tensor."""
    out_dir = tmp_path / "resumed"
    trainer = _interrupted(store, out_dir, at_step=30)
    assert trainer.progress.step_in_epoch not in (
        0,
        len(trainer.train.sampler.batches(trainer.progress.epoch)),
    )
    assert runs.train(store, out_dir, "--resume") == 0
    for name in ("last", "best"):
        resumed = load_checkpoint(out_dir / "checkpoints" / name, optimizer=True)
        undisturbed = load_checkpoint(run_dir / "checkpoints" / name, optimizer=True)
        assert resumed.progress == undisturbed.progress
        assert resumed.tensors.keys() == undisturbed.tensors.keys()
        for key, tensor in undisturbed.tensors.items():
            assert torch.equal(resumed.tensors[key], tensor), key
    before = [(e.step, e.value) for e in scalars(run_dir).Scalars("loss/train")]
    # Two event files of one second are read in the order of their names, "10" before "9": compared by step.
    assert sorted((e.step, e.value) for e in scalars(out_dir).Scalars("loss/train")) == before


def _interrupted(store: Path, out_dir: Path, at_step: int) -> "runs.Trainer":
    """Trains until a step and stops as a kill would: nothing is saved beyond the regular checkpoints."""

    class StoppingError(Exception):
        pass

    trainer = runs.make_trainer(store, out_dir)
    original = trainer._save

    def save_and_stop() -> None:
        original()
        if trainer.progress.step == at_step:
            raise StoppingError

    trainer._save = save_and_stop  # type: ignore[method-assign]
    with pytest.raises(StoppingError):
        trainer.run()
    return trainer


def test_an_earlier_run_is_not_overwritten(
    store: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run_dir / "checkpoints" / "last" / "manifest.json").read_bytes()
    assert runs.train(store, run_dir) == 2
    assert "holds an earlier run; add --resume" in capsys.readouterr().err
    assert (run_dir / "checkpoints" / "last" / "manifest.json").read_bytes() == before


def test_overwrite_removes_only_what_training_wrote(store: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "run"
    short = ("--train.num_steps", "6")
    assert runs.train(store, out_dir, *short) == 0
    (out_dir / "notes.txt").write_text("mine")
    assert runs.train(store, out_dir, *short, "--overwrite") == 0
    assert (out_dir / "notes.txt").read_text() == "mine"
    assert len(list((out_dir / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    ["model.width 24", "data.max_atoms 70", "train.seed 3", "train.dtype float64", "data.max_structures 2"],
)
def test_resume_of_another_run_is_refused(
    store: Path, run_dir: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    key, value = change.split()
    assert runs.train(store, run_dir, "--resume", f"--{key}", value) == 2
    assert f"{key} was" in capsys.readouterr().err


def test_resume_with_other_settings_warns(
    store: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_dir, tmp_path / "copy", symlinks=True)
    assert runs.train(store, tmp_path / "copy", "--resume", "--optim.learning_rate", "1e-4") == 0
    assert "resumed with other settings than before: optim.learning_rate\n" in capsys.readouterr().err


def test_resume_without_a_checkpoint_starts(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Chained jobs all say --resume; a run killed early has left only TensorBoard's folder."""
    (tmp_path / "run" / "tensorboard").mkdir(parents=True)
    assert runs.train(store, tmp_path / "run", "--resume", "--train.num_steps", "6") == 0
    assert "starting from the beginning" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "last").exists()


def test_resume_from_an_old_file_names_the_way_out(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "run" / "checkpoints" / "last.safetensors"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"whatever")
    assert runs.train(store, tmp_path / "run", "--resume") == 2
    assert f"`megagnn import {old} {tmp_path / 'run'}`" in capsys.readouterr().err
    assert runs.train(store, tmp_path / "run") == 2
    assert "holds an earlier run" in capsys.readouterr().err


def test_overwrite_with_bad_settings_keeps_the_old_run(store: Path, run_dir: Path) -> None:
    before = (run_dir / "checkpoints" / "last" / "manifest.json").read_bytes()
    assert runs.train(store, run_dir, "--overwrite", "--data.max_edges", "20") == 2
    assert (run_dir / "checkpoints" / "last" / "manifest.json").read_bytes() == before


def test_a_structure_over_the_budget_is_refused_before_training(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.train(store, tmp_path / "run", "--data.max_edges", "20") == 2
    assert "64 atoms and 20 edges; raise the budget to at least" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_an_exploding_run_stops_and_keeps_its_checkpoint(store: Path, tmp_path: Path) -> None:
    """Though checkpoints are written more often than anything is logged."""
    often = ("--train.checkpoint_every", "2", "--train.log_every", "50")
    trainer = runs.make_trainer(store, tmp_path / "run", *often)
    original = trainer.gradient_method

    def explode(*arguments: Any) -> Any:
        result = original(*arguments)
        if trainer.progress.step == 5:
            next(trainer.potential.parameters()).grad.fill_(np.nan)
        return result

    trainer.gradient_method = explode
    with pytest.raises(
        FloatingPointError, match=r"gradient norm is nan at step 5; .*checkpoints/last is from before"
    ):
        trainer.run()
    kept = load_checkpoint(trainer.last_path, optimizer=True)
    assert kept.progress.step == 4
    assert all(torch.isfinite(tensor).all() for tensor in kept.tensors.values())


@pytest.mark.parametrize("missing", ["forces", "energy", "stress"])
def test_data_without_labels_of_a_kind(tmp_path: Path, missing: str) -> None:
    """Half of the structures lack them, so that whole batches do."""
    structures = [
        dataclasses.replace(s, **{missing: None}) if s.source == "clusters" else s for s in runs.structures()
    ]
    store = runs.write_data(tmp_path / "store", structures)
    short = ("--train.num_steps", "6", "--data.max_structures", "1")
    assert runs.train(store, tmp_path / "run", *short) == 0


def test_a_loss_without_any_label_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    structures = [dataclasses.replace(s, forces=None) for s in runs.structures()]
    store = runs.write_data(tmp_path / "store", structures)
    assert runs.train(store, tmp_path / "run") == 2
    assert "loss.force_weight is 1 but no training structure has a label 'forces'" in capsys.readouterr().err
    assert runs.train(store, tmp_path / "run", "--loss.force_weight", "0", "--train.num_steps", "6") == 0


def test_a_misspelt_flag(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runs.train(store, tmp_path / "run", "--resum")
    assert "unknown option --resum; did you mean --resume?" in capsys.readouterr().err


def test_inspect_a_run(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint)]) == 0
    text = capsys.readouterr().out
    for expected in ("step 60", "Cu Ag", "clusters: Cu", '"width": 16', "parameters   "):
        assert expected in text


def test_a_validation_is_due_only_where_it_was_left_out(store: Path, tmp_path: Path) -> None:
    """At checkpoints between validations none is; `evaluate` that is stopped has no numbers."""
    often = ("--train.num_steps", "3", "--train.validate_every", "2", "--train.checkpoint_every", "1")
    often += ("--optim.warmup_steps", "0")
    trainer = runs.make_trainer(store, tmp_path / "run", *often)
    due, original = [], trainer._save

    def save() -> None:
        due.append(trainer.progress.validation_due)
        original()

    trainer._save = save  # type: ignore[method-assign]
    trainer.run()
    assert due == [False, False, False]
    stopped = evaluate(trainer.potential, trainer.valid, trainer.context, trainer.loss, stop=lambda: True)
    assert not stopped.complete
    assert stopped.per_source == {}
