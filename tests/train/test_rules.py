"""Runs with another update rule: they resume to the same bits, are exported, and follow one with AdamW."""

import shutil
from pathlib import Path

import pytest
import torch

from megagnn.checkpoint.single_file import load_checkpoint
from megagnn.cli import main
from tests import runs

STATE = {"muon": {"momentum"}, "soap": {"turned_exp_avg_sq", "left", "right", "left_basis", "right_basis"}}
SETTINGS = (
    "--optim.rule",
    "muon",
    "--train.export_best",
    "false",
    "--train.validate_every",
    "6",
    "--optim.warmup_steps",
    "0",
)


def train(store: Path, out_dir: Path, num_steps: int, *arguments: str) -> dict[str, torch.Tensor]:
    """A run of so many steps; everything in its last checkpoint."""
    assert runs.train(store, out_dir, *SETTINGS, "--train.num_steps", str(num_steps), *arguments) == 0
    return load_checkpoint(out_dir / "checkpoints" / "last", optimizer=True).tensors


@pytest.mark.parametrize("rule", STATE)
def test_resumes_and_passes_through_a_file(store: Path, tmp_path: Path, rule: str) -> None:
    """What it was at step 6, exported, imported and continued, has every bit of the undisturbed run."""
    given = ("--optim.rule", rule, "--train.checkpoint_every", "6", "--optim.refresh_every", "4")
    whole = train(store, tmp_path / "whole", 12, *given)
    kinds = {name.split("/")[0] for name in whole}
    assert kinds == {"model", "average", "exp_avg", "exp_avg_sq", *STATE[rule]}
    file, half = tmp_path / "all.safetensors", tmp_path / "whole/checkpoints/step-00000006"
    assert main(["export", str(half), str(file), "--optimizer"]) == 0
    assert main(["import", str(file), str(tmp_path / "again")]) == 0
    got = train(store, tmp_path / "again", 12, "--resume", *given)
    assert got.keys() == whole.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in whole.items())


def test_follows_adamw(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And AdamW follows it; what begins anew is told."""
    before = train(store, tmp_path, 6, "--optim.rule", "adamw")
    momentum = {n for n in train(store, tmp_path, 7, "--resume") if n.startswith("momentum/")}
    told = capsys.readouterr().err
    assert momentum
    assert "resumed with other settings than before: optim.rule" in told
    assert "optim.rule was 'adamw' and is 'muon' now: momentum of hidden matrices begins anew" in told
    after = train(store, tmp_path, 8, "--resume", "--optim.rule", "adamw")
    assert after.keys() == before.keys()
    told = capsys.readouterr().err
    assert "optim.rule was 'muon' and is 'adamw' now: exp_avg and exp_avg_sq of hidden matrices begin" in told
    train(store, tmp_path, 9, "--resume", "--optim.rule", "soap")
    told = capsys.readouterr().err
    assert "left, left_basis, right, right_basis, turned_exp_avg_sq of hidden matrices begin anew" in told


def test_frozen_matrices_keep_their_bits_and_rates_are_shares(store: Path, tmp_path: Path) -> None:
    frozen = train(store, tmp_path / "a", 3, "--optim.freeze", "layers.0")
    first = train(store, tmp_path / "b", 1, "--optim.freeze", "layers.0", "--optim.rates", "{layers = 1e-3}")
    of_layer = [name for name in frozen if name.startswith("model/layers.0.")]
    assert of_layer
    assert all(torch.equal(frozen[name], first[name]) for name in of_layer)
    assert not any(frozen[n].any() for n in frozen if n.startswith("momentum/layers.0."))
    name = next(n for n in frozen if n.startswith("momentum/layers.1.")).replace("momentum/", "model/")
    slow, fast = (
        train(store, tmp_path / which, 1, "--optim.rates", f"{{layers = {share}}}")
        for which, share in (("c", 0.25), ("d", 1.0))
    )
    begun = train(store, tmp_path / "e", 1, "--optim.freeze", "layers")
    assert torch.allclose((slow[name] - begun[name]) * 4, fast[name] - begun[name], rtol=0.02, atol=1e-5)


def test_bfloat16_has_float32_state(store: Path, tmp_path: Path) -> None:
    """Weights and momentum are kept in float32, and a run goes on from them to the same bits."""
    given = ("--train.dtype", "bfloat16", "--train.checkpoint_every", "3")
    whole = train(store, tmp_path / "whole", 6, *given)
    assert {t.dtype for n, t in whole.items() if n.startswith(("model/", "momentum/"))} == {torch.float32}
    moved = [n for n, t in whole.items() if n.startswith("momentum/") and t.any()]
    assert any(not torch.equal(whole[n], whole[n].bfloat16().float()) for n in moved)
    shutil.rmtree(tmp_path / "whole/checkpoints/step-00000006")
    again = train(store, tmp_path / "whole", 6, "--resume", *given)
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
