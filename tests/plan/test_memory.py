"""Planned memory is what the optimizers keep, exactly, and what a step's tensors take at most, to a tenth."""

from typing import Any

import pytest
import torch

from megagnn.models.potential import build_potential
from megagnn.objective.config import LossConfig
from megagnn.objective.gradient_methods import GRADIENT_METHODS
from megagnn.objective.loss import Loss, label_counts
from megagnn.optim.optimizer import make_optimizer, make_sharded_optimizer
from megagnn.optim.zero.offload import num_bytes
from megagnn.parallel.context import ParallelContext
from megagnn.plan.layout import Layout, Sizes
from megagnn.plan.memory import (
    ACTIVATIONS,
    GRADIENTS,
    MATRIX_COPIES,
    PARAMETERS,
    STATE,
    course,
    peak,
    worst_course,
)
from tests.plan.layouts import layout_of
from tools.bench.memory.step import peak_of_events
from tools.bench.work import edge as edge_workload

KINDS = {"param": PARAMETERS, "grad": GRADIENTS, "state": STATE}


def kept(layout: Layout) -> dict[str, int]:
    """Bytes of the buffers of the optimizer that a run would make."""
    context = ParallelContext(dp_size=layout.dp, tp_size=layout.tp)
    model = build_potential(
        layout.model, layout.statistics, 0, layout.precision, context, deferred=layout.sharded
    ).model
    config = layout.config
    if layout.sharded:
        made: Any = make_sharded_optimizer(model, config.optim, config.parallel, context)
    else:
        made = make_optimizer(model, config.optim)
    return {name: num_bytes(b for kind, b in made.kept() if kind == key) for key, name in KINDS.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("tp", [1, 2])
def test_buffers_are_what_the_sharded_optimizer_keeps(dtype: str, stage: int, tp: int) -> None:
    parallel = {"tensor": tp, "zero_stage": stage, "data": 4}
    layout = layout_of(ranks=4 * tp, parallel=parallel, train={"dtype": dtype})
    at_rest = course(layout)[0].num_bytes
    assert {name: at_rest[name] for name in KINDS.values()} == kept(layout)


@pytest.mark.parametrize("rule", ["muon", "soap"])
def test_state_of_matrices_is_divided_but_for_one_matrix(rule: str) -> None:
    layout = layout_of(ranks=4, parallel={"zero_stage": 1}, optim={"rule": rule, "warmup_steps": 0})
    planned, found = course(layout)[0].num_bytes[STATE], kept(layout)[STATE]
    assert planned == pytest.approx(found, abs=4 * 6 * 32 * 32)
    assert found > 4 * 4 * 32 * 32


MEASURED: list[tuple[str, dict[str, Any]]] = [
    ("direct", {}),
    ("direct", {"edge_memory": "recompute", "recompute_layers": True}),
    ("conservative", {}),
    ("conservative", {"recompute_layers": True}),
    ("conservative", {"family": "cartesian"}),
    ("direct", {"family": "painn"}),
]


@pytest.mark.parametrize(("forces", "values"), MEASURED, ids=str)
def test_the_peak_of_a_step_is_planned_to_a_tenth(forces: str, values: dict[str, Any]) -> None:
    batch, cutoff = edge_workload.dense_batch(1500, neighbours=15)
    atoms, edges = len(batch["positions"]), batch["edge_index"].shape[1]
    model = {"width": 128, "forces": forces, "cutoff": cutoff, **values}
    layout = layout_of(model, sizes=Sizes(atoms, edges, 1, 2), averages=False)
    potential = build_potential(layout.model, edge_workload.statistics())
    optimizer = make_optimizer(potential, layout.config.optim)
    loss, counts = Loss(LossConfig(energy="mse", forces="mse")), label_counts(batch, ParallelContext())

    def step() -> None:
        optimizer.zero_grad()
        GRADIENT_METHODS["one_backward"](potential, batch, loss, counts)
        optimizer.step()

    step()
    resting = course(layout)[0].num_bytes
    held = sum(num_bytes([p, p]) for p in potential.parameters()) * 2 + resting[ACTIVATIONS]
    assert peak(course(layout)).total == pytest.approx(peak_of_events(step) + held, rel=0.1)


def test_what_is_offloaded_is_not_on_the_device() -> None:
    optim = {"offload": "host"}
    layout = layout_of(ranks=2, parallel={"zero_stage": 3}, optim=optim)
    on_gpu, on_cpu = course(layout)[0], course(layout, host_is_device=True)[0]
    assert on_gpu.total == on_gpu.num_bytes[ACTIVATIONS]
    assert on_cpu.total == on_gpu.total + on_gpu.num_bytes["offloaded"]


@pytest.mark.parametrize(("schedule", "rank"), [("1f1b", 0), ("gpipe", 3)])
def test_a_pipeline_keeps_what_its_schedule_says(schedule: str, rank: int) -> None:
    """Of 1F1B the first rank keeps as many micro-batches as there are stages, of GPipe all."""
    model = {"forces": "direct", "num_layers": 8}
    pipeline = layout_of(
        model, 4, parallel={"pipeline": 4, "schedule": schedule}, optim={"accumulate_steps": 8}
    )
    found, moments = worst_course(pipeline)
    one = layout_of({**model, "num_layers": 2})
    batches = {"1f1b": 4, "gpipe": 8}[schedule]
    resting = moments[0].num_bytes[ACTIVATIONS]
    held = moments[1].num_bytes[ACTIVATIONS] - resting
    alone = course(one)[1].num_bytes[ACTIVATIONS] - one.sizes.batch_bytes
    assert found == rank
    assert held == pytest.approx(batches * alone, rel=0.15)  # of the first stage without a head
    assert resting == 8 * pipeline.sizes.batch_bytes


def test_stage_three_has_two_units_whole() -> None:
    layout = layout_of(ranks=4, parallel={"zero_stage": 3})
    resting, forward = course(layout)[:2]
    unit = max(sum(s.numel for s in unit) for _, unit in layout.units(0))
    whole = forward.num_bytes[PARAMETERS] - resting.num_bytes[PARAMETERS]
    assert whole == pytest.approx(2 * 4 * unit, rel=0.02)
    assert torch.float32.itemsize == 4


def test_an_update_that_plans_do_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(MATRIX_COPIES, "adamw")
    with pytest.raises(ValueError, match=r"by muon, soap, got optim\.rule = 'adamw'; add its copies"):
        course(layout_of(optim={"rule": "adamw"}))
