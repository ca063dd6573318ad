"""Training by ZeRO stages on any layout, for the parity tests."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megagnn.models.potential import Potential
from megagnn.objective.gradient_methods import GRADIENT_METHODS
from megagnn.objective.loss import Loss, label_counts
from megagnn.optim.bucket_reducer import GradientReducer
from megagnn.optim.config import OptimConfig
from megagnn.optim.optimizer import (
    make_optimizer,
    make_sharded_optimizer,
    set_learning_rate,
)
from megagnn.optim.zero.optimizer import ShardedOptimizer
from megagnn.parallel.config import ParallelConfig
from megagnn.parallel.context import ParallelContext, grid_context
from megagnn.parallel.parameter import layout_of
from megagnn.parallel.world import sum_over_dp
from tests.distributed.parity import CONFIGURATIONS, batch_of
from tests.distributed.whole import gather_whole
from tests.models.physics import randomised

OPTIMIZER = OptimConfig(learning_rate=1e-3, clip_norm=0.25, weight_decay=0.1)
# Structures of each data-parallel rank: uneven, and on four ranks one has none.
SHARES = {
    1: ((0, 1, 2, 3, 4, 5),),
    2: ((0, 1, 2, 3), (4, 5)),
    4: ((0, 1), (2,), (), (3, 4, 5)),
}


class Case(NamedTuple):
    """How a model is trained."""

    dp: int
    tp: int
    stage: int
    configuration: str = "stress"
    plan: str = "auto"
    recomputation: str = "none"
    method: str = "one_backward"
    bucket_bytes: int = 1000
    rule: str = "adamw"

    def __str__(self) -> str:
        return f"dp{self.dp}-tp{self.tp} stage {self.stage} {' '.join(map(str, self[3:]))}"


def build(case: Case, context: ParallelContext) -> Potential:
    """The model, with the same weights on any layout."""
    config = CONFIGURATIONS[case.configuration].model_config("fused", case.recomputation)
    config = replace(config, parametrisation="mup", base_width=6, base_layers=1)  # several rates
    return randomised(config, context=context, plan=case.plan)  # type: ignore[arg-type]


def optimizer_of(
    potential: Potential, case: Case, context: ParallelContext, **optim: Any
) -> ShardedOptimizer:
    """The sharded one; settings may be replaced."""
    parallel = ParallelConfig(zero_stage=case.stage, bucket_megabytes=case.bucket_bytes / 2**20)
    return make_sharded_optimizer(
        potential.model, OptimConfig(**{**_SETTINGS, "rule": case.rule, **optim}), parallel, context
    )


_SETTINGS: dict[str, Any] = {"learning_rate": 1e-3, "clip_norm": 0.25, "weight_decay": 0.1}


def train(case: Case, context: ParallelContext, num_steps: int, plain: bool = False) -> dict[str, Any]:
    """Whole final parameters by name, gradient norms and losses; `plain` is the unsharded optimizer."""
    potential = build(case, context)
    optimizer: Any
    if plain:
        optimizer = make_optimizer(potential, OPTIMIZER)
        reducer: Any = GradientReducer(potential.parameters(), context, 1000, optimizer.gradient_buffers())
    else:
        optimizer = optimizer_of(potential, case, context)
        reducer = optimizer.reducer
    set_learning_rate(optimizer, OPTIMIZER.learning_rate)
    what = CONFIGURATIONS[case.configuration]
    batch, loss = batch_of(SHARES[case.dp][context.dp_rank]), Loss(what.loss_config())
    norms, losses = [], []
    for _ in range(num_steps):
        optimizer.zero_grad()
        counts = label_counts(batch, context)
        reducer.start()
        total, _ = GRADIENT_METHODS[case.method](potential, batch, loss, counts)
        reducer.finish()
        norm = optimizer.gradient_norm(context)
        optimizer.clipped_step(norm, OPTIMIZER.clip_norm)
        norms.append(norm.item())
        losses.append(sum_over_dp(total, context).item())
    return {"norms": norms, "losses": losses, "final": whole_parameters(potential, optimizer, context)}


def whole_parameters(potential: Potential, optimizer: Any, context: ParallelContext) -> dict[str, Tensor]:
    """The whole of each, on every rank."""
    if isinstance(optimizer, ShardedOptimizer):
        for unit in optimizer.units:
            unit.gather()
    named = potential.named_parameters()
    return {name: gather_whole(p, layout_of(p), context).clone() for name, p in named}


def on_rank(context: ParallelContext, cases: list[Case], num_steps: int) -> list[dict[str, Any]]:
    """Of each case what `train` gives."""
    found = []
    for case in cases:
        try:
            found.append(train(case, grid_context(case.dp, 1, case.tp), num_steps))
        except Exception as error:
            raise RuntimeError(f"in {case}") from error
    return found


def worst(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """max|w - w_ref| / max|w_ref|, over all parameters."""
    assert got.keys() == expected.keys()
    errors = [
        ((got[name] - whole).abs().max() / whole.abs().max().clamp(min=1e-30)).item()
        for name, whole in expected.items()
    ]
    return max(e if e == e else float("inf") for e in errors)


__all__ = ["Case", "build", "on_rank", "optimizer_of", "torch", "train", "whole_parameters", "worst"]
