"""Bytes that a plan sends are what two ranks send, to the byte, and what a pipeline holds is planned."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from megagnn.config import config_from_dict
from megagnn.data import keys
from megagnn.models.costs import Pass, Setting
from megagnn.models.family import pass_elements
from megagnn.models.potential import build_potential
from megagnn.objective.config import LossConfig
from megagnn.objective.gradient_methods import GRADIENT_METHODS, accumulate
from megagnn.objective.loss import Loss, step_counts
from megagnn.optim.bucket_reducer import GradientReducer
from megagnn.optim.optimizer import make_optimizer, make_sharded_optimizer
from megagnn.parallel.context import ParallelContext, grid_context
from megagnn.pipeline_parallel.pipeline import Pipeline, schedule_for
from megagnn.plan.layout import Layout, Sizes
from megagnn.plan.memory import course, peak
from megagnn.plan.traffic import data_parallel_bytes, pipeline_bytes, sent, tensor_parallel_bytes
from tests.distributed.spawn import spawn
from tests.models.egnn.test_traffic_model import batch as physical_batch
from tests.models.egnn.test_traffic_model import counted as counted_passes
from tests.models.physics import randomised
from tests.plan.layouts import layout_of
from tools.bench.memory.step import peak_of_events
from tools.bench.work import edge as edge_workload

BATCH, CUTOFF = edge_workload.dense_batch(300, neighbours=10)
SIZES = Sizes(len(BATCH["positions"]), BATCH["edge_index"].shape[1], 1, 2)
LOSS = LossConfig(energy="mse", forces="mse", stress="mse", stress_weight=0.1)
CASES = [
    (family, forces, stage, batches)
    for family, forces in (("egnn", "direct"), ("egnn", "conservative"), ("cartesian", "conservative"))
    for stage in (0, 1, 2, 3)
    for batches in (1, 2)
    if (family, forces) == ("egnn", "conservative") or batches == stage % 2 + 1
]


def layout(family: str, forces: str, stage: int, batches: int, **parallel: Any) -> Layout:
    model = {"family": family, "forces": forces, "cutoff": CUTOFF, "stress": forces == "conservative"}
    grid = {"zero_stage": stage, "bucket_megabytes": 0.01, **parallel}
    return layout_of(model, 2, SIZES, parallel=grid, optim={"accumulate_steps": batches})


def along_dp(context: ParallelContext) -> list[tuple[float, float]]:
    """(gradients, weights) sent in a step of each case."""
    found = []
    for case in CASES:
        plan = layout(*case)
        potential = build_potential(plan.model, edge_workload.statistics(), context=context)
        config = plan.config
        optimizer: Any = make_optimizer(potential, config.optim)
        reducer: Any = GradientReducer(potential.parameters(), context, 10_000, optimizer.gradient_buffers())
        if plan.sharded:
            optimizer = make_sharded_optimizer(potential.model, config.optim, config.parallel, context)
            reducer = optimizer.reducer
        batches = [BATCH] * plan.micro_batches
        counts = step_counts(batches, context)
        with context.traffic.measured() as traffic:
            optimizer.zero_grad()
            accumulate(GRADIENT_METHODS["one_backward"], potential, batches, Loss(LOSS), counts, reducer)
            optimizer.step()
        bytes_of = {kind: float(n) for (axis, kind), n in traffic.bytes.items() if axis == "dp"}
        weights = bytes_of.pop("all_gather", 0.0)
        found.append((sum(bytes_of.values()), weights))
    return found


def test_data_parallel_ranks_send_what_is_planned(counted_on: list[Counted]) -> None:
    for rows in (found.dp for found in counted_on):
        for case, (gradients, weights) in zip(CASES, rows, strict=True):
            plan = layout(*case)
            planned = data_parallel_bytes(plan)
            if not plan.sharded:  # the padding within a message is not planned
                assert planned[0] <= gradients < planned[0] + 2 * 64 * len(plan.units(0)) * 20, case
                continue
            assert (gradients, weights) == planned, case
            assert gradients > 0, case


PIPELINES = [
    ("egnn", "direct", "1f1b", 3),
    ("egnn", "conservative", "conservative", 4),
    ("cartesian", "direct", "interleaved", 4),
]


def along_pp(context: ParallelContext) -> list[float]:
    """Bytes sent in a step of each pipeline."""
    found = []
    for family, forces, schedule, batches in PIPELINES:
        plan = layout(family, forces, 0, batches, pipeline=2, schedule=schedule)
        made = schedule_for(schedule, forces, 2, batches)
        pipeline = Pipeline(plan.model, edge_workload.statistics(), made, context)
        micro_batches = [BATCH] * batches
        counts = step_counts(micro_batches, context)
        with context.traffic.measured() as traffic:
            pipeline.gradients(micro_batches, Loss(LOSS), counts)
        found.append(float(sum(n for (axis, kind), n in traffic.bytes.items() if kind.startswith("send"))))
    return found


HELD = [
    ("egnn", "direct", "1f1b"),
    ("egnn", "conservative", "conservative"),
    ("cartesian", "conservative", "two-pass"),
]


def held_layout(family: str, forces: str, schedule: str) -> Layout:
    model = {"family": family, "forces": forces, "cutoff": CUTOFF, "width": 128}
    parallel = {"pipeline": 2, "schedule": schedule}
    return layout_of(model, 2, SIZES, averages=False, parallel=parallel, optim={"accumulate_steps": 4})


def held_along_pp(context: ParallelContext) -> list[float]:
    """The most that tensors hold beside what is kept in a step of each of `HELD`."""
    found = []
    for case in HELD:
        plan = held_layout(*case)
        made = schedule_for(case[2], case[1], 2, plan.micro_batches)
        pipeline = Pipeline(plan.model, edge_workload.statistics(), made, context)
        optimizer = make_optimizer(pipeline.potential.model, plan.config.optim)
        batches = [dict(BATCH) for _ in range(plan.micro_batches)]
        counts, loss = step_counts(batches, context), Loss(LossConfig(energy="mse", forces="mse"))

        def step(made: Any = (optimizer, pipeline, batches, loss, counts)) -> None:
            made[0].zero_grad()
            made[1].gradients(*made[2:])

        step()
        found.append(peak_of_events(step))
    return found


def test_pipeline_ranks_hold_what_is_planned_to_a_tenth(counted_on: list[Counted]) -> None:
    for rank, rows in enumerate(found.held for found in counted_on):
        for case, measured in zip(HELD, rows, strict=True):
            moments = course(held_layout(*case), rank)
            kept = moments[0].total
            assert peak(moments).total == pytest.approx(measured + kept, rel=0.1), (rank, case)
            assert measured > 0.2 * kept, "what is planned here is not all kept"


def test_pipeline_ranks_send_what_is_planned(counted_on: list[Counted]) -> None:
    for rank, rows in enumerate(found.pp for found in counted_on):
        for (family, forces, schedule, batches), counted in zip(PIPELINES, rows, strict=True):
            plan = layout(family, forces, 0, batches, pipeline=2, schedule=schedule)
            assert pipeline_bytes(plan, rank) == counted > 0, schedule


FAMILIES: dict[str, dict[str, Any]] = {
    "cartesian": {"width": 16, "vector_width": 12, "tensor_width": 4, "edge_width": 20},
    "painn": {"width": 16, "head_width": 20},
}
FORCES_OF: list[dict[str, Any]] = [{"forces": "direct"}, {"forces": "conservative", "stress": True}]


def along_tp(context: ParallelContext) -> list[tuple[Any, ...]]:
    """(cell, counted forward and backward, the same by the family)."""
    rows, b = [], physical_batch()
    num_atoms, num_structures = len(b[keys.POSITIONS]), len(b[keys.NUM_ATOMS])
    for family, widths in FAMILIES.items():
        for forces in FORCES_OF:
            for again in (False, True):
                model = {
                    "family": family,
                    "num_layers": 3,
                    "num_radial": 8,
                    "cutoff": 4.0,
                    **widths,
                    **forces,
                }
                values = {"model": {**model, "recompute_layers": again}, "loss": {"force_weight": 0}}
                config: Any = config_from_dict(values).model
                for which, (forward, backward) in counted_passes(
                    context, randomised(config, 0, context)
                ).items():
                    s = Setting(
                        ranks=context.tp_size,
                        planes=2 if which == "pair" else 1,
                        num_atoms=num_atoms,
                        own_atoms=num_atoms,
                        num_edges=b[keys.EDGE_INDEX].shape[1],
                        layers_again=again,
                        weights_wanted=which != "value",
                    )
                    positions = 3 * num_atoms + 9 * num_structures if which == "value" else 0
                    found = Pass(forward.total("tp"), backward.total("tp"))
                    cell = (family, config.forces, again, which)
                    rows.append((cell, found, pass_elements(config, "channel", s, positions)))
    return rows


class Counted(NamedTuple):
    """What a rank sent along each axis."""

    dp: list[tuple[float, float]]
    pp: list[float]
    tp: list[tuple[Any, ...]]
    held: list[float]
    """Bytes."""


def on_rank(context: ParallelContext) -> Counted:
    """Two ranks, which are a grid of each kind in turn."""
    pipeline = grid_context(1, 2, 1)
    tensor = along_tp(grid_context(1, 1, 2))
    return Counted(along_dp(context), along_pp(pipeline), tensor, held_along_pp(pipeline))


@pytest.fixture(scope="module")
def counted_on() -> list[Counted]:
    return spawn(2, on_rank)


def test_tensor_parallel_ranks_send_what_their_family_says(counted_on: list[Counted]) -> None:
    """The EGNN, which has two plans: tests/models/egnn/test_traffic_model.py."""
    for rows in (found.tp for found in counted_on):
        assert len(rows) == 12
        for cell, found, stated in rows:
            assert found == stated, cell
            assert found.forward > 0


def test_tensor_parallel_bytes_grow_with_micro_batches() -> None:
    one, two = (layout("egnn", "conservative", 0, batches, tensor=2) for batches in (1, 2))
    assert tensor_parallel_bytes(two) == 2 * tensor_parallel_bytes(one) > 0
    assert sent(one).dp == 0
    assert tensor_parallel_bytes(layout("egnn", "conservative", 0, 1)) == 0


def test_matrices_travel_to_their_owners_and_back() -> None:
    plan = layout_of(
        {"forces": "direct"}, 2, SIZES, parallel={"tensor": 2}, optim={"rule": "muon", "warmup_steps": 0}
    )
    elements = sum(s.numel for _, unit in plan.units(0) for s in unit if s.is_matrix)
    assert sent(plan).tp - tensor_parallel_bytes(plan) == pytest.approx(4 * 2 * 0.5 * elements / 2)
