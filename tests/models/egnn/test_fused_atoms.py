"""The atoms' products through `ops.node` against the modules, and where each of them runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megagnn.data import keys
from megagnn.data.batch import batch_from_atoms
from megagnn.models.potential import Potential
from megagnn.objective.config import LossConfig
from megagnn.objective.gradient_methods import GRADIENT_METHODS
from megagnn.objective.loss import Loss, label_counts
from megagnn.ops import extension, node
from megagnn.parallel.context import ParallelContext
from tests.models.physics import crystal, ethanol, model_config, randomised
from tests.tolerances import PARITY, PARITY_FLOOR

pytestmark = pytest.mark.skipif(extension.module is None, reason="the extension is not built")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the compiled operations of `ops.node` that ran."""
    names: list[str] = []
    operations = node._OPS

    class Watched:
        def __getattr__(self, name: str) -> Any:
            names.append(name)
            return getattr(operations, name)

    monkeypatch.setattr(node, "_OPS", Watched())
    return names


def batch_of(cutoff: float) -> dict[str, Tensor]:
    batch = batch_from_atoms([ethanol(), crystal()], cutoff, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    forces = torch.randn(batch[keys.POSITIONS].shape, generator=generator, dtype=torch.float64)
    return {**batch, keys.ENERGY: torch.tensor([1.0, 2.0], dtype=torch.float64), keys.FORCES: forces}


def gradients(potential: Potential, method: str) -> list[Tensor]:
    """The loss and all parameter gradients."""
    batch = batch_of(potential.model.config.cutoff)
    loss = Loss(LossConfig(force_weight=float(potential.forces != "none")))
    counts = label_counts(batch, ParallelContext())
    total, _ = GRADIENT_METHODS[method](potential, batch, loss, counts)
    return [total, *(torch.zeros_like(p) if p.grad is None else p.grad for p in potential.parameters())]


@pytest.mark.parametrize(
    ("forces", "method", "backwards"),
    [
        ("direct", "create_graph", 1),
        ("none", "create_graph", 1),
        ("conservative", "one_backward", 1),
        ("conservative", "create_graph", 0),
    ],
)
@pytest.mark.parametrize("recompute_layers", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"normalisation": "none", "residual": False, "message_aggregation": "mean"},
        {"depth_scaling": False, "coordinate_aggregation": "mean", "edge_memory": "recompute"},
    ],
)
def test_gradients(
    forces: str, method: str, backwards: int, recompute_layers: bool, values: dict[str, Any], calls: list[str]
) -> None:
    values = {**values, "forces": forces}
    wanted = gradients(randomised(model_config(**values, edge_operation="unfused")), method)
    assert calls == []
    potential = randomised(model_config(**values, recompute_layers=recompute_layers))
    got = gradients(potential, method)
    again = 1 if recompute_layers and backwards else 0
    layers, forwards = potential.model.config.num_layers, backwards * (1 + again)
    passes = layers * forwards + backwards  # and the head, which is not run again
    assert calls.count("norm_linear") == calls.count("silu_linear") == passes
    first = 0 if forces == "conservative" else 1  # frozen, the first features do not depend on positions
    assert calls.count("norm_linear_backward") == backwards * (layers + first)
    norm = torch.cat([t.flatten() for t in wanted[1:]]).norm()
    for x, y in zip(got, wanted, strict=True):
        assert (x - y).abs().max() <= PARITY * y.abs().max() + PARITY_FLOOR * norm


def test_where_they_do_not_run(calls: list[str]) -> None:
    """ReLU, another back end, and Dual numbers have the modules."""
    for values in ({"activation": "relu"}, {"aggregation_backend": "torch"}):
        randomised(model_config(**values))(batch_of(4.0))
    assert calls == []
    potential = randomised(model_config())
    batch = batch_of(potential.model.config.cutoff)
    potential.directional(batch, batch[keys.FORCES])
    assert calls == []
    potential(batch)
    assert calls.count("silu_linear") == potential.model.config.num_layers + 1


def test_frozen_models_under_create_graph(calls: list[str]) -> None:
    """As for forces alone, served, and answered by the chains where it is asked for a graph."""
    forces = []
    for recompute_layers in (False, True):
        potential = randomised(model_config(recompute_layers=recompute_layers)).requires_grad_(False)
        batch = batch_of(potential.model.config.cutoff)
        batch[keys.POSITIONS].requires_grad_()
        forces.append(potential(batch, create_graph=True)[keys.FORCES])
        assert calls.count("norm_linear_backward") == 0
        assert calls.count("norm_linear") > 0
    wanted = randomised(model_config(edge_operation="unfused"))(batch_of(potential.model.config.cutoff))
    for got in forces:
        assert (got - wanted[keys.FORCES]).abs().max() <= PARITY * got.abs().max()
