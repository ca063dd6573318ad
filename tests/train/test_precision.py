"""Runs in bfloat16: they learn as float32 does, resume to the bit, and are read in any precision."""

from pathlib import Path

import pytest
import torch
from ase import Atoms

from megagnn.calculator import MegaGNNCalculator
from megagnn.checkpoint.single_file import load_checkpoint, load_potential
from megagnn.data import keys
from megagnn.models.precision import precision_of
from megagnn.train.evaluate import evaluate
from megagnn.train.inspect import describe_checkpoint
from megagnn.train.trainer import Trainer
from tests import runs

KINDS = ("model", "average", "exp_avg", "exp_avg_sq")


HALF = ("--train.dtype", "bfloat16")


@pytest.fixture(scope="module")
def half_dir(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 60 steps in bfloat16."""
    out_dir = tmp_path_factory.mktemp("runs") / "half"
    assert runs.train(store, out_dir, *HALF) == 0
    return out_dir


def best_loss(run_dir: Path) -> float:
    return load_checkpoint(run_dir / "checkpoints" / "last").progress.best_loss


def test_learns_as_float32_does(run_dir: Path, half_dir: Path, store: Path) -> None:
    """The best validation loss of 60 steps, to a tenth of what training took off the first one."""
    trainer = runs.make_trainer(store, half_dir.parent / "untrained", *HALF)
    first = evaluate(trainer.potential, trainer.valid, trainer.context, trainer.loss).loss
    single, half = best_loss(run_dir), best_loss(half_dir)
    assert single < 0.7 * first
    assert abs(half - single) < 0.1 * (first - single)


def test_types_of_a_checkpoint(half_dir: Path) -> None:
    """Weights are the master copies: what adds up small steps takes four bytes."""
    tensors = load_checkpoint(half_dir / "checkpoints" / "last", optimizer=True).tensors
    found: dict[str, set[torch.dtype]] = {}
    for name, tensor in tensors.items():
        found.setdefault(name.split("/")[0], set()).add(tensor.dtype)
    assert found == {name: {torch.float32} for name in KINDS}


def test_resumes_to_the_bit(store: Path, tmp_path: Path) -> None:
    """Master weights and the average are those of the checkpoint, not the rounded weights."""
    # what depends on the share of the run that is done would differ between runs of two lengths
    settings = (*HALF, "--optim.schedule", "constant", "--loss.final_energy_factor", "1")

    def trainer(folder: str, steps: int) -> Trainer:
        return runs.make_trainer(store, tmp_path / folder, *settings, "--train.num_steps", str(steps))

    whole, part, rest = trainer("whole", 16), trainer("part", 8), trainer("part", 16)
    whole.run()
    part.run()
    resumed = Trainer(rest.config, rest.context, resume=True)
    resumed.run()
    want, got = (load_checkpoint(t.last_path, optimizer=True).tensors for t in (whole, resumed))
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("change", ["train.dtype float32", "train.geometry float64"])
def test_resume_in_another_precision_is_refused(
    store: Path, half_dir: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    key, value = change.split()
    assert runs.train(store, half_dir, *HALF, "--resume", f"--{key}", value) == 2
    assert f"{key} was" in capsys.readouterr().err


def test_read_in_any_precision(half_dir: Path) -> None:
    """In the run's own by default; float32 and float64 hold the average as it was kept."""
    checkpoint = load_checkpoint(half_dir / "checkpoints" / "best.safetensors")
    own = load_potential(checkpoint)
    assert own.model.precision == precision_of("bfloat16")
    for dtype in (torch.float32, torch.float64):
        wide = load_potential(checkpoint, dtype)
        assert wide.model.precision.geometry == dtype
        for (name, a), b in zip(wide.model.named_parameters(), own.model.parameters(), strict=True):
            assert torch.equal(a, checkpoint.weights("average")[name].to(dtype))
            assert torch.equal(a.bfloat16(), b)
    assert "in bfloat16, geometry float32: " in describe_checkpoint(checkpoint)


def test_calculator_computes_in_float64(half_dir: Path) -> None:
    """Dynamics needs a smooth energy, whatever the training was in: forces are its numerical gradient."""
    calculator = MegaGNNCalculator(half_dir / "checkpoints" / "best.safetensors", source="clusters")
    assert {p.dtype for p in calculator.potential.parameters()} == {torch.float64}
    found = next(s for s in runs.structures() if s.source == "clusters")
    energies, h = [], 1e-4
    for step in (-h, 0.0, h):
        atoms = Atoms(found.atomic_numbers, found.positions, calculator=calculator)
        atoms.positions[0, 0] += step
        energies.append(atoms.get_potential_energy())
        if step == 0.0:
            force = atoms.get_forces()[0, 0]
    assert -(energies[2] - energies[0]) / (2 * h) == pytest.approx(force, rel=1e-5, abs=1e-6)


def test_float64_geometry_beside_float32(store: Path, tmp_path: Path) -> None:
    trainer = runs.make_trainer(store, tmp_path / "run", "--train.geometry", "float64")
    batch = next(iter(trainer.train.batches()))
    assert batch[keys.POSITIONS].dtype == batch[keys.FORCES].dtype == torch.float64
    assert trainer.potential(batch)[keys.FORCES].dtype == torch.float64
    assert {p.dtype for p in trainer.potential.parameters()} == {torch.float32}
