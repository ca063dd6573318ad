"""Layers' costs as measured, and the stages that follow."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from megagnn.config import RunConfig, config_from_dict
from megagnn.models.precision import precision_of
from megagnn.objective.loss import Loss
from megagnn.parallel.context import ParallelContext
from megagnn.pipeline_parallel import stage_costs
from megagnn.pipeline_parallel.model_work import ModelWork
from megagnn.pipeline_parallel.stage import stages_of_sizes
from megagnn.pipeline_parallel.stage_costs import layer_by_layer, measured_costs, run_stages
from megagnn.pipeline_parallel.validate import validate
from tests.distributed.parity import CONFIGURATIONS, batch_of
from tests.models.physics import STATISTICS

ONE = ParallelContext()


def costs_of(name: str, num_layers: int) -> list[float]:
    what = CONFIGURATIONS[name]
    config = dataclasses.replace(what.model_config("fused", "none"), num_layers=num_layers)
    loss = Loss(what.loss_config())
    return measured_costs(config, STATISTICS, batch_of(range(4)), loss, ONE, torch.float64)


@pytest.mark.parametrize("conservative", [False, True])
def test_layer_by_layer(conservative: bool) -> None:
    validate(layer_by_layer(3, conservative))


@pytest.mark.parametrize("name", ["stress", "direct"])
def test_every_layer_has_a_cost(name: str) -> None:
    costs = costs_of(name, 6)
    assert len(costs) == 6
    assert min(costs) > 0
    assert len(set(costs[1:-1])) == 1, "those in the middle are alike"
    assert [len(costs_of(name, num)) for num in (1, 2, 3)] == [1, 2, 3]


def test_a_slow_layer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something that multiply-adds do not tell."""
    right = ModelWork._through

    def slow(self: ModelWork, stage: int, *others: Any) -> Any:
        time.sleep(0.05 if stage == 0 else 0)
        return right(self, stage, *others)

    monkeypatch.setattr(ModelWork, "_through", slow)
    costs = costs_of("stress", 5)
    assert costs[0] > 0.1, "twice, once a pass"
    assert costs[0] > costs[1] + 0.05


def config(**parallel: Any) -> RunConfig:
    values = {"model": {"num_layers": 6, "width": 8}, "optim": {"accumulate_steps": 2}}
    return config_from_dict({**values, "parallel": {"pipeline": 2, **parallel}})


def sizes(run: RunConfig, earlier: list[int] | None = None) -> list[int]:
    def step() -> list[dict[str, Tensor]]:
        return [batch_of(range(3)), batch_of(range(1))]

    loss, precision = Loss(run.loss), precision_of(run.train.dtype, run.train.geometry)
    stages = run_stages(run.model, run.parallel, STATISTICS, 2, ONE, step, loss, precision, earlier or [])
    return [len(s.layers) for s in stages]


def test_stages_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def measured(*arguments: Any) -> list[float]:
        seen.append(arguments[2])
        return [5.0, 1.0, 1.0, 1.0, 1.0, 1.0]

    monkeypatch.setattr(stage_costs, "measured_costs", measured)
    assert sizes(config()) == [3, 3]
    assert not seen
    assert sizes(config(stage_costs="measured")) == [1, 5]
    assert len(seen[0]["energy"]) == 3, "the largest micro-batch"
    assert sizes(config(stage_costs="measured"), [2, 4]) == [2, 4], "a run goes on as it was"
    assert sizes(config(stage_costs="measured"), [2, 2, 2]) == [1, 5]
    assert sizes(config(stages=[4, 2]), [2, 4]) == [4, 2]


@pytest.mark.parametrize("bad", [[3, 4], [6], [2, 2, 2]])
def test_stages_that_do_not_fit(bad: list[int]) -> None:
    with pytest.raises(ValueError, match=r"parallel.stages = .* must be 2 numbers .* add up to .* 6; got"):
        config(stages=bad)
    with pytest.raises(ValueError, match=r"parallel.stages = .* must be 2 numbers .* add up to .* 6; got"):
        stages_of_sizes(bad, 6, 2)


@pytest.mark.parametrize("option", [{"stages": [6]}, {"stage_costs": "measured"}])
def test_stages_need_a_pipeline(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"need parallel.pipeline above 1; set it, or leave them out"):
        config(pipeline=1, **option)
