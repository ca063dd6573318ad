"""Every layout begins with the same weights, bit for bit, and trains to the same ones, to 1e-8."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megagnn.models.potential import Potential, build_potential
from megagnn.optim.bucket_reducer import GradientReducer
from megagnn.optim.config import OptimConfig
from megagnn.optim.optimizer import (
    make_optimizer,
    set_learning_rate,
)
from megagnn.parallel.context import ParallelContext, grid_context
from megagnn.parallel.parameter import layout_of, num_parameters
from tests.distributed.parity import AXES, CONFIGURATIONS, run
from tests.distributed.spawn import spawn
from tests.distributed.whole import gather_whole
from tests.models.physics import STATISTICS

NUM_STEPS = 10
# Adam divides gradients by their own size, so that roundings of the small ones grow with every step.
TOLERANCE = 1e-8
OPTIMIZER = OptimConfig(learning_rate=1e-3, clip_norm=0.25, weight_decay=0.1)
CONFIGURATION = CONFIGURATIONS["stress"]
# With rates that differ from group to group.
MODEL = replace(
    CONFIGURATION.model_config("fused", "none"), parametrisation="mup", base_width=6, base_layers=1
)
# With one rank along tp there are no plans.
LAYOUTS = {
    world_size: [
        (tp, dp, plan)
        for tp, dp in AXES["layout"]
        if tp * dp == world_size
        for plan in (("auto",) if tp == 1 else ("channel", "edge"))
    ]
    for world_size in (2, 4)
}


def parameters(potential: Potential, context: ParallelContext) -> dict[str, Tensor]:
    """The whole of each."""
    named = potential.named_parameters()
    return {name: gather_whole(p, layout_of(p), context).clone() for name, p in named}


def train(context: ParallelContext, plan: Any, seed: int = 0) -> dict[str, Any]:
    """Ten steps; what they began with and ended with."""
    potential = build_potential(MODEL, STATISTICS, seed, torch.float64, context, plan)
    found: dict[str, Any] = {"initial": parameters(potential, context), "norms": [], "losses": []}
    found["count"] = num_parameters(potential)
    optimizer = make_optimizer(potential, OPTIMIZER)
    set_learning_rate(optimizer, OPTIMIZER.learning_rate)
    reducer = GradientReducer(potential.parameters(), context, 1000, optimizer.gradient_buffers())
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        found["losses"].append(run(potential, "one_backward", CONFIGURATION, context, reducer).loss)
        norm = optimizer.gradient_norm(context)
        found["norms"].append(norm.item())
        optimizer.clipped_step(norm, OPTIMIZER.clip_norm)
    return {**found, "final": parameters(potential, context)}


def on_rank(context: ParallelContext, layouts: list[tuple[int, int, str]]) -> list[dict[str, Any]]:
    return [train(grid_context(dp, 1, tp), plan) for tp, dp, plan in layouts]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return train(ParallelContext(), "auto")


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_training_equals_one_process(alone: dict[str, Any], world_size: int) -> None:
    for rank, results in enumerate(spawn(world_size, on_rank, LAYOUTS[world_size])):
        for layout, found in zip(LAYOUTS[world_size], results, strict=True):
            where = f"rank {rank} of (tp, dp, plan) {layout}"
            assert found["count"] == alone["count"], where
            assert found["norms"] == pytest.approx(alone["norms"], rel=TOLERANCE), where
            assert found["losses"] == pytest.approx(alone["losses"], rel=TOLERANCE), where
            for name, whole in alone["initial"].items():
                assert torch.equal(found["initial"][name], whole), f"{where}: {name}"
            for name, whole in alone["final"].items():
                error = (found["final"][name] - whole).abs().max().item()
                assert error <= TOLERANCE * whole.abs().max().item(), f"{where}: {name} by {error:.3g}"


def test_the_steps_do_something(alone: dict[str, Any]) -> None:
    """Every parameter moves, gradients are clipped, the loss falls; another seed begins elsewhere."""
    rates = {name: p.rate for name, p in build_potential(MODEL, STATISTICS).named_parameters()}  # type: ignore[attr-defined]
    assert len(set(rates.values())) > 2
    for name, initial in alone["initial"].items():
        moved = (alone["final"][name] - initial).abs().max().item()
        assert moved > 0.5 * rates[name] * OPTIMIZER.learning_rate, name
    assert min(alone["norms"]) > 1.01 * float(OPTIMIZER.clip_norm or 0)
    assert alone["losses"][-1] < 0.995 * alone["losses"][0]
    other = build_potential(MODEL, STATISTICS, 1, torch.float64)
    weights = [name for name, p in other.named_parameters() if p.ndim > 1]
    assert all(not torch.equal(dict(other.named_parameters())[n], alone["initial"][n]) for n in weights)
