"""Training on direct forces first (`train.direct_steps`): the same weights go on to conservative forces."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megagnn.checkpoint.single_file import load_checkpoint, open_checkpoint
from megagnn.config import config_from_dict
from megagnn.launch.context import parallel_context
from megagnn.models.family import step_flops
from megagnn.objective.loss import weight_at
from megagnn.objective.terms import TERMS
from megagnn.scaling.records import read_records
from megagnn.scaling.sweep import load_sweep
from megagnn.scaling.sweep_run import run_one
from megagnn.train.pretraining import parts_of
from megagnn.train.trainer import Trainer
from tests import runs

STEPS = ("--train.direct_steps", "4", "--train.num_steps", "3", "--optim.warmup_steps", "1")
SHORT = (*STEPS, "--train.validate_every", "1000", "--train.threads", "1")
FAMILIES = ("egnn", "painn", "cartesian")


@pytest.mark.parametrize("family", FAMILIES)
def test_conservative_training_begins_with_the_weights(store: Path, tmp_path: Path, family: str) -> None:
    """Weights and average are those of the direct run's end, whose head for forces is left behind; so are
    references, the output scale and the mean number of neighbours."""
    out = tmp_path / "run"
    options = ("--model.family", family, *SHORT)
    assert runs.train(store, out, *options) == 0
    direct = load_checkpoint(out / "direct" / "checkpoints" / "last")
    assert direct.config.model.forces == "direct"
    assert direct.progress.step == 4
    config = open_checkpoint(out / "checkpoints" / "last").config
    assert config.model.forces == "conservative"
    with parallel_context("cpu", 1, config.parallel, {}) as context:
        trainer = Trainer(config, context)
    begun = dict(trainer.potential.model.named_parameters())
    kept = {name: direct.tensors[f"average/{name}"] for name in begun}
    assert all(torch.equal(begun[name].detach(), kept[name]) for name in begun)
    left = {name.removeprefix("average/") for name in direct.tensors if name.startswith("average/")}
    assert left - begun.keys()
    assert all("layers." in name or "force" in name for name in left - begun.keys())
    assert trainer.statistics == direct.statistics


@pytest.mark.parametrize("ends_at", [2, 5])
def test_resume_gives_the_same_bits(
    store: Path, tmp_path: Path, ends_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the direct part, or in the conservative one, and continued."""
    assert runs.train(store, tmp_path / "a", *SHORT) == 0
    taken, step = [], Trainer._step

    def stops(self: Trainer, batches: object, monitor: object, signals: object) -> bool:
        if len(taken) == ends_at:
            raise KeyboardInterrupt
        taken.append(1)
        return step(self, batches, monitor, signals)  # type: ignore[arg-type]

    every = ("--train.checkpoint_every", "1")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stops)
        assert runs.train(store, tmp_path / "b", *SHORT, *every) == 130
    assert len(taken) == ends_at
    assert runs.train(store, tmp_path / "b", *SHORT, *every, "--resume") == 0
    a, b = (load_checkpoint(tmp_path / name / "checkpoints" / "last") for name in "ab")
    assert a.progress.step == b.progress.step == 3
    assert all(torch.equal(value, b.tensors[name]) for name, value in a.tensors.items())


def test_an_earlier_run_is_refused_before_the_first_step(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever part left it; --overwrite replaces both."""
    options = ("--train.num_steps", "1", "--optim.warmup_steps", "0", "--train.threads", "1")
    assert runs.train(store, tmp_path / "run", *options) == 0
    assert runs.train(store, tmp_path / "run", *SHORT) == 2
    assert "holds an earlier run" in capsys.readouterr().err
    assert not (tmp_path / "run" / "direct").exists()
    assert runs.train(store, tmp_path / "run", *SHORT, "--overwrite") == 0
    assert open_checkpoint(tmp_path / "run" / "checkpoints" / "last").progress.step == 3


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"direct_steps is 5, .*model.forces is 'direct'"):
        config_from_dict({"train": {"direct_steps": 5}, "model": {"forces": "direct"}})
    with pytest.raises(ValueError, match=r"warmup_steps \(7\) must be below train.direct_steps \(5\)"):
        config_from_dict({"train": {"direct_steps": 5, "num_steps": 9}, "optim": {"warmup_steps": 7}})
    own = config_from_dict({"train": {"num_steps": 9}, "optim": {"warmup_steps": 7}})
    assert parts_of(own) == [own]


def test_weights_of_the_loss_rise_in_the_last_part_only() -> None:
    """Direct forces are trained with the weights of the beginning, by which their validations judge, too."""
    loss = {"final_energy_factor": 20.0, "final_force_factor": 2.0, "stress_weight": 1.0}
    both = config_from_dict({"train": {"direct_steps": 500}, "loss": loss, "model": {"stress": True}})
    direct, last = parts_of(both)
    assert last.loss == both.loss
    for term in TERMS:
        assert weight_at(direct.loss, term, 1.0) == weight_at(direct.loss, term, 0.0)
    assert weight_at(direct.loss, "energy", 1.0) == both.loss.energy_weight


def test_a_sweep_counts_both_parts(store: Path, tmp_path: Path) -> None:
    """Operations are those of the direct steps and of the conservative ones."""
    (tmp_path / "config.toml").write_text(
        f'[model]\nwidth = 8\nnum_layers = 2\nnum_radial = 4\ncutoff = 4.0\n[data]\npaths = ["{store}"]\n'
        '[train]\ndevice = "cpu"\n[optim]\nwarmup_steps = 1\n'
    )
    (tmp_path / "sweep.toml").write_text(
        f'config = "config.toml"\nout_dir = "{tmp_path / "sweep"}"\n[[runs]]\nsteps = 3\n'
        '"train.direct_steps" = 4\n[[runs]]\nsteps = 3\n'
    )
    sweep = load_sweep(tmp_path / "sweep.toml")
    for run in sweep.runs:
        run_one(sweep, run)
    both, alone = (json.loads(line) for line in sweep.results.read_text().splitlines())
    model = sweep.runs[0].config.model
    ratio = step_flops(replace(model, forces="direct"), 1, 20) / step_flops(model, 1, 20)
    assert both["flops"] / alone["flops"] == pytest.approx(1 + ratio * 4 / 3, rel=0.05)
    assert len(read_records([sweep.results])) == 2
