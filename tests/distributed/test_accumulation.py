"""Gradients of several batches are those of one batch that holds all their structures, on any layout."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megagnn.objective.gradient_methods import GRADIENT_METHODS, accumulate
from megagnn.objective.loss import Loss, LossCounts, label_counts, step_counts
from megagnn.optim.bucket_reducer import GradientReducer
from megagnn.optim.optimizer import WeightAverage, make_optimizer
from megagnn.optim.zero.matrices import Gathering
from megagnn.optim.zero.optimizer import ShardedAverage
from megagnn.parallel.context import ParallelContext, grid_context
from megagnn.parallel.world import sum_over_dp
from tests.distributed import sharded
from tests.distributed.matrices import fill_state
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


# --- ZeRO stages and update rules ---

BAD = {"adamw": 1, "muon": 1, "soap": 0}  # of the steps
STAGES = {"adamw": (0, 1, 2, 3), "muon": (0, 1, 3), "soap": (0, 2)}
NUM_STEPS = {"adamw": 4, "muon": 3, "soap": 2}  # as in matrices.py, SOAP's one good step from a full state
TOLERANCE = {"adamw": 1e-8, "muon": PARITY, "soap": PARITY}
Found = list[dict[str, Tensor]]


class SpoiltLoss(Loss):
    """Not a number while told so."""

    spoilt = False

    def __call__(self, *arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        total, shares = super().__call__(*arguments)
        return total * (float("nan") if self.spoilt else 1.0), shares


def train(context: ParallelContext, stage: int | None, rule: str) -> Found:
    """Weights and their average after steps of several batches, all of them clipped, of which one is bad and
    left out; stage None is one process with one batch, and no bad step."""
    case = sharded.Case(context.dp_size, 1, stage or 0, rule=rule)
    potential = sharded.build(case, context)
    once, plain = stage is None, stage is None and rule == "adamw"
    optimizer: Any = make_optimizer(potential, sharded.OPTIMIZER) if plain else None
    optimizer = optimizer or sharded.optimizer_of(potential, case, context)
    reducer = GradientReducer(potential.parameters(), context) if plain else optimizer.reducer
    average = WeightAverage(potential, 0.9) if once else ShardedAverage(optimizer, 0.9)
    if rule == "soap":
        fill_state(optimizer)
    shares = [range(6)] if once else SHARES[context.dp_size][context.dp_rank]
    batches, loss = [batch_of(share) for share in shares], SpoiltLoss(CONFIGURATIONS["stress"].loss_config())
    for step in range(NUM_STEPS[rule]):
        loss.spoilt = step == BAD[rule]
        if loss.spoilt and once:
            continue
        optimizer.zero_grad()
        counts = step_counts(batches, context)
        accumulate(GRADIENT_METHODS["one_backward"], potential, batches, loss, counts, reducer)
        norm = optimizer.gradient_norm(context)
        assert torch.isfinite(norm) == (not loss.spoilt)
        if not loss.spoilt:
            clip_norm = 0.25 / 4**step  # a constant one would nearly cancel between gradient and momentum
            assert norm > 2 * clip_norm
            optimizer.clipped_step(norm, clip_norm)
            average.update()
    found = [sharded.whole_parameters(potential, optimizer, context)]
    with average.applied():
        return [*found, sharded.whole_parameters(potential, optimizer, context)]


def error(got: Found, expected: Found) -> float:
    """The worst of the weights and their average."""
    return max(sharded.worst(a, b) for a, b in zip(got, expected, strict=True))


def sharded_on_rank(context: ParallelContext) -> dict[str, list[Found]]:
    return {rule: [train(context, stage, rule) for stage in stages] for rule, stages in STAGES.items()}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, list[Found]]]:
    return spawn(2, sharded_on_rank)


@pytest.mark.parametrize("rule", BAD)
def test_steps_of_several_batches_and_a_bad_one_in_every_stage(two_ranks: Any, rule: str) -> None:
    expected = train(ParallelContext(), None, rule)
    for found in [results[rule] for results in two_ranks]:
        for stage, of_stage in zip(STAGES[rule], found, strict=True):
            assert error(of_stage, expected) < TOLERANCE[rule], f"stage {stage}"
    assert error(train(ParallelContext(), 2, rule), expected) < TOLERANCE[rule], "in one process"


@pytest.mark.parametrize("rule", ["muon", "soap"])
def test_matrices_that_are_not_clipped_would_fail(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    """The size of the gradient counts beside the momentum of earlier steps."""
    expected = train(ParallelContext(), None, rule)
    init = Gathering.__init__
    monkeypatch.setattr(Gathering, "__init__", lambda self, work, _, context: init(self, work, 1.0, context))
    assert error(train(ParallelContext(), 2, rule), expected) > 1e3 * PARITY
