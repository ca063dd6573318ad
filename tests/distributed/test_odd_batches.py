"""Batches too small for their ranks: ranks without edges or atoms; and where `auto` changes its mind."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from torch import Tensor

from megagnn.data import keys
from megagnn.data.batch import batch_from_atoms
from megagnn.models.family import PlanChoice
from megagnn.objective.config import LossConfig
from megagnn.objective.gradient_methods import GRADIENT_METHODS
from megagnn.objective.loss import Loss, label_counts
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import layout_of
from tests.distributed.spawn import spawn
from tests.distributed.test_data_parallel import worst
from tests.distributed.whole import gather_whole
from tests.models.physics import ethanol, model_config, randomised
from tests.tolerances import PARITY

BATCHES: dict[str, list[Atoms]] = {
    "one atom and its images": [bulk("Cu", "fcc", a=3.6)],
    "two atoms": [molecule("CO")],
    "one atom, no edge": [Atoms("C", [[0.0, 0.0, 0.0]])],
    "ethanol": [ethanol()],
}
MODELS = {"small": {}, "wide": {"width": 64, "num_radial": 4}}
CELLS = [
    (batch, model, plan, memory, layers_again, method)
    for batch in BATCHES
    for model, plan in (("small", "edge"), ("small", "channel"), ("small", "auto"), ("wide", "auto"))
    for memory in ("save", "recompute")
    for layers_again in (False, True)
    for method in GRADIENT_METHODS
    if plan != "auto" or (memory == "save" and not layers_again)
]


def labelled(structures: list[Atoms]) -> dict[str, Tensor]:
    batch = batch_from_atoms(structures, 4.0)
    generator = torch.Generator().manual_seed(0)
    for name, has in ((keys.ENERGY, keys.HAS_ENERGY), (keys.FORCES, keys.HAS_FORCES)):
        batch[name] = torch.randn(batch[name].shape, generator=generator, dtype=torch.float64)
        batch[has] = torch.ones_like(batch[has])
    return batch


def step(
    context: ParallelContext, plan: PlanChoice, cell: tuple[Any, ...]
) -> tuple[float, dict[str, Tensor], Fraction]:
    """Loss, whole gradients, and elements sent over the tensor-parallel ranks."""
    name, model, _, memory, layers_again, method = cell
    config = model_config(edge_memory=memory, recompute_layers=layers_again, edge_block=32, **MODELS[model])
    potential, batch = randomised(config, 0, context, plan), labelled(BATCHES[name])
    loss = Loss(LossConfig("mse", "mse"))
    with context.traffic.measured() as sent:
        total, _ = GRADIENT_METHODS[method](potential, batch, loss, label_counts(batch, ParallelContext()))
    gradients = {
        n: gather_whole(p.grad, layout_of(p), context)
        for n, p in potential.named_parameters()
        if p.grad is not None
    }
    return total.item(), gradients, sent.total("tp")


def on_rank(context: ParallelContext) -> list[Any]:
    return [step(context, cell[2], cell) for cell in CELLS]


def plans_of(context: ParallelContext) -> list[Any]:
    """What this rank sends under auto, edge and channel, for each batch and width."""
    plans: tuple[PlanChoice, ...] = ("auto", "edge", "channel")
    cells = [(b, m, "", "save", False, "one_backward") for b in BATCHES for m in MODELS]
    return [[step(context, plan, cell)[2] for plan in plans] for cell in cells]


@pytest.mark.parametrize("tp", [2, 4])
def test_equal_one_process(tp: int) -> None:
    references: dict[Any, Any] = {}
    for results in spawn(tp, on_rank, tp=tp):
        for cell, (loss, gradients, _) in zip(CELLS, results, strict=True):
            key = cell[:2]
            if key not in references:
                plain = (*key, "auto", "save", False, "create_graph")
                references[key] = step(ParallelContext(), "auto", plain)
            reference_loss, reference, _ = references[key]
            assert loss == pytest.approx(reference_loss, rel=PARITY), cell
            assert worst(gradients, reference) < PARITY, cell


def test_auto_sends_what_the_better_plan_sends() -> None:
    """Counted, not derived: over all ranks, and each of the plans is the better one of some batch."""
    by_rank = spawn(2, plans_of, tp=2)
    totals = [[sum(column) for column in zip(*rows, strict=True)] for rows in zip(*by_rank, strict=True)]
    assert all(auto == min(edge, channel) for auto, edge, channel in totals)
    assert {edge < channel for _, edge, channel in totals} == {True, False}
