"""Checkpoints of one file: written whole or not at all, refused when damaged; export and import."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from megagnn.checkpoint import manifest as checkpoint_manifest
from megagnn.checkpoint.single_file import (
    load_checkpoint,
    load_potential,
    load_weights,
    save_checkpoint,
)
from megagnn.cli import main
from megagnn.optim.rules.adamw import ADAMW
from tests import runs


def test_round_trip(checkpoint: Path, tmp_path: Path) -> None:
    before = load_checkpoint(checkpoint)
    path = tmp_path / "copy.safetensors"
    save_checkpoint(path, before.config, before.statistics, before.progress, before.tensors)
    after = load_checkpoint(path)
    assert (after.config, after.statistics, after.progress) == (
        before.config,
        before.statistics,
        before.progress,
    )
    assert all(torch.equal(after.tensors[name], tensor) for name, tensor in before.tensors.items())


def test_average_and_last_weights_differ(checkpoint: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    assert loaded.weights("model").keys() == loaded.weights("average").keys()
    assert any(not torch.equal(loaded.weights("model")[n], a) for n, a in loaded.weights("average").items())


def test_other_dtype(checkpoint: Path, folder: Path) -> None:
    """From a folder, whose parts are copied into the parameters, as from a file."""
    for average in (True, False):
        potential, same = (load_potential(path, torch.float64, average) for path in (checkpoint, folder))
        for p, q in zip(potential.parameters(), same.parameters(), strict=True):
            assert p.dtype == torch.float64
            assert torch.equal(p, q)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_truncated(checkpoint: Path, tmp_path: Path, share: float) -> None:
    path = tmp_path / "cut.safetensors"
    content = checkpoint.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"cut\.safetensors is truncated"):
        load_checkpoint(path)


def test_every_flipped_bit_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """In the header, in its JSON, in the tensors: always an error that names the file."""
    path = tmp_path / "flipped.safetensors"
    content = bytearray(checkpoint.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    for position in [0, 9, 200, header_end // 2, header_end - 3, header_end + 5, len(content) - 1]:
        content[position] ^= 4
        path.write_bytes(content)
        content[position] ^= 4
        with pytest.raises(ValueError, match=r"flipped\.safetensors"):
            load_checkpoint(path)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"x": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="not a megagnn checkpoint"):
        load_checkpoint(path)
    with pytest.raises(ValueError, match="is a folder, not a checkpoint; give a run's checkpoints/best"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "none.safetensors")


def test_what_to_give_instead_is_there(run_dir: Path, tmp_path: Path) -> None:
    """Only checkpoints that exist are named, the nearest first."""
    shutil.copytree(run_dir, tmp_path / "good", symlinks=True)
    (tmp_path / "empty").mkdir()
    inside = tmp_path / "good/checkpoints"
    both = f"{inside}/best or {inside}/best.safetensors"
    instead = "give a run's checkpoints/best"
    for path, expected in (
        (tmp_path / "good", f"folder, not a checkpoint; did you mean {both}?"),
        (inside, f"folder, not a checkpoint; did you mean {both}?"),
        (inside / "bestt", f"no checkpoint at {inside}/bestt; did you mean {inside}/best?"),
        (inside / "step-00000061", f"did you mean {inside}/step-00000060"),
        (tmp_path / "god", f"no checkpoint at {tmp_path}/god; did you mean {both}?"),
        (tmp_path / "goood/checkpoints/best", f"did you mean {both}?"),
        (tmp_path / "another", f"no checkpoint at {tmp_path}/another; {instead}"),
        (tmp_path / "empty", f"{tmp_path}/empty is a folder, not a checkpoint; {instead}"),
        (tmp_path / "empty/best", f"no checkpoint at {tmp_path}/empty/best; {instead}"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(expected)):
            load_checkpoint(path)


def test_a_failed_write_leaves_the_old_file(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_checkpoint(checkpoint)
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, loaded.config, loaded.statistics, loaded.progress, loaded.tensors)
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint_manifest.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(
            path, loaded.config, loaded.statistics, replace(loaded.progress, step=1), loaded.tensors
        )
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_weights_of_another_model(checkpoint: Path) -> None:
    loaded = load_checkpoint(checkpoint)
    model, weights = load_potential(loaded).model, loaded.weights("model")
    name = next(iter(weights))
    with pytest.raises(ValueError, match=f"does not fit the model: missing \\['{name}'\\]"):
        load_weights(model, {n: w for n, w in weights.items() if n != name}, checkpoint)
    with pytest.raises(ValueError, match=f"{name} is \\(3,\\)"):
        load_weights(model, {**weights, name: torch.ones(3)}, checkpoint)


def test_a_folder_and_a_file_hold_the_same(checkpoint: Path, folder: Path) -> None:
    """The best of this run is its last."""
    whole, best = load_checkpoint(folder), load_checkpoint(checkpoint)
    assert whole.progress == best.progress
    assert whole.tensors.keys() == best.tensors.keys()
    assert all(torch.equal(whole.tensors[name], tensor) for name, tensor in best.tensors.items())
    assert load_checkpoint(folder, optimizer=True).tensors.keys() > whole.tensors.keys()


def test_export_and_import_lose_nothing(folder: Path, store: Path, tmp_path: Path) -> None:
    """A run goes on from what was exported and imported, to the same bits."""
    file, again = tmp_path / "all.safetensors", tmp_path / "again"
    assert main(["export", str(folder), str(file), "--optimizer"]) == 0
    assert main(["import", str(file), str(again)]) == 0
    shutil.copytree(folder.parent, tmp_path / "copy" / "checkpoints", symlinks=True)
    for run in (again, tmp_path / "copy"):
        assert runs.train(store, run, "--resume", "--train.num_steps", "66") == 0
    expected, got = (
        load_checkpoint(run / "checkpoints" / "last", optimizer=True) for run in (tmp_path / "copy", again)
    )
    assert got.progress == expected.progress
    assert all(torch.equal(got.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_import_of_the_earlier_format(folder: Path, tmp_path: Path) -> None:
    """There the optimizer's state has the numbers of parameters, matrices first."""
    loaded = load_checkpoint(folder, optimizer=True)
    weights = loaded.weights("model")
    model = [name for name, _ in load_potential(loaded).model.named_parameters()]
    order = sorted(model, key=lambda name: weights[name].ndim < 2)
    tensors = {n: t for n, t in loaded.tensors.items() if n.split("/")[0] not in ADAMW.state}
    for index, name in enumerate(order):
        tensors[f"optimizer/{index}/step"] = torch.tensor(60.0)
        tensors |= {f"optimizer/{index}/{kind}": loaded.tensors[f"{kind}/{name}"] for kind in ADAMW.state}
    file = tmp_path / "last.safetensors"
    save_checkpoint(file, loaded.config, loaded.statistics, loaded.progress, tensors)
    assert main(["import", str(file), str(tmp_path / "run")]) == 0
    got = load_checkpoint(tmp_path / "run" / "checkpoints" / "last", optimizer=True)
    assert got.progress.optimizer_steps == 60
    assert got.tensors.keys() == loaded.tensors.keys()
    assert all(torch.equal(got.tensors[name], tensor) for name, tensor in loaded.tensors.items())


def test_what_export_and_import_refuse(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, message in [
        (["export", str(folder), str(tmp_path / "x.pt")], "must end in .safetensors"),
        (
            ["export", str(checkpoint), str(tmp_path / "x.safetensors"), "--optimizer"],
            "does not hold exp_avg, exp_avg_sq; export without",
        ),
        (["import", str(checkpoint), str(tmp_path / "run")], "no run can go on from it"),
        (["import", str(folder), str(folder.parent.parent)], "has checkpoints already"),
    ]:
        assert main(command) == 2
        assert message in capsys.readouterr().err
