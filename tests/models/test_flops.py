import dataclasses

import pytest

from megagnn.models.egnn.config import EGNNConfig
from megagnn.models.family import STEP_UNITS, step_flops
from tools.bench.work import edge as edge_workload


@pytest.mark.parametrize("forces", ["direct", "conservative"])
@pytest.mark.parametrize("width", [16, 64])
def test_as_the_benchmarks_count(forces: str, width: int) -> None:
    """Less what is made again; checked against the products that torch sees in tests/tools."""
    config = edge_workload.model_config(width, forces, 5.0, 3)
    name = edge_workload.our_name("save")
    counted = edge_workload.step_flops(name, forces, width, 100, 3000, 3)
    again = edge_workload.radial_again(name, forces, width, 3000, 3)
    assert 0 < again < 0.15 * counted
    assert step_flops(config, 100, 3000) == counted - again


def test_saving_memory_is_not_counted() -> None:
    config = EGNNConfig(width=32)
    for saved in ({"edge_memory": "recompute"}, {"recompute_layers": True}, {"edge_operation": "unfused"}):
        assert step_flops(dataclasses.replace(config, **saved), 10, 100) == step_flops(config, 10, 100)


def test_sums_over_graphs_and_directions() -> None:
    config = EGNNConfig(width=32)
    one, two, both = (step_flops(config, n, e) for n, e in ((10, 100), (20, 50), (30, 150)))
    assert one + two == both
    still = dataclasses.replace(config, update_coordinates=False, forces="direct")
    moving = dataclasses.replace(still, update_coordinates=True)
    per_layer = 2 * STEP_UNITS["direct"] * (32 * 32 + 32) * 100
    assert step_flops(moving, 10, 100) - step_flops(still, 10, 100) == (config.num_layers - 1) * per_layer
