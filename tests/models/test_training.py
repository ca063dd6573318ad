"""Families of generic operations from the command line: training, resuming, fine-tuning, predictions."""

from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk

from megagnn.calculator import MegaGNNCalculator
from megagnn.checkpoint.single_file import load_checkpoint
from megagnn.cli import main
from tests import runs

SHORT = ("--train.threads", "1", "--train.validate_every", "4", "--train.log_every", "4")
FEW = ("--train.num_steps", "8", "--train.checkpoint_every", "4", *SHORT)


@pytest.fixture(scope="module", params=["painn", "cartesian"])
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def finished(family: str, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on several sources and levels, with stress."""
    out_dir = tmp_path_factory.mktemp(family) / "run"
    assert runs.train(store, out_dir, "--model.family", family, *FEW) == 0
    return out_dir


def test_resumes_to_the_same_bits_and_evaluates(
    family: str, finished: Path, store: Path, tmp_path: Path
) -> None:
    kind = ("--model.family", family, *FEW)
    stopped = runs.make_trainer(store, tmp_path / "parts", *kind)
    original = stopped._step

    def step(*arguments: Any) -> bool:
        return original(*arguments) or stopped.progress.step == 5

    stopped._step = step  # type: ignore[method-assign]
    assert stopped.run(), "stopped after step 5, as by a signal"
    assert runs.train(store, tmp_path / "parts", *kind, "--resume") == 0
    whole, parts = (load_checkpoint(run / "checkpoints" / "last") for run in (finished, tmp_path / "parts"))
    assert whole.config.model.family == family
    assert len(whole.statistics.sources) > 1
    assert whole.tensors.keys() == parts.tensors.keys()
    assert all(torch.equal(tensor, parts.tensors[name]) for name, tensor in whole.tensors.items())
    assert main(["evaluate", str(finished / "checkpoints" / "best"), str(store)]) == 0
    assert main(["inspect", str(finished / "checkpoints" / "best")]) == 0


def test_fine_tunes_with_frozen_parts_and_rates(family: str, finished: Path, tmp_path: Path) -> None:
    """The family is the checkpoint's; a frozen layer keeps its bits, others move."""
    gold, begun = runs.write_gold(tmp_path / "gold"), finished / "checkpoints" / "best"
    settings = ("--optim.freeze", "layers.0", "--optim.rates", "energy_head=1,layers=0.1")
    steps = ("--train.num_steps", "6", *SHORT)
    assert runs.train(gold, tmp_path / "tuned", "--init_from", str(begun), *settings, *steps) == 0
    before, after = load_checkpoint(begun), load_checkpoint(tmp_path / "tuned" / "checkpoints" / "last")
    assert after.config.model.family == family
    assert 79 in after.statistics.elements
    old, new = before.weights("average") or before.weights("model"), after.weights("model")
    assert any("layers.0." in name for name in old.keys() & new.keys())
    moved = {name for name in new if name in old and not torch.equal(old[name], new[name])}
    assert not any("layers.0." in name for name in moved)
    assert any("layers.1." in name for name in moved)


def test_predictions_are_the_calculator_s(finished: Path, tmp_path: Path) -> None:
    """Energy, forces, stress, and atomic energies that add up."""
    checkpoint = finished / "checkpoints" / "best.safetensors"
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    ase.io.write(tmp_path / "in.traj", [atoms])
    where = [str(checkpoint), str(tmp_path / "in.traj"), "--out", str(tmp_path / "out.traj")]
    assert main(["predict", *where, "--source", "crystals"]) == 0
    found = ase.io.read(tmp_path / "out.traj")
    atoms.calc = MegaGNNCalculator(checkpoint, source="crystals")
    assert found.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
    np.testing.assert_allclose(found.get_forces(), atoms.get_forces(), atol=1e-5)
    np.testing.assert_allclose(found.get_stress(), atoms.get_stress(), atol=1e-6)
    assert abs(atoms.get_forces()).max() > 1e-4
    energies = atoms.calc.results.get("energies", atoms.get_potential_energies())
    assert energies.sum() == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
