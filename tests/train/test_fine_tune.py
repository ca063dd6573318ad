"""Runs that begin with a checkpoint: what they keep, what they add, and what they refuse."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule

from megagnn.cli import main
from megagnn.config import config_from_dict
from megagnn.data import keys
from megagnn.data.dataset import StructureDataset
from megagnn.data.record import Structure
from megagnn.data.store import write_store
from megagnn.models.potential import Potential
from megagnn.train.checkpoint import load_checkpoint, load_potential
from megagnn.train.fine_tune import run_config
from tests import runs

FEW = ("--train.num_steps", "4", "--optim.warmup_steps", "1", "--train.validate_every", "4")
DOUBLE = ("--train.dtype", "float64")


def gold(level: str = "EMT", source: str = "gold", element: str = "Au", seed: int = 3) -> list[Structure]:
    """12 rattled crystals of an alloy of copper with an element that the first data lack; each its group."""
    rng, found = np.random.default_rng(seed), []
    for k in range(12):
        atoms = bulk(element, "fcc", a=3.9, cubic=True)
        atoms.numbers[: k % 3] = 29
        atoms.positions += rng.normal(scale=0.1, size=atoms.positions.shape)
        found.append(dataclasses.replace(runs.labelled(atoms, source, f"{source} {k}"), level=level))
    return found


def write_gold(path: Path, records: list[Structure] | None = None) -> Path:
    records = gold() if records is None else records
    splits = np.array([(0, 0, 1, 0, 0, 2)[k % 6] for k in range(len(records))], dtype=np.uint8)
    write_store(path, records, splits=splits)
    return path


@pytest.fixture(scope="module")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gold(tmp_path_factory.mktemp("gold") / "store")


def tune(checkpoint: Path, data: Path, out: Path, *more: str) -> int:
    return runs.train(data, out, "--init_from", str(checkpoint), *FEW, *more)


def predicted(potential: Potential, store: Path, split: str = "test") -> dict[str, torch.Tensor]:
    """Energies without references, and forces, of structures of a store."""
    statistics = potential.statistics
    data = StructureDataset([store], split, potential.model.config.cutoff)
    source = [statistics.sources.index(s) if s in statistics.sources else 0 for s in data.sources]
    level = [statistics.levels.index(name) for name in data.levels]
    batch = data.batch(range(len(data)), potential.model.precision.geometry)
    batch[keys.SOURCE] = torch.tensor(source)[batch[keys.SOURCE]]
    batch[keys.LEVEL] = torch.tensor(level)[batch[keys.LEVEL]]
    found = potential(batch)
    return {
        "energy": found[keys.ENERGY] - potential.model.reference_energy(batch),
        "forces": found[keys.FORCES],
    }


@pytest.mark.parametrize("form", ["folder", "file", "run"])
def test_the_function_is_kept(
    run_dir: Path, store: Path, new_store: Path, tmp_path: Path, form: str
) -> None:
    """On old structures energies without references and forces are those of the checkpoint; the run is new."""
    place = {"folder": "checkpoints/best", "file": "checkpoints/best.safetensors", "run": "checkpoints/last"}
    path = run_dir / place[form]
    trainer = runs.make_trainer(new_store, tmp_path / "run", *DOUBLE, "--init_from", str(path))
    assert trainer.progress.step == 0
    assert trainer.statistics.elements == (29, 47, 79)
    assert trainer.statistics.sources == ("gold",)
    old = load_potential(path, torch.float64)
    before, after = predicted(old, store), predicted(trainer.potential, store)
    for name, values in before.items():
        assert (values - after[name]).abs().max() <= 1e-10, name
    with trainer.average.applied():
        averaged = predicted(trainer.potential, store)
    assert (before["energy"] - averaged["energy"]).abs().max() <= 1e-10, "the average begins with them"
    own = predicted(load_potential(path, torch.float64, average=False), store)
    assert (own["energy"] - after["energy"]).abs().max() > 1e-6, "the weights themselves are others"
    gold_row = dict(trainer.potential.model.named_parameters())["element_embedding.weight"][2]
    table = dict(old.model.named_parameters())["element_embedding.weight"]
    assert torch.allclose(gold_row, table.mean(0), rtol=0, atol=1e-12)


def test_new_elements_begin_as_others(folder: Path, new_store: Path, tmp_path: Path) -> None:
    """Gold as silver: a crystal of gold has the forces that the checkpoint gives to silver in its place."""
    options = ("--init_from", str(folder), "--init.new_elements", "Au=Ag", "--init.weights", "model")
    trainer = runs.make_trainer(new_store, tmp_path / "run", *DOUBLE, *options)
    silver = [
        dataclasses.replace(s, atomic_numbers=np.where(s.atomic_numbers == 79, 47, s.atomic_numbers).astype("u1"))
        for s in gold()
    ]
    as_silver = write_gold(tmp_path / "silver", silver)
    old = load_potential(folder, torch.float64, average=False)
    before, after = predicted(old, as_silver), predicted(trainer.potential, new_store)
    for name, values in before.items():
        assert (values - after[name]).abs().max() <= 1e-10, name


def test_train_resume_and_evaluate(
    folder: Path, new_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of 4 steps in one go and in two, which need the checkpoint only to begin; bit for bit the same."""
    copy = tmp_path / "base.safetensors"
    assert main(["export", str(folder), str(copy)]) == 0
    settings = ("--optim.freeze", "layers.0", "--optim.rates", "energy_head=1,layers=0.1")
    every = ("--train.checkpoint_every", "2", "--init.new_elements.Au", "Ag")
    assert tune(copy, new_store, tmp_path / "whole", *settings, *every) == 0
    told = capsys.readouterr().err
    assert "begins with the averaged weights of" in told
    assert "new elements: Au (as Ag)" in told
    options = ("--init_from", str(copy), "--train.threads", "1", *FEW, *settings, *every)
    stopped = runs.make_trainer(new_store, tmp_path / "parts", *options)
    original = stopped._step

    def step(*arguments: Any) -> bool:
        return original(*arguments) or stopped.progress.step == 2

    stopped._step = step  # type: ignore[method-assign]
    assert stopped.run(), "stopped after step 2, as by a signal"
    copy.unlink()
    assert tune(copy, new_store, tmp_path / "parts", *settings, *every, "--resume") == 0
    a, b = (load_checkpoint(tmp_path / f"{name}/checkpoints/last") for name in ("whole", "parts"))
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items())
    assert a.config.init_from == str(copy)
    assert main(["evaluate", str(tmp_path / "parts/checkpoints/best"), str(new_store)]) == 0
