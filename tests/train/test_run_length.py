"""How long a run is: steps, passes over the data, or until nothing gets better; its lines of JSON."""

import json
from pathlib import Path
from typing import Any

import pytest

from megagnn.checkpoint.single_file import open_checkpoint
from megagnn.cli import main
from megagnn.config import config_from_dict, with_num_steps
from megagnn.train.trainer import Trainer
from tests import runs
from tests.train.test_trainer import scalars


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_epochs_make_the_steps(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = runs.make_trainer(store, tmp_path / "run", "--train.num_epochs", "3")
    lengths = [len(trainer.train.sampler.batches(epoch)) for epoch in range(3)]
    assert trainer.config.train.num_steps == sum(lengths)
    assert runs.train(store, tmp_path / "run", "--train.num_epochs", "3") == 0
    progress = open_checkpoint(tmp_path / "run" / "checkpoints" / "last").progress
    assert (progress.step, progress.epoch) == (sum(lengths), 2)
    assert progress.step_in_epoch == lengths[2]
    capsys.readouterr()
    assert runs.train(store, tmp_path / "run", "--train.num_epochs", "3", "--resume") == 0
    assert "other settings" not in capsys.readouterr().err


def test_epochs_count_optimizer_steps(store: Path, tmp_path: Path) -> None:
    overrides = ("--train.num_epochs", "2", "--optim.accumulate_steps", "2", "--optim.warmup_steps", "1")
    trainer = runs.make_trainer(store, tmp_path / "run", *overrides)
    steps = [len(list(trainer.train.steps(epoch, 0))) for epoch in range(2)]
    assert trainer.config.train.num_steps == sum(steps)


def test_epochs_end_with_the_data_on_another_number_of_ranks(store: Path, tmp_path: Path) -> None:
    """What is left of an epoch is counted by structures: a run that goes on on one rank, begun on two."""
    overrides = ("--train.num_epochs", "3", "--optim.warmup_steps", "1")
    trainer = runs.make_trainer(store, tmp_path / "run", *overrides)
    loader, whole = trainer.train, len(trainer.train.dataset)
    # as after step 2 of epoch 1 on two ranks: the plan of one rank leaves out what they have seen
    two = loader.sampler.on_ranks(2)
    seen = two.num_structures(1, 2)
    left = loader.steps_left(3, 1, 0, seen)
    structures = sum(map(len, loader.sampler.batches(1, seen))) + sum(map(len, loader.sampler.batches(2)))
    assert structures == 2 * whole - seen
    assert left == len(loader.sampler.batches(1, seen)) + len(loader.sampler.batches(2))
    assert loader.steps_left(3, 3, 0, 0) == 0


def test_a_long_warm_up_is_judged_when_the_epochs_are_counted() -> None:
    config = config_from_dict({"train": {"num_epochs": 1000}, "optim": {"warmup_steps": 12000}})
    with pytest.raises(
        ValueError, match=r"\(12000\) must be below the 9000 steps of train.num_epochs = 1000"
    ):
        with_num_steps(config, 9000)
    assert with_num_steps(config, 50000).train.num_steps == 50000


def test_warm_up_must_fit_the_epochs(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--train.num_epochs", "1", "--optim.warmup_steps", "50")
    assert runs.train(store, tmp_path / "run", *arguments) == 2
    assert "steps of train.num_epochs = 1; use at most" in capsys.readouterr().err


def test_patience_ends_a_run_that_gets_no_better(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Best at step 10, and not better at 20, 30: the run ends there, with all that a finished run leaves."""
    losses = iter([3.0, 2.0, 2.5, 2.0, 1.0, 1.0])
    import megagnn.train.trainer as module

    judged = module.evaluate

    def scripted(*arguments: Any, **keywords: Any) -> Any:
        return judged(*arguments, **keywords).__class__({}, next(losses))

    monkeypatch.setattr(module, "evaluate", scripted)
    settings = (
        *("--train.validate_every", "5", "--train.patience", "2", "--train.checkpoint_every", "100"),
        *("--loss.final_energy_factor", "1"),  # else the best is sought anew at the end
    )
    assert runs.train(store, tmp_path / "run", *settings) == 0
    progress = open_checkpoint(tmp_path / "run" / "checkpoints" / "last").progress
    assert (progress.step, progress.best_step) == (20, 10)
    assert "lowest at step 10, 2 validations ago; this ends the run" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "best.safetensors").exists()
    assert "validation" in scalars(tmp_path / "run").Tags()["images"]
    # started once more it ends at once; with more patience it goes on, to the next that are no better
    assert runs.train(store, tmp_path / "run", *settings, "--resume") == 0
    assert open_checkpoint(tmp_path / "run" / "checkpoints" / "last").progress.step == 20
    more = [*settings[:3], "3", *settings[4:], "--train.num_steps", "30"]
    assert runs.train(store, tmp_path / "run", *more, "--resume") == 0
    assert open_checkpoint(tmp_path / "run" / "checkpoints" / "last").progress.best_step == 25


def test_patience_that_can_never_act(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.train(store, tmp_path / "run", "--train.patience", "3") == 2
    assert "times train.validate_every 20 is not below train.num_steps 60" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_lines_hold_what_tensorboard_holds(run_dir: Path) -> None:
    lines = lines_of(run_dir)
    events = scalars(run_dir)
    for tag in events.Tags()["scalars"]:
        expected = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(tag)]
        assert [(line["step"], line[tag]) for line in lines if tag in line] == expected
    processor = [line["speed/processor_seconds"] for line in lines if "speed/processor_seconds" in line]
    assert processor == sorted(processor)
    assert 0 < processor[0] < processor[-1]


def test_a_resumed_run_goes_on_with_its_lines(store: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(trainer: Trainer) -> None:
        step = trainer._step

        def limited(*arguments: Any) -> bool:
            if trainer.progress.step == 33:
                raise Killed
            return step(*arguments)

        trainer._step = limited  # type: ignore[method-assign]

    trainer = runs.make_trainer(store, tmp_path / "run")
    kill(trainer)
    with pytest.raises(Killed):
        trainer.run()
    path = tmp_path / "run" / "metrics.jsonl"
    assert max(line["step"] for line in lines_of(tmp_path / "run")) == 30
    path.write_text(path.read_text() + '{"step": 35, "loss/train": 1.0}\n{"step": 3')  # as a kill cuts it
    trainer = runs.make_trainer(store, tmp_path / "run", resume=True)
    start = trainer.progress.step
    assert trainer.run() == ""
    steps = [line["step"] for line in lines_of(tmp_path / "run") if "loss/train" in line]
    assert start == 30
    assert steps == list(range(5, 65, 5))


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    from megagnn.parallel.context import ParallelContext
    from megagnn.train.monitor import Monitor

    with Monitor(tmp_path, 5, 0, ParallelContext()) as monitor:
        monitor.log(1, {"a": float("nan"), "b": 2.0})
    (line,) = lines_of(tmp_path)
    assert (line["step"], line["a"], line["b"]) == (1, None, 2.0)


def test_validation_lines_show_the_stress(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.train(store, tmp_path / "run", "--train.num_steps", "20") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "validation loss" in line]
    assert said
    assert "meV/Å^3" in said[0]


def test_weights_of_kinds_and_sources(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = runs.make_trainer(store, tmp_path / "run", "--data.source_weights.crystals", "0.25")
    found = {
        float(trainer.train.dataset.record(i)["weights"][0])
        for i, name in enumerate(trainer.train.dataset.source_names())
        if name == "crystals"
    }
    assert found == {0.25}
    assert float(trainer.train.dataset[0]["weights"][0]) == 1.0
    assert main(["train", str(tmp_path / "config.toml"), "--data.paths", str(store),
                 "--data.source_weights.cluster", "2"]) == 2  # fmt: skip
    assert (
        "names 'cluster', which no structure of the data has; nearest: 'clusters'" in capsys.readouterr().err
    )
