"""Gradients of several batches are those of one batch that holds all their structures, on any layout."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megagnn.objective.gradient_methods import GRADIENT_METHODS, accumulate
from megagnn.objective.loss import Loss, LossCounts, label_counts, step_counts
from megagnn.optim.bucket_reducer import GradientReducer
from megagnn.optim.optimizer import make_optimizer
from megagnn.parallel.context import ParallelContext, grid_context
from megagnn.parallel.world import sum_over_dp
from tests.distributed import sharded
from tests.distributed.parity import CONFIGURATIONS, batch_of, whole_gradients
from tests.distributed.spawn import spawn
from tests.distributed.test_data_parallel import worst
from tests.models.physics import randomised
from tests.tolerances import PARITY

# structures of each data-parallel rank's batches: uneven, and one without any
SHARES = {1: [[(0, 1), (), (2, 3, 4), (5,)]], 2: [[(0, 1, 2), ()], [(4,), (3, 5)]]}
CASES = [
    ("stress", "one_backward"),
    ("stress", "create_graph"),
    ("direct", "one_backward"),
]
LAYOUTS = ((1, 2), (2, 1))  # (tp, dp)


class CountingReducer(GradientReducer):
    """Remembers how many batches came before `start`."""

    batches = 0

    def start(self) -> None:
        assert self.batches == self.expected - 1, "only the last backward may send"
        super().start()

    def expect(self, num_batches: int) -> None:
        self.expected = num_batches


def gradients(
    context: ParallelContext, configuration: str, method: str, own_counts: bool = False
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the whole, by accumulation; `own_counts` is the mistake to guard against."""
    what = CONFIGURATIONS[configuration]
    potential = randomised(what.model_config("fused", "none"), context=context, plan="auto")
    reducer = CountingReducer(potential.parameters(), context, bucket_bytes=1000)
    batches = [batch_of(share) for share in SHARES[context.dp_size][context.dp_rank]]
    reducer.expect(len(batches))

    def counted(potential: Any, batch: Any, loss: Loss, counts: LossCounts) -> Any:
        counts = label_counts(batch, context) if own_counts else counts
        result = GRADIENT_METHODS[method](potential, batch, loss, counts)
        reducer.batches += 1
        return result

    counts = step_counts(batches, context)
    total, shares = accumulate(counted, potential, batches, Loss(what.loss_config()), counts, reducer)
    weights = Loss(what.loss_config()).weights
    assert total.item() == pytest.approx(sum(weights[t] * s.item() for t, s in shares.items()), rel=1e-12)
    return sum_over_dp(total, context).item(), whole_gradients(potential, context)


def in_one_batch(configuration: str, method: str) -> tuple[float, dict[str, Tensor]]:
    what = CONFIGURATIONS[configuration]
    potential = randomised(what.model_config("fused", "none"))
    batch, alone = batch_of(range(6)), ParallelContext()
    loss, counts = Loss(what.loss_config()), label_counts(batch, alone)
    total, _ = GRADIENT_METHODS[method](potential, batch, loss, counts)
    return total.item(), whole_gradients(potential, alone)


def check(found: tuple[float, dict[str, Tensor]], case: tuple[str, str]) -> None:
    loss, grads = in_one_batch(*case)
    assert found[0] == pytest.approx(loss, rel=PARITY)
    assert worst(found[1], grads) < PARITY


@pytest.mark.parametrize("case", CASES)
def test_one_process(case: tuple[str, str]) -> None:
    check(gradients(ParallelContext(), *case), case)


def on_rank(context: ParallelContext) -> list[tuple[float, dict[str, Tensor]]]:
    return [gradients(grid_context(dp, 1, tp), *case) for tp, dp in LAYOUTS for case in CASES]


def test_two_ranks() -> None:
    """Data-parallel, and one model divided."""
    for results in spawn(2, on_rank):
        for found, case in zip(results, CASES * len(LAYOUTS), strict=True):
            check(found, case)


def test_counts_of_each_batch_would_fail() -> None:
    """The bug this guards against, a mean of the batches' means."""
    expected = in_one_batch(*CASES[0])[1]
    mistaken = gradients(ParallelContext(), *CASES[0], own_counts=True)[1]
    num = len(SHARES[1][0])
    assert worst({name: g / num for name, g in mistaken.items()}, expected) > 0.1


# --- ZeRO stages ---

BAD = 1  # of the steps


class SpoiltLoss(Loss):
    """Not a number while told so."""

    spoilt = False

    def __call__(self, *arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        total, shares = super().__call__(*arguments)
        return total * (float("nan") if self.spoilt else 1.0), shares


def train(context: ParallelContext, stage: int | None) -> dict[str, Tensor]:
    """Four steps of several batches, one of which is bad and left out; stage None is one process with one
    batch, and three steps."""
    case = sharded.Case(context.dp_size, 1, stage or 0)
    potential = sharded.build(case, context)
    plain = stage is None
    optimizer: Any = make_optimizer(potential, sharded.OPTIMIZER) if plain else None
    optimizer = optimizer or sharded.optimizer_of(potential, case, context)
    reducer = GradientReducer(potential.parameters(), context) if plain else optimizer.reducer
    shares = [range(6)] if plain else SHARES[context.dp_size][context.dp_rank]
    batches, loss = [batch_of(share) for share in shares], SpoiltLoss(CONFIGURATIONS["stress"].loss_config())
    for step in range(3 if plain else 4):
        loss.spoilt = step == BAD and not plain
        optimizer.zero_grad()
        counts = step_counts(batches, context)
        accumulate(GRADIENT_METHODS["one_backward"], potential, batches, loss, counts, reducer)
        norm = optimizer.gradient_norm(context)
        assert torch.isfinite(norm) == (not loss.spoilt)
        if not loss.spoilt:
            optimizer.clipped_step(norm, sharded.OPTIMIZER.clip_norm)
    return sharded.whole_parameters(potential, optimizer, context)


def sharded_on_rank(context: ParallelContext) -> list[dict[str, Tensor]]:
    return [train(context, stage) for stage in range(4)]


def test_steps_of_several_batches_and_a_bad_one_in_every_stage() -> None:
    expected = train(ParallelContext(), None)
    for results in spawn(2, sharded_on_rank):
        for stage, found in enumerate(results):
            assert sharded.worst(found, expected) < 1e-8, f"stage {stage}"
