"""Pieces of the optimizers that are not sharded: slices continue as the whole, whatever implementation."""

from pathlib import Path

import pytest
import torch

from megagnn.checkpoint.folder import open_folder
from megagnn.checkpoint.progress import Progress
from megagnn.checkpoint.writer import CheckpointStore
from megagnn.config import RunConfig
from megagnn.optim.config import OptimConfig
from megagnn.optim.interface import RunOptimizer
from megagnn.optim.optimizer import WeightAverage, make_optimizer
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import Constant, Normal, initialise, layout_of
from megagnn.tensor_parallel.layers import LinearLaws, RowLinear
from tests.models.physics import STATISTICS
from tests.tolerances import assert_close

Built = tuple[RowLinear, RunOptimizer, WeightAverage]


def linear(implementation: str, context: ParallelContext, seed: int, dtype: torch.dtype) -> Built:
    """A layer whose matrix the ranks divide by columns, its optimizer and average."""
    layer = RowLinear(8, 6, context, LinearLaws(Normal(1.0), Constant(0.0)), dtype)
    initialise(layer, seed)
    optimizer = make_optimizer(layer, OptimConfig(implementation=implementation, learning_rate=0.1))
    return layer, optimizer, WeightAverage(layer, 0.9)


def take_step(built: Built, seed: int) -> None:
    layer, optimizer, average = built
    generator = torch.Generator().manual_seed(seed)
    for p in layer.parameters():
        gradient = torch.randn(layout_of(p).full_shape, generator=generator).to(p.dtype)
        p.grad = layout_of(p).slice_of(gradient).contiguous()
    optimizer.step()
    average.update()


@pytest.mark.parametrize("writer", ["own", "torch"])
@pytest.mark.parametrize("reader", ["own", "torch"])
@pytest.mark.parametrize("forgets", [False, True])
def test_slices_continue_as_the_whole(tmp_path: Path, writer: str, reader: str, forgets: bool) -> None:
    """Slices of columns are strided; torch's fused kernel reads moments in the order of memory. The mistake:
    steps, on which the moments' correction depends, begin anew."""
    whole = linear(writer, ParallelContext(), 0, torch.float32)
    for seed in (0, 1):
        take_step(whole, seed)
    store = CheckpointStore(tmp_path, ParallelContext(), asynchronous=False)
    steps = whole[1].num_steps
    assert steps == 2
    store.save([*whole[1].pieces(whole[0]), *whole[2].pieces()], RunConfig(), STATISTICS, Progress(step=2))
    take_step(whole, 2)
    parts = []
    for rank in (0, 1):
        context = ParallelContext(tp_size=2, tp_rank=rank)
        part = linear(reader, context, 7, torch.float32)
        open_folder(tmp_path / "step-00000002").load([*part[1].pieces(part[0]), *part[2].pieces()])
        part[1].pieces_loaded(0 if forgets else steps)
        part[2].num_updates = 2
        take_step(part, 2)
        parts.append(part)
    for name, dim in (("weight", 1), ("bias", 0)):
        joined = torch.cat([part[0].get_parameter(name).detach() for part in parts], dim)
        expected = whole[0].get_parameter(name).detach()
        if forgets:
            assert (joined - expected).abs().max() > 0.01
            continue
        assert_close(joined, expected)
        assert_close(torch.cat([part[2].average[name] for part in parts], dim), whole[2].average[name], 1e-6)


def test_master_copies_are_what_is_kept(tmp_path: Path) -> None:
    """Of bfloat16 parameters the checkpoint holds the float32 masters, and both are there after loading."""
    whole = linear("own", ParallelContext(), 0, torch.bfloat16)
    for seed in (0, 1):
        take_step(whole, seed)
    pieces = [*whole[1].pieces(whole[0]), *whole[2].pieces()]
    assert {p.values.dtype for p in pieces if p.kind == "model"} == {torch.float32}
    store = CheckpointStore(tmp_path, ParallelContext(), asynchronous=False)
    store.save(pieces, RunConfig(), STATISTICS, Progress(step=2))
    other = linear("own", ParallelContext(), 7, torch.bfloat16)
    open_folder(tmp_path / "step-00000002").load([*other[1].pieces(other[0]), *other[2].pieces()])
    other[1].pieces_loaded(2)
    for _ in range(2):
        for p, q in zip(whole[0].parameters(), other[0].parameters(), strict=True):
            assert torch.equal(p, q)
        for a, b in zip(pieces, [*other[1].pieces(other[0]), *other[2].pieces()], strict=True):
            assert a.kind == "average" or torch.equal(a.values, b.values), (a.name, a.kind)
        for built in (whole, other):
            take_step(built, 3)


def test_parameters_that_took_other_numbers_of_steps_are_refused() -> None:
    built = linear("torch", ParallelContext(), 0, torch.float32)
    take_step(built, 0)
    next(iter(built[0].parameters())).grad = None
    built[1].step()
    with pytest.raises(
        ValueError, match=r"one number of optimizer steps, the parameters have taken \[1, 2\]"
    ):
        _ = built[1].num_steps
