"""Steps with a loss or gradient that is not finite or far above the usual: found, written out, left out."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megagnn.checkpoint.progress import Progress
from megagnn.checkpoint.single_file import load_checkpoint
from megagnn.cli import main
from megagnn.config import config_from_dict
from megagnn.data import keys
from megagnn.parallel.context import ParallelContext
from megagnn.train.bad_steps import ENOUGH, WINDOW, advance, judge, load_bad_batch
from megagnn.train.trainer import Trainer
from tests import runs

SHORT = ("--train.num_steps", "12", "--train.validate_every", "12", "--train.checkpoint_every", "4")
SKIP = ("--train.on_bad_step", "skip")
Spoil = Callable[[Trainer, torch.Tensor], torch.Tensor]


def spoiled(trainer: Trainer, steps: tuple[int, ...], spoil: Spoil) -> Trainer:
    """The trainer, whose loss or gradients are changed at some steps."""
    original = trainer.gradient_method

    def method(*arguments: Any) -> Any:
        loss, shares = original(*arguments)
        return (spoil(trainer, loss) if trainer.progress.step in steps else loss), shares

    trainer.gradient_method = method
    return trainer


def nan_loss(trainer: Trainer, loss: torch.Tensor) -> torch.Tensor:
    return loss * float("nan")


def infinite_gradient(trainer: Trainer, loss: torch.Tensor) -> torch.Tensor:
    grad = next(trainer.potential.parameters()).grad
    assert grad is not None
    grad.fill_(float("inf"))
    return loss


def large_gradient(trainer: Trainer, loss: torch.Tensor) -> torch.Tensor:
    for parameter in trainer.potential.parameters():
        if parameter.grad is not None:
            parameter.grad *= 1000
    return loss


# --- the decision ---


@pytest.mark.parametrize(
    ("loss", "norm", "recent", "factor", "fault"),
    [
        (1.0, 2.0, [], None, ""),
        (1.0, 1e9, [1.0] * WINDOW, None, ""),
        (1.0, 1e9, [1.0] * (ENOUGH - 1), 10.0, ""),
        (1.0, 9.9, [1.0] * ENOUGH, 10.0, ""),
        (
            1.0,
            10.1,
            [0.5] * 10 + [1.0] * 21 + [1e6] * 10,
            10.0,
            "10.1 is above optim.spike_factor 10 x 1, the",
        ),
        (float("nan"), 1.0, [], None, "the loss is not finite on 1 of 1 data-parallel rank(s)"),
        (float("-inf"), float("nan"), [], None, "the loss is not finite"),
        (1.0, float("nan"), [1.0] * ENOUGH, 10.0, "the gradient norm is nan"),
        (1.0, float("inf"), [1.0] * ENOUGH, 10.0, "the gradient norm is inf"),
    ],
)
def test_what_a_bad_step_is(
    loss: float, norm: float, recent: list[float], factor: float | None, fault: str
) -> None:
    found = judge(torch.tensor(loss), torch.tensor(norm), recent, factor, False, ParallelContext())
    assert fault in found.fault
    assert bool(found.fault) == bool(fault)
    assert not found.stop


def test_history() -> None:
    """Of good steps, and of the last of them; none where nobody asks."""
    config = config_from_dict({"optim": {"spike_factor": 10}})
    progress = Progress()
    for step in range(WINDOW + 5):
        progress = advance(progress, config, "bad" if step == 2 else "", torch.tensor(float(step)))
    assert progress.recent_norms == [float(step) for step in range(5, WINDOW + 5)]
    assert (progress.step, progress.skipped_steps, progress.bad_in_a_row) == (WINDOW + 5, 1, 0)
    assert advance(progress, config, "bad", torch.tensor(1.0)).bad_in_a_row == 1
    without = advance(Progress(), config_from_dict({}), "", torch.tensor(1.0))
    assert without == Progress(step=1, step_in_epoch=1)


def test_a_factor_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optim\.spike_factor"):
        config_from_dict({"optim": {"spike_factor": 0.5}})


# --- what the trainer does ---


@pytest.mark.parametrize(
    ("spoil", "what"), [(nan_loss, "the loss is not finite"), (infinite_gradient, "the gradient norm is inf")]
)
def test_stop_writes_the_batch(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Spoil, what: str
) -> None:
    trainer = spoiled(runs.make_trainer(store, tmp_path / "run", *SHORT), (5,), spoil)
    with pytest.raises(FloatingPointError, match=rf"{what}.* at step 5; .*is from before.*megagnn inspect"):
        trainer.run()
    assert load_checkpoint(trainer.last_path).progress.step == 4
    [path] = (tmp_path / "run" / "bad_batches").iterdir()
    assert path.name == "step-5-dp0.safetensors"
    batch, content = load_bad_batch(path)
    plan = trainer.train.sampler.batches(content["epoch"])[content["step_in_epoch"]]
    expected = trainer.train.dataset.batch(plan, torch.float32)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], tensor) for name, tensor in expected.items())
    for index, (path_of_store, number) in zip(plan, content["structures"], strict=True):
        assert path_of_store == str(store)
        record = trainer.train.dataset.stores[0].structure(number)
        assert (record[keys.POSITIONS] == trainer.train.dataset.record(int(index))[keys.POSITIONS]).all()
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert what in shown
    assert f"{store} structure {content['structures'][0][1]} (" in shown
    assert "largest force" in shown


def test_inspect_shows_the_suspicious_first(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = runs.make_trainer(store, tmp_path / "run", *SHORT)
    batch = next(trainer.train.batches())
    batch[keys.FORCES][-1, 0] = float("nan")
    trainer.train.stream = lambda *_: iter([(0, [batch])])  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="the loss is not finite"):
        trainer.run()
    assert main(["inspect", str(tmp_path / "run/bad_batches/step-0-dp0.safetensors")]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if "shortest edge" in line]
    assert len(rows) == len(batch[keys.NUM_ATOMS]) > 1
    assert "NOT FINITE" in rows[0]
    assert not any("NOT FINITE" in row for row in rows[1:])


@pytest.mark.parametrize("implementation", ["own", "torch"])
def test_a_skipped_step_leaves_everything_as_it_was(store: Path, tmp_path: Path, implementation: str) -> None:
    options = (*SHORT, *SKIP, "--optim.implementation", implementation, "--train.num_steps", "6")
    trainer = spoiled(runs.make_trainer(store, tmp_path / "run", *options), (5,), infinite_gradient)
    before: list[dict[str, torch.Tensor]] = []
    original = trainer._save

    def keep() -> None:
        original()
        trainer.checkpoints.wait()
        before.append(load_checkpoint(trainer.last_path, optimizer=True).tensors)

    trainer._save = keep  # type: ignore[method-assign]
    trainer.config = dataclasses.replace(
        trainer.config, train=dataclasses.replace(trainer.config.train, checkpoint_every=5)
    )
    assert trainer.run() == ""
    after = load_checkpoint(trainer.last_path, optimizer=True)
    assert after.progress.step == 6
    assert after.progress.step_in_epoch + after.progress.epoch > 0
    assert after.progress.skipped_steps == 1
    assert all(torch.equal(before[0][name], tensor) for name, tensor in after.tensors.items())
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("optim/skipped_steps")] == [(6, 1.0)]


def test_at_most_so_many_in_a_row(store: Path, tmp_path: Path) -> None:
    options = (*SHORT, *SKIP, "--train.max_bad_steps", "2")
    trainer = spoiled(runs.make_trainer(store, tmp_path / "a", *options), (2, 3, 5, 6), nan_loss)
    trainer.run()
    assert trainer.progress.skipped_steps == 4
    trainer = spoiled(runs.make_trainer(store, tmp_path / "b", *options), (2, 3, 4), nan_loss)
    with pytest.raises(
        FloatingPointError, match=r"after 2 bad steps in a row \(train\.max_bad_steps\) at step 4"
    ):
        trainer.run()


def test_a_spike_is_skipped_and_a_resumed_run_skips_it_too(store: Path, tmp_path: Path) -> None:
    """The history of norms is part of the checkpoint: without it the resumed run would take the step."""
    options = (
        "--train.num_steps",
        "30",
        "--train.checkpoint_every",
        "22",
        "--optim.spike_factor",
        "50",
        *SKIP,
    )
    whole = spoiled(runs.make_trainer(store, tmp_path / "whole", *options), (25,), large_gradient)
    whole.run()
    assert whole.progress.skipped_steps == 1
    first = runs.make_trainer(store, tmp_path / "parts", *options)
    original = first._save

    def save_and_stop() -> None:
        original()
        raise KeyboardInterrupt

    first._save = save_and_stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.run()
    forgetful = Trainer(first.config, ParallelContext(), resume=True)
    forgetful.progress = dataclasses.replace(forgetful.progress, recent_norms=[])
    forgetful._save = lambda: None  # type: ignore[method-assign]
    spoiled(forgetful, (25,), large_gradient).run()
    assert forgetful.progress.skipped_steps == 0, "the mistake: a history that starts again"
    spoiled(Trainer(first.config, ParallelContext(), resume=True), (25,), large_gradient).run()
    expected, got = (
        load_checkpoint(tmp_path / name / "checkpoints/last", optimizer=True) for name in ("whole", "parts")
    )
    assert got.progress == expected.progress
    assert len(got.progress.recent_norms) == 29
    assert all(torch.equal(got.tensors[name], tensor) for name, tensor in expected.tensors.items())


# --- several batches to a step ---


def test_steps_of_several_batches(store: Path, tmp_path: Path) -> None:
    """Positions count optimizer steps; all have as many batches, the epoch's last one, too; a run resumes in
    between."""
    options = ("--optim.accumulate_steps", "3", "--train.num_steps", "10", "--train.checkpoint_every", "3")
    trainer = runs.make_trainer(store, tmp_path / "run", *options)
    num = len(trainer.train.sampler.plan(0))
    assert num % 3 == 0
    num_steps = num // 3
    assert num_steps > 1
    steps = [[batch[keys.STRUCTURE].tolist() for batch in step] for step in trainer.train.steps(0, 0)]
    assert [len(step) for step in steps] == [3] * num_steps
    assert sorted(k for step in steps for batch in step for k in batch) == list(
        range(len(trainer.train.dataset))
    )
    rest = [[batch[keys.STRUCTURE].tolist() for batch in step] for step in trainer.train.steps(0, 1)]
    assert rest == steps[1:]
    assert list(trainer.train.steps(0, num_steps)) == []
    with pytest.raises(ValueError, match="was the run started with other data"):
        next(trainer.train.steps(0, num_steps + 1))
    trainer.run()
    assert trainer.progress.step == 10
    assert trainer.progress.epoch == 9 // num_steps
    again = runs.make_trainer(store, tmp_path / "parts", *options)
    original = again._save

    def save_and_stop() -> None:
        original()
        if again.progress.step == 3:
            raise KeyboardInterrupt

    again._save = save_and_stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        again.run()
    Trainer(again.config, ParallelContext(), resume=True).run()
    expected, got = (
        load_checkpoint(tmp_path / name / "checkpoints/last", optimizer=True) for name in ("run", "parts")
    )
    assert got.progress == expected.progress
    assert all(torch.equal(got.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_all_batches_of_a_bad_step_are_written(store: Path, tmp_path: Path) -> None:
    options = ("--optim.accumulate_steps", "3", *SHORT)
    trainer = spoiled(runs.make_trainer(store, tmp_path / "run", *options), (2,), nan_loss)
    with pytest.raises(FloatingPointError, match=r"step-2-dp\*\.safetensors"):
        trainer.run()
    names = sorted(path.name for path in (tmp_path / "run" / "bad_batches").iterdir())
    assert names == [f"step-2-dp0-{number}.safetensors" for number in range(3)]


def test_resume_with_another_number_of_batches_is_refused(
    store: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.train(store, run_dir, "--resume", "--optim.accumulate_steps", "2") == 2
    assert "optim.accumulate_steps was 1 and is now 2" in capsys.readouterr().err


def test_medians_are_of_20_to_100_norms() -> None:
    assert (ENOUGH, WINDOW) == (20, 100)
