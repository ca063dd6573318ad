"""bfloat16 over two stages: one process to bfloat16's rounding.

What travels between stages is what one process hands from layer to layer, in the same types, and gradients of
micro-batches are added in the same order. So an ordinary step gives the same bits. With conservative forces
each stage sums its part of dE/dx0, in float32, before the parts are added: forces agree to float32's rounding
and what is made of them to bfloat16's. Where B is split, I and W sum parts of a gradient of their own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megagnn.data.batch import collate
from megagnn.models.potential import build_potential
from megagnn.models.precision import Precision, precision_of
from megagnn.objective.config import LossConfig
from megagnn.objective.gradient_methods import GRADIENT_METHODS, accumulate
from megagnn.objective.loss import Loss, step_counts
from megagnn.parallel.context import ParallelContext
from megagnn.pipeline_parallel.model_work import ModelWork
from megagnn.pipeline_parallel.pipeline import Pipeline, schedule_for
from tests.distributed.parity import CUTOFF, structures
from tests.distributed.spawn import spawn
from tests.models.physics import STATISTICS, model_config, randomised
from tests.models.test_precision import GRADIENTS, distance

HALF, DOUBLE = (precision_of(name) for name in ("bfloat16", "float64"))
SCHEDULES = [
    ("conservative", "two-pass"),
    ("conservative", "conservative"),
    ("conservative", "conservative-zb"),
    ("direct", "1f1b"),
    ("direct", "interleaved"),
]
SHARES = ((0, 1), (2,), (3, 4), (5,))
LOSS = Loss(LossConfig("mse", "mse"))


def settings(forces: str) -> Any:
    return model_config(width=16, num_radial=4, cutoff=CUTOFF, num_layers=4, forces=forces)


def give_weights(model: torch.nn.Module, forces: str) -> None:
    """Those that bfloat16 can hold."""
    whole = dict(randomised(settings(forces)).model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(whole[name].bfloat16())


def batches_of(precision: Precision) -> list[dict[str, Tensor]]:
    return [collate([structures()[k] for k in share], precision.geometry) for share in SHARES]


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Reducer:
    """One process needs none."""

    def start(self) -> None: ...

    def finish(self) -> None: ...


def alone(forces: str, precision: Precision) -> dict[str, Any]:
    """One process, one micro-batch after another."""
    potential = build_potential(settings(forces), STATISTICS, 0, precision)
    give_weights(potential.model, forces)
    batches = batches_of(precision)
    outputs = [potential(batch) for batch in batches]
    counts = step_counts(batches, ParallelContext())
    loss, _ = accumulate(GRADIENT_METHODS["one_backward"], potential, batches, LOSS, counts, Reducer())
    return {"loss": loss, "outputs": outputs, "gradients": gradients(potential.model)}


def on_stage(context: ParallelContext, forces: str, name: str) -> dict[str, Any]:
    schedule = schedule_for(name, forces, context.pp_size, len(SHARES))
    pipeline = Pipeline(settings(forces), STATISTICS, schedule, context, precision=HALF)
    give_weights(pipeline.potential.model, forces)
    batches = batches_of(HALF)
    outputs = pipeline.predict(batches)
    loss, _ = pipeline.gradients(batches, LOSS, step_counts(batches, context))
    return {"loss": loss, "outputs": outputs, "gradients": gradients(pipeline.potential.model)}


def on_rank(context: ParallelContext) -> list[dict[str, Any]]:
    found = [on_stage(context, *case) for case in SCHEDULES]
    right = ModelWork._sent
    with pytest.MonkeyPatch.context() as patch:  # a mistake: what travels has lost bits
        patch.setattr(
            ModelWork,
            "_sent",
            lambda *given: [t + 2.0**-7 * t.detach().abs().to(t.dtype) for t in right(*given)],
        )
        return [*found, on_stage(context, *SCHEDULES[0])]


@pytest.fixture(scope="module")
def ranks() -> list[list[dict[str, Any]]]:
    return spawn(2, on_rank, pp=2)


def merged(ranks: list[list[dict[str, Any]]], index: int) -> dict[str, Tensor]:
    return {**ranks[0][index]["gradients"], **ranks[1][index]["gradients"]}


def vector(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([found[name].double().flatten() for name in sorted(found)])


def apart(found: dict[str, Tensor], one: dict[str, Tensor]) -> float:
    """Largest distance of a gradient from that of one process, in units of bfloat16's rounding, 2^-8."""
    floor = 1e-3 * vector(one).norm()
    return max(
        float((found[n].double() - g.double()).norm() / torch.maximum(g.double().norm(), floor)) * 2**8
        for n, g in one.items()
    )


@pytest.mark.parametrize("index", range(len(SCHEDULES)), ids=[name for _, name in SCHEDULES])
def test_two_stages_are_one_process(ranks: list[list[dict[str, Any]]], index: int) -> None:
    forces, _ = SCHEDULES[index]
    one, exact = alone(forces, HALF), alone(forces, DOUBLE)
    for rank in ranks:
        for got, wanted in zip(rank[index]["outputs"], one["outputs"], strict=True):
            assert torch.equal(got["energy"], wanted["energy"].detach())
            torch.testing.assert_close(got["forces"], wanted["forces"].detach(), rtol=1e-5, atol=1e-6)
        assert float(rank[index]["loss"]) == pytest.approx(float(one["loss"]), rel=1e-6)
    found = merged(ranks, index)
    assert found.keys() == one["gradients"].keys()
    assert distance(vector(found), vector(exact["gradients"])) < GRADIENTS
    assert apart(found, one["gradients"]) < 1
    if forces == "direct":
        assert all(torch.equal(found[n], gradient) for n, gradient in one["gradients"].items())


def test_lost_bits_are_seen(ranks: list[list[dict[str, Any]]]) -> None:
    one = alone(SCHEDULES[0][0], HALF)["gradients"]
    assert apart(merged(ranks, len(SCHEDULES)), one) > 2
