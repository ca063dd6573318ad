"""bfloat16 with the sharded optimizer: float32 sums of gradients, the same bits in every ZeRO stage, and the
bytes that `Precision` promises.
"""

from typing import Any

import pytest
import torch

from megagnn.data.batch import collate
from megagnn.models.potential import build_potential
from megagnn.models.precision import Precision, precision_of
from megagnn.objective.config import LossConfig
from megagnn.objective.gradient_methods import GRADIENT_METHODS
from megagnn.objective.loss import Loss, label_counts
from megagnn.optim.config import OptimConfig
from megagnn.optim.optimizer import make_sharded_optimizer
from megagnn.optim.zero.optimizer import ShardedOptimizer
from megagnn.parallel.config import ParallelConfig
from megagnn.parallel.context import ParallelContext
from tests.distributed.parity import CUTOFF, structures
from tests.distributed.sharded import whole_parameters
from tests.distributed.spawn import spawn
from tests.models.parameter_bytes import bytes_per_parameter
from tests.models.physics import STATISTICS, model_config

SHARES = ((0, 1, 2, 3), (4, 5))
STAGES = (0, 1, 2, 3)
STEPS = 3


def train(context: ParallelContext, precision: Precision, stage: int) -> dict[str, Any]:
    """Final weights, gradient norms, and the bytes per parameter that stay between steps."""
    config = model_config(width=32, num_radial=4, cutoff=CUTOFF)
    potential = build_potential(config, STATISTICS, 0, precision, context)
    optim = OptimConfig(learning_rate=1e-4, clip_norm=0.25)
    optimizer = make_sharded_optimizer(potential.model, optim, ParallelConfig(zero_stage=stage), context)
    batch = collate([structures()[k] for k in SHARES[context.dp_rank]], precision.geometry)
    loss, norms = Loss(LossConfig("mse", "mse")), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        counts = label_counts(batch, context)
        optimizer.reducer.start()
        GRADIENT_METHODS["one_backward"](potential, batch, loss, counts)
        optimizer.reducer.finish()
        norms.append(optimizer.gradient_norm(context))
        optimizer.clipped_step(norms[-1], optim.clip_norm)
    optimizer.zero_grad()
    kept, types = kept_bytes(optimizer), {unit.grad_shard.dtype for unit in optimizer.units}
    elements = sum(unit.layout.size for unit in optimizer.units)
    return {
        "norms": torch.stack(norms),
        "bytes": kept / elements,
        "types": types,
        "weights": whole_parameters(potential, optimizer, context),
    }


def kept_bytes(optimizer: ShardedOptimizer) -> int:
    """Of weights, gradients, moments and master weights of this rank, each memory once."""
    tensors = [buffer for _, buffer in optimizer.kept()]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(storages.values())


def on_rank(context: ParallelContext) -> dict[tuple[str, int], dict[str, Any]]:
    return {
        (name, stage): train(context, precision_of(name), stage)
        for name in ("bfloat16", "float32")
        for stage in STAGES
    }


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, int], dict[str, Any]]:
    result: dict[tuple[str, int], dict[str, Any]] = spawn(2, on_rank)[0]
    return result


@pytest.mark.parametrize("stage", STAGES)
def test_bytes_are_those_of_the_policy(found: dict[tuple[str, int], dict[str, Any]], stage: int) -> None:
    for name in ("bfloat16", "float32"):
        assert found[name, stage]["bytes"] == bytes_per_parameter(precision_of(name), stage, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_gives_the_same_bits(found: dict[tuple[str, int], dict[str, Any]], stage: int) -> None:
    got, want = found["bfloat16", stage], found["bfloat16", 0]
    assert got["types"] == {torch.float32}
    assert {w.dtype for w in got["weights"].values()} == {torch.bfloat16}
    assert all(torch.equal(got["weights"][name], w) for name, w in want["weights"].items())
    assert torch.allclose(got["norms"], want["norms"], rtol=1e-6)  # float32 squares in other runs


def test_steps_are_those_of_float32(found: dict[tuple[str, int], dict[str, Any]]) -> None:
    """Norms to 2 %. Weights of the two differ by the rounding, 2^-9, and not by what three steps moved."""
    half, single = found["bfloat16", 0], found["float32", 0]
    assert torch.allclose(half["norms"], single["norms"], rtol=0.02)
    for name, w in single["weights"].items():
        assert (half["weights"][name].float() - w).abs().max() <= 2**-8 * w.abs().max() + 2 * STEPS * 1e-4
