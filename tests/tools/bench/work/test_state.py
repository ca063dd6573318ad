"""What ranks keep by the arithmetic, in numbers, and beside what optimizers keep."""

from __future__ import annotations

import pytest

from megagnn.models.potential import build_potential
from megagnn.optim.config import OptimConfig
from megagnn.optim.optimizer import make_sharded_optimizer
from megagnn.parallel.config import ParallelConfig
from megagnn.parallel.context import ParallelContext
from tests.models.physics import STATISTICS, model_config
from tools.bench.work.state import Weights, floor_bytes, one_matrix_bytes

OTHERS = Weights((), 1000)
MATRICES = Weights(((10, 20), (30, 10)), 100)


@pytest.mark.parametrize(
    ("stage", "single", "half"),
    [(0, 16, 18), (1, 8 + 8 / 4, 6 + 12 / 4), (2, 4 + 12 / 4, 2 + 16 / 4), (3, 16 / 4, 18 / 4)],
)
def test_floors_of_adamw(stage: int, single: float, half: float) -> None:
    assert floor_bytes(OTHERS, "adamw", stage, "float32", 4) == 1000 * single
    assert floor_bytes(OTHERS, "adamw", stage, "bfloat16", 4) == 1000 * half
    assert (
        floor_bytes(OTHERS, "adamw", stage, "float32", 2, 2)
        == floor_bytes(OTHERS, "adamw", stage, "float32", 2) / 2
    )


def test_floors_of_matrices() -> None:
    """By hand: 500 numbers in matrices and 100 others, on two ranks in stage 1."""
    assert floor_bytes(MATRICES, "muon", 1, "float32", 2) == 600 * 8 + (500 * 4 + 100 * 8) / 2
    factors = 8 * (100 + 400) + 8 * (900 + 100)
    assert floor_bytes(MATRICES, "soap", 1, "float32", 2) == 600 * 8 + (600 * 8 + factors) / 2
    assert one_matrix_bytes(MATRICES, "muon", 3, "float32") == 300 * (4 + 8)
    assert one_matrix_bytes(MATRICES, "muon", 0, "float32") == 0
    assert one_matrix_bytes(MATRICES, "muon", 0, "float32", tp=2) == 300 * 4


@pytest.mark.parametrize("rule", ["adamw", "muon", "soap"])
def test_an_optimizer_keeps_so_much(rule: str) -> None:
    """But for what rounds buffers up to 64 bytes."""
    potential = build_potential(model_config(width=32, num_radial=4), STATISTICS)
    weights = Weights.of(potential)
    optimizer = make_sharded_optimizer(
        potential.model, OptimConfig(rule=rule), ParallelConfig(), ParallelContext()
    )
    kept = sum(buffer.nbytes for _, buffer in optimizer.kept())
    element_size = next(potential.parameters()).element_size()
    assert kept / element_size == pytest.approx(floor_bytes(weights, rule, 0, "float32", 1) / 4, rel=0.03)
