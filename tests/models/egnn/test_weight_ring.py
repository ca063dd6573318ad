"""Weights gathered one layer ahead: what is taken is what the parameters are now."""

from typing import Any

import torch

from megagnn.models.egnn.edge.plan_rows import WEIGHT_DIMS, WeightRing
from megagnn.models.egnn.edge.types import EdgeWeights
from megagnn.models.potential import build_potential
from megagnn.optim.config import OptimConfig
from megagnn.optim.optimizer import make_optimizer
from megagnn.parallel.context import ParallelContext
from tests.distributed.spawn import spawn
from tests.models.physics import STATISTICS, model_config

CONFIG = model_config(preset="satorras", coordinate_bias=True)


def same(got: EdgeWeights, expected: EdgeWeights) -> bool:
    return all(
        (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]
        for a, b in zip(got[1:], expected[1:], strict=True)
    )


def on_rank(context: ParallelContext) -> list[dict[str, Any]]:
    return [findings(context, implementation) for implementation in ("own", "torch")]


def findings(context: ParallelContext, implementation: Any) -> dict[str, Any]:
    """Prefetches, steps of an optimizer and takes; each finding by name."""
    found: dict[str, Any] = {}
    split = build_potential(CONFIG, STATISTICS, 0, torch.float64, context, "edge")
    whole = build_potential(CONFIG, STATISTICS, 0, torch.float64)
    optimizers = [make_optimizer(p, OptimConfig(implementation=implementation)) for p in (split, whole)]
    layers, wholes = list(split.model.layers), list(whole.model.layers)
    ring = WeightRing(context, [layer.edge_weights for layer in layers])

    def right(index: int, **arguments: bool) -> bool:
        return same(ring.take(index, **arguments), wholes[index].edge_weights())

    def step() -> None:
        for potential, optimizer in zip((split, whole), optimizers, strict=True):
            for p in potential.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()

    found["first"] = right(0)
    ring.start(1)
    with context.traffic.measured() as sent:
        found["prefetched"] = right(1)
    found["prefetched costs"] = float(sent.total("tp"))

    ring.start(1)
    step()
    found["stale prefetch"] = right(1)

    found["before holding"] = right(0, hold=True)
    with context.traffic.measured() as sent:
        found["held"] = right(0)
    found["held costs"] = float(sent.total("tp"))
    with context.traffic.measured() as sent:
        found["held once"] = right(0)
    tp, numel = context.tp_size, 0
    for weight, dim in zip(wholes[0].edge_weights(), WEIGHT_DIMS, strict=True):
        numel += weight.numel() if weight is not None and dim is not None else 0
    found["a gather costs"] = float(sent.total("tp")) == numel * (tp - 1) / tp

    ring.take(0, hold=True)
    step()
    found["stale hold"] = right(0)
    with torch.no_grad():
        for potential in (split, whole):
            next(iter(potential.model.layers)).message.out.weight.mul_(2.0)
    found["changed in place"] = right(0)

    ring.start(-1)
    ring.start(len(layers))
    found["no such layer"] = not ring._coming and not ring._held
    found["without vectors"] = layers[-1].edge_weights().w3_KM is None and right(len(layers) - 1)
    return found


def test_what_is_taken_is_current() -> None:
    for results in spawn(2, on_rank, tp=2):
        for found in results:
            costs = {found.pop("prefetched costs"), found.pop("held costs")}
            assert costs == {0.0}
            assert all(found.values()), {name: value for name, value in found.items() if not value}
