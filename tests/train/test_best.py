"""`best`: sought anew with the final weights of the loss, and where a resumed run judges by other losses."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import megagnn.train.trainer as module
from megagnn.checkpoint.folder import follow
from megagnn.data.store import write_store
from megagnn.train.trainer import Trainer
from tests import runs

SHORT = ("--train.num_steps", "8", "--train.validate_every", "4", "--optim.warmup_steps", "1")
# Of each of its keys another value makes losses that are far larger.
LOSS = ("--loss.energy", "huber", "--loss.forces", "huber", "--loss.energy_weight", "1")
LONGER = ("--train.num_steps", "12", *SHORT[2:])


def best_of(out_dir: Path) -> tuple[int, float]:
    """Step of the best checkpoint, and its validation loss."""
    folder = follow(out_dir / "checkpoints" / "best")
    progress = json.loads((folder / "manifest.json").read_text())["progress"]
    return progress["best_step"], progress["best_loss"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--loss.force_weight", "1000"), "loss.force_weight"),
        (("--loss.forces", "mse", "--loss.huber_delta", "1e-6"), "loss.forces, loss.huber_delta"),
        (("--data.source_weights.clusters", "1000"), "data.source_weights.clusters"),
        ((), ""),
    ],
)
def test_best_moves_again_after_another_loss(
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    named: str,
) -> None:
    """Losses that are so much larger would never be the lowest; without a change they are compared."""
    out = tmp_path / "run"
    assert runs.train(store, out, *SHORT, *LOSS) == 0
    step, loss = best_of(out)
    assert step == 8
    capsys.readouterr()
    assert runs.train(store, out, *LONGER, *LOSS, *options, "--resume") == 0
    told = capsys.readouterr().err
    assert ("validation losses cannot be compared with those before" in told) == bool(named)
    assert (
        f"for {named} changed: the best checkpoint is sought anew, and that of step 8 stays" in told
        or not named
    )
    after, new_loss = best_of(out)
    assert after == 12
    if named:
        assert new_loss > loss, "without the reset it could not have moved"


def test_until_the_next_validation_the_old_best_stays(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert runs.train(store, out, *SHORT) == 0
    options = ("--train.num_steps", "20", "--train.validate_every", "4", "--loss.energy_weight", "50")
    trainer = runs.make_trainer(store, out, *options, resume=True)
    assert (trainer.progress.best_loss, trainer.progress.best_step) == (float("inf"), 8)
    original = trainer._step

    def step(*arguments: object) -> bool:
        return original(*arguments) or trainer.progress.step == 10  # type: ignore[arg-type]

    trainer._step = step  # type: ignore[method-assign]
    trainer.run()
    assert follow(trainer.best_path).name == "step-00000008"
    again = runs.make_trainer(store, out, *options, resume=True)
    assert again.progress.best_loss == float("inf"), "still sought, though nothing has changed since"


def test_other_validation_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The store is made anew with the same training split and another validation split."""
    store, out = tmp_path / "store", tmp_path / "run"
    runs.write_data(store)
    assert runs.train(store, out, *SHORT) == 0
    records = runs.structures()
    by_group = np.array([0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 2, 1], dtype=np.uint8)
    splits = np.array([by_group[int(s.group) // 2] for s in records], dtype=np.uint8)
    write_store(store, records, splits=splits, overwrite=True)
    capsys.readouterr()
    assert runs.train(store, out, *LONGER, "--resume") == 0
    assert "for the validation split changed" in capsys.readouterr().err
    assert best_of(out)[0] == 12


def test_a_checkpoint_that_does_not_say_what_it_was_validated_on(store: Path, tmp_path: Path) -> None:
    """One of an earlier version keeps its best loss."""
    out = tmp_path / "run"
    trainer = runs.make_trainer(store, out, *SHORT)
    trainer.progress = dataclasses.replace(trainer.progress, validated_on="", best_loss=1e-9, best_step=0)
    trainer._save()
    trainer.checkpoints.wait()
    again = runs.make_trainer(store, out, *SHORT, resume=True)
    assert again.progress.best_loss == 1e-9
    assert again.progress.validated_on


def test_patience_begins_anew_with_the_loss(store: Path, tmp_path: Path) -> None:
    """A run that validations ended goes on where another loss judges."""
    out, patience = tmp_path / "run", ("--train.patience", "1")
    trainer = runs.make_trainer(store, out, *SHORT, *patience)
    trainer.progress = dataclasses.replace(trainer.progress, step=4, best_loss=1e-9, best_step=0)
    assert trainer._is_done
    trainer._save()
    trainer.checkpoints.wait()
    again = runs.make_trainer(store, out, *SHORT, *patience, resume=True)
    assert again._is_done
    other = runs.make_trainer(store, out, *SHORT, *patience, "--loss.force_weight", "3", resume=True)
    assert not other._is_done
    other.run()
    assert best_of(out)[0] > 4


SCRIPT = {2: 3.0, 4: 1.0, 6: 1.5, 8: 2.0, 10: 2.2, 12: 2.1}
"""Validation losses by step, the lowest before the weights are final."""


def follow_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let validations find these losses."""
    judged = module.evaluate
    evaluated = module.Trainer._validate

    def validate(trainer: Trainer, *arguments: Any) -> tuple[bool, bool]:
        def scripted(*given: Any, **keywords: Any) -> Any:
            return dataclasses.replace(judged(*given, **keywords), loss=SCRIPT[trainer.progress.step])

        monkeypatch.setattr(module, "evaluate", scripted)
        return evaluated(trainer, *arguments)

    monkeypatch.setattr(module.Trainer, "_validate", validate)


@pytest.mark.parametrize(
    ("factor", "change", "best", "stops_at"),
    [
        ("10", "[0.25, 0.5]", 8, None),  # the checkpoint of step 6 has taken no step with the final weights
        ("10", "[0.25, 0.5]", 8, 9),
        ("10", "[0.9, 0.9]", 12, 4),
        ("10", "[0.2, 0.25]", 4, None),
        ("10", "[0.25, 1.0]", 4, None),  # nor has any
        ("1", "[0.25, 0.5]", 4, None),
    ],
)
def test_best_is_sought_anew_with_the_final_weights(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    factor: str,
    change: str,
    best: int,
    stops_at: int | None,
) -> None:
    """Not among checkpoints from before, whatever their loss; with constant weights among all. A run that was
    stopped in between and resumed finds the same one."""
    out = tmp_path / "run"
    every = ("--train.validate_every", "2", "--train.num_steps", "12", "--optim.warmup_steps", "1")
    options = (*every, "--loss.final_energy_factor", factor, "--loss.change", change)
    trainer = runs.make_trainer(store, out, *options)
    follow_the_script(monkeypatch)
    if stops_at is not None:
        original = trainer._step

        def step(*arguments: object) -> bool:
            return original(*arguments) or trainer.progress.step == stops_at  # type: ignore[arg-type]

        trainer._step = step  # type: ignore[method-assign]
        trainer.run()
        trainer = runs.make_trainer(store, out, *options, resume=True)
    trainer.run()
    assert best_of(out) == (best, SCRIPT[best])


@pytest.mark.parametrize(
    ("change", "patience", "best", "ends_at"),
    [
        ("", "2", 4, 8),  # by default weights begin to change at 7.2 and are final from 10.8 on
        ("[0.25, 0.5]", "2", 8, 12),  # step 8 is judged anew, and begins the waiting anew
        ("[0.2, 0.25]", "2", 4, 8),
    ],
)
def test_patience_where_weights_change(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    patience: str,
    best: int,
    ends_at: int,
) -> None:
    """It may end a run before the change; the first validation after it is the best so far, whatever its
    loss."""
    out = tmp_path / "run"
    every = ("--train.validate_every", "2", "--train.num_steps", "12", "--optim.warmup_steps", "1")
    options = (*every, "--train.patience", patience, *(("--loss.change", change) if change else ()))
    trainer = runs.make_trainer(store, out, *options)
    follow_the_script(monkeypatch)
    trainer.run()
    assert trainer.progress.step == ends_at
    assert best_of(out) == (best, SCRIPT[best])
