"""Checkpoints and configurations written before there were model families still load, predict and go on.

The archive holds a run of `tests/runs.py` at width 4 (12 steps, checkpoints at 6 and 12) by the last version
without families, and what its best weights predicted then, in float64.
"""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from ase import Atoms

from megagnn.checkpoint.single_file import load_checkpoint, load_potential
from megagnn.config import config_from_dict
from megagnn.data.batch import batch_from_atoms
from tests import runs

ARCHIVE = Path(__file__).with_name("data") / "before_families.tar.xz"
SMALL = ("--model.width", "4", "--model.num_radial", "4", "--train.num_steps", "12")
OFTEN = ("--train.validate_every", "6", "--train.checkpoint_every", "6", "--optim.warmup_steps", "3")


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "run"


@pytest.mark.parametrize("name", ["best.safetensors", "best"])
def test_an_old_checkpoint_predicts_what_it_predicted(old_run: Path, name: str) -> None:
    potential = load_potential(old_run / "checkpoints" / name, torch.float64)
    assert potential.model.config.family == "egnn"
    structures = runs.structures()
    for number, expected in zip((0, 3, 6), json.loads((old_run / "expected.json").read_text()), strict=True):
        record = structures[number]
        atoms = Atoms(record.atomic_numbers, record.positions, cell=record.cell, pbc=record.pbc)
        outputs = potential(batch_from_atoms([atoms], 4.0))
        assert set(outputs) == set(expected)
        for key, value in outputs.items():
            wanted = torch.tensor(expected[key], dtype=torch.float64)
            torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-10)


def test_an_old_configuration_is_one_of_the_egnn(old_run: Path) -> None:
    values = json.loads((old_run / "config.json").read_text())
    assert "family" not in values["model"]
    assert config_from_dict(values).model.family == "egnn"


def test_an_old_run_goes_on(old_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its sixth step on, to the state that it had at the twelfth."""
    monkeypatch.chdir(tmp_path)
    run = Path("run")
    shutil.copytree(old_run, run, symlinks=True)
    before = load_checkpoint(old_run / "checkpoints" / "step-00000012", optimizer=True)
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    for link in ("last", "best"):
        (run / "checkpoints" / link).unlink()
        (run / "checkpoints" / link).symlink_to("step-00000006")
    store = runs.write_data(Path("store"))
    assert runs.train(store, run, *SMALL, *OFTEN, "--resume") == 0
    now = load_checkpoint(run / "checkpoints" / "step-00000012", optimizer=True)
    assert now.tensors.keys() == before.tensors.keys()
    for key, tensor in before.tensors.items():
        if tensor.is_floating_point():  # another processor may round otherwise
            torch.testing.assert_close(now.tensors[key], tensor, rtol=1e-4, atol=1e-5, equal_nan=True)
