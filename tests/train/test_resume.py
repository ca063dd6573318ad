"""What a resumed run takes over: random states, and the place in the epoch on another number of ranks."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagnn.checkpoint.folder import FolderCheckpoint
from megagnn.checkpoint.import_file import import_checkpoint
from megagnn.checkpoint.progress import Progress
from megagnn.checkpoint.single_file import load_checkpoint, save_checkpoint
from megagnn.data import keys
from megagnn.data.sampler import BudgetSampler
from megagnn.models.statistics import Statistics
from megagnn.train.resume import _same_data, _same_new_data, position_of
from tests import runs


class StoppingError(Exception):
    pass


def draws(trainer: "runs.Trainer", stop: int) -> list[tuple[float, ...]]:
    """What the generators give in each step, until a step and no further."""
    original, found = trainer.gradient_method, []

    def drawing(*arguments: Any) -> Any:
        if trainer.progress.step == stop:
            trainer.checkpoints.wait()
            raise StoppingError
        found.append((float(torch.rand(())), np.random.normal(), np.random.rand(), random.gauss(0, 1)))
        return original(*arguments)

    trainer.gradient_method = drawing
    with pytest.raises(StoppingError):
        trainer.run()
    return found


@pytest.mark.parametrize("restored", [True, False])
def test_random_states_continue(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored: bool
) -> None:
    """An odd number of Gaussians is drawn, of which NumPy and Python make two at once."""
    often = ("--train.checkpoint_every", "3")
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(1)
    whole = draws(runs.make_trainer(store, tmp_path / "whole", *often), 12)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(1)
    first = draws(runs.make_trainer(store, tmp_path / "parts", *often), 5)
    if not restored:  # the mistake
        monkeypatch.setattr(FolderCheckpoint, "restore_random_state", lambda *_: None)
    second = draws(runs.make_trainer(store, tmp_path / "parts", *often, resume=True), 12)
    assert len(second) == 9
    assert (first[:3] + second == whole) is restored


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(0, 6), st.data())
def test_on_other_ranks_the_epoch_goes_on(
    then: int, now: int, per_step: int, epoch: int, data: st.DataObject
) -> None:
    """Every structure of the epoch comes once, before or after the change, or after two."""
    atoms = np.random.default_rng(3).integers(1, 30, 150)
    edges = atoms * 11

    def sampler(dp_size: int) -> BudgetSampler:
        return BudgetSampler(
            atoms, edges, max_atoms=60, max_edges=900, dp_size=dp_size, seed=7, per_step=per_step
        )

    seen: list[int] = []
    progress = Progress(epoch=epoch, dp_size=then)
    for ranks in (then, now, then):
        progress = position_of(progress, sampler(ranks))
        plan = sampler(ranks).plan(epoch, progress.first_structure)
        assert progress.dp_size == ranks
        assert len(plan) % per_step == 0
        upto = data.draw(st.integers(progress.step_in_epoch, len(plan) // per_step))
        taken = plan[progress.step_in_epoch * per_step : upto * per_step]
        seen += [int(k) for step in taken for batch in step for k in batch]
        progress = Progress(
            epoch=epoch, dp_size=ranks, step_in_epoch=upto, first_structure=progress.first_structure
        )
    rest = sampler(then).plan(epoch, progress.first_structure)[progress.step_in_epoch * per_step :]
    seen += [int(k) for step in rest for batch in step for k in batch]
    assert sorted(seen) == list(range(150))


def test_a_run_of_two_ranks_goes_on_alone(
    store: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says that batches change, and sees the rest of the epoch, no structure of which comes twice."""
    loaded = load_checkpoint(folder, optimizer=True)
    file, run = tmp_path / "two.safetensors", tmp_path / "run"
    progress = replace(loaded.progress, step=20, epoch=5, step_in_epoch=1, dp_size=2)
    save_checkpoint(file, loaded.config, loaded.statistics, progress, loaded.tensors)
    import_checkpoint(file, run)
    trainer = runs.make_trainer(store, run, resume=True)
    told = capsys.readouterr().err
    assert "was trained on 2 data-parallel rank(s), this is 1" in told
    assert "set parallel.data = 2" in told
    sampler = trainer.train.sampler
    before = [int(k) for batch in sampler.on_ranks(2).plan(5)[0] for k in batch]
    assert trainer.progress.first_structure == len(before) > 0
    original = trainer._step
    counts = {"sum": 0}

    def step(batches: list[dict[str, torch.Tensor]], *others: Any) -> bool:
        if trainer.progress.epoch > 5:
            raise StoppingError
        counts["sum"] += sum(len(batch[keys.NUM_ATOMS]) for batch in batches)
        return original(batches, *others)

    trainer._step = step  # type: ignore[method-assign]
    with pytest.raises(StoppingError):
        trainer.run()
    assert counts["sum"] + len(before) == len(trainer.train.dataset)
    rest = [k for batch in sampler.batches(5, len(before)) for k in batch.tolist()]
    assert sorted(before + rest) == list(range(len(trainer.train.dataset)))
    assert trainer.progress.first_structure == 0, "the next epoch is whole again"


def test_on_the_same_ranks_nothing_changes() -> None:
    atoms = np.full(40, 3)
    sampler = BudgetSampler(atoms, atoms, max_atoms=6, max_edges=100, dp_size=2)
    progress = Progress(epoch=1, step_in_epoch=3, dp_size=2)
    assert position_of(progress, sampler) is progress
    tail = [batch.tolist() for step in sampler.plan(1, 12) for batch in step]
    assert tail == [batch.tolist() for step in sampler.plan(1)[3:] for batch in step], (
        "3 steps of 4 structures"
    )
    with pytest.raises(ValueError, match="cannot start at structure 41 of an epoch: there are 40"):
        sampler.check_position(1, 0, 41)


STATISTICS = Statistics(
    elements=(1, 8),
    sources=("a",),
    levels=("x",),
    source_elements=((1, 8),),
    source_levels=((0,),),
    references=((-13.0, -2000.0),),
    mean_energy=(-700.0,),
    mean_neighbours=5.0,
    output_scale=1.5,
)


def test_the_same_data_are_known_by_what_was_fitted_on_them() -> None:
    """Roundings and references may differ; without forces the scale may, too."""
    assert _same_data(STATISTICS, replace(STATISTICS, references=((0.0, 0.0),), shifts=(1.0,)), True)
    assert _same_data(STATISTICS, replace(STATISTICS, mean_neighbours=5.0 + 1e-7), True)
    for change in ({"mean_neighbours": 5.1}, {"mean_energy": (-701.0,)}, {"levels": ("y",)}):
        assert not _same_data(STATISTICS, replace(STATISTICS, **change), True)
        assert not _same_data(STATISTICS, replace(STATISTICS, **change), False)
    other_scale = replace(STATISTICS, output_scale=1.6)
    assert not _same_data(STATISTICS, other_scale, True)
    assert _same_data(STATISTICS, other_scale, False)


def test_new_data_of_a_fine_tuned_run() -> None:
    """The checkpoint may hold more elements than they do; all else must be equal."""
    fewer = replace(STATISTICS, source_elements=((8,),), output_scale=9.0)
    assert _same_new_data(STATISTICS, fewer)
    assert not _same_new_data(fewer, STATISTICS)
    for change in (
        {"mean_energy": (-701.0,)},
        {"sources": ("b",)},
        {"levels": ("y",)},
        {"source_levels": ((0, 1),)},
    ):
        assert not _same_new_data(STATISTICS, replace(STATISTICS, **change))
