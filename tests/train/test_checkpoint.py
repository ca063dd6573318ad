"""Checkpoints: written whole or not at all, refused when damaged, nothing unpickled."""

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from megagnn.config import OptimConfig
from megagnn.optim.optimizer import make_optimizer
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import Constant, Normal, initialise, layout_of
from megagnn.tensor_parallel.layers import LinearLaws, RowLinear
from megagnn.train import checkpoint as module
from megagnn.train.checkpoint import (
    load_checkpoint,
    load_optimizer,
    load_potential,
    load_weights,
    optimizer_tensors,
    save_checkpoint,
)
from tests.tolerances import assert_close


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


def test_other_dtype(checkpoint: Path) -> None:
    potential = load_potential(checkpoint, torch.float64)
    assert all(p.dtype == torch.float64 for p in potential.parameters())


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
    with pytest.raises(ValueError, match="is a folder, not a checkpoint; did you mean"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "none.safetensors")


def test_a_failed_write_leaves_the_old_file(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_checkpoint(checkpoint)
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, loaded.config, loaded.statistics, loaded.progress, loaded.tensors)
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(module.os, "fsync", full_disk)
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


def linear(implementation: str, context: ParallelContext) -> tuple[RowLinear, torch.optim.Optimizer]:
    """A layer whose matrix the ranks divide by columns, and its optimizer."""
    layer = RowLinear(8, 6, context, LinearLaws(Normal(1.0), Constant(0.0)), torch.float32)
    initialise(layer, seed=0)
    return layer, make_optimizer(layer, OptimConfig(implementation=implementation, learning_rate=0.1))


def take_step(layer: RowLinear, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in layer.parameters():
        gradient = torch.randn(layout_of(p).full_shape, generator=generator)
        p.grad = layout_of(p).slice_of(gradient).contiguous()
    optimizer.step()


@pytest.mark.parametrize("implementation", ["own", "torch"])
def test_slices_of_the_optimizer_continue_as_the_whole(implementation: str) -> None:
    """Slices of columns are strided; torch's fused kernel reads moments in the order of memory."""
    layer, optimizer = linear(implementation, ParallelContext())
    take_step(layer, optimizer, seed=0)
    state = {name: t.clone() for name, t in optimizer_tensors(optimizer, ParallelContext()).items()}
    weights = {name: p.detach().clone() for name, p in layer.named_parameters()}
    take_step(layer, optimizer, seed=1)
    parts = []
    for rank in (0, 1):
        part, part_optimizer = linear(implementation, ParallelContext(tp_size=2, tp_rank=rank))
        load_weights(part, weights, Path("whole"))
        load_optimizer(part_optimizer, state)
        take_step(part, part_optimizer, seed=1)
        parts.append(part)
    for name, dim in (("weight", 1), ("bias", 0)):
        joined = torch.cat([part.get_parameter(name).detach() for part in parts], dim)
        assert_close(joined, layer.get_parameter(name).detach())
