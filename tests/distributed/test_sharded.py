"""ZeRO stages give plain AdamW's parameters after 20 steps, to 1e-10, and stages 1 to 3 the same bits.

A cover of all pairs of the axes' values runs by default, everything with --full.
"""

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from megagnn.objective.gradient_methods import GRADIENT_METHODS
from megagnn.objective.loss import Loss, label_counts
from megagnn.optim.zero import unit
from megagnn.parallel.context import ParallelContext
from tests.distributed import sharded
from tests.distributed.pairwise import pairwise
from tests.distributed.sharded import Case, on_rank, train, worst
from tests.distributed.spawn import spawn
from tests.tolerances import PARITY

pytestmark = pytest.mark.timeout(7200)

NUM_STEPS = 20
LAYOUTS = ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2))
AXES: tuple[tuple[Any, ...], ...] = (
    LAYOUTS,
    (0, 1, 2, 3),
    ("stress", "direct", "study"),
    ("auto", "channel", "edge"),
    ("none", "layer", "both"),
    ("one_backward", "create_graph"),
)


def allowed(cell: tuple[Any, ...]) -> bool:
    (_, tp), stage, configuration, plan, _, method = cell
    if (tp == 1) != (plan == "auto"):
        return False
    if method == "create_graph":
        return bool(stage < 3 and configuration != "direct")
    return True


def cases(full: bool) -> list[Case]:
    """Grouped so that each comes in stages 1, 2 and 3, whose bits are compared."""
    cells = [cell for cell in product(*AXES) if allowed(cell)]
    if not full:
        cells = pairwise(cells)  # type: ignore[assignment]
    chosen = dict.fromkeys(
        # a message of everything where nothing is recomputed, else several of each layer
        Case(*layout, *rest, bucket_bytes=10**6 if rest[3] == "none" else 1000)
        for layout, *rest in cells
    )
    for case in list(chosen):
        if case.stage == 3 or (full and case.stage > 0):
            chosen |= dict.fromkeys(case._replace(stage=stage) for stage in (1, 2))
    return list(chosen)


@cache
def plain(configuration: str) -> dict[str, Any]:
    """Plain AdamW in one process."""
    case = Case(1, 1, 0, configuration)
    return train(case, ParallelContext(), NUM_STEPS, plain=True)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Callable[[int], dict[Case, list[dict[str, Any]]]]:
    """Of a world size: what each rank found in each case."""
    everything, done = cases(request.config.getoption("full")), {}

    def of(world_size: int) -> dict[Case, list[dict[str, Any]]]:
        if world_size not in done:
            mine = [case for case in everything if case.dp * case.tp == world_size]
            if world_size == 1:
                ranks = [[train(case, ParallelContext(), NUM_STEPS) for case in mine]]
            else:
                ranks = spawn(world_size, on_rank, mine, NUM_STEPS)
            done[world_size] = {case: [rank[k] for rank in ranks] for k, case in enumerate(mine)}
        return done[world_size]

    return of


Results = Callable[[int], dict[Case, list[dict[str, Any]]]]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_plain_adamw(results: Results, world_size: int) -> None:
    found = results(world_size)
    assert {case.stage for case in found} == {0, 1, 2, 3}
    for case, ranks in found.items():
        want = plain(case.configuration)
        for rank, got in enumerate(ranks):
            where = f"rank {rank} of {case}"
            assert worst(got["final"], want["final"]) <= PARITY, where
            assert got["norms"] == pytest.approx(want["norms"], rel=PARITY), where
            assert got["losses"] == pytest.approx(want["losses"], rel=PARITY), where


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_stages_give_the_same_bits(results: Results, world_size: int) -> None:
    found, num_compared = results(world_size), 0
    for case, ranks in found.items():
        first = found.get(case._replace(stage=1))
        if case.stage > 1 and first is not None:
            num_compared += 1
            for got, want in zip(ranks, first, strict=True):
                assert got["norms"] == want["norms"], case
                for name, whole in want["final"].items():
                    assert torch.equal(got["final"][name], whole), f"{case}: {name}"
    assert num_compared >= 2


def mistaken(context: ParallelContext, case: Case) -> dict[str, Tensor]:
    """Trained with gradients of which all messages but a unit's first are lost."""
    taken = unit.Unit.take_reduced

    def first(self: unit.Unit, columns: slice, values: Tensor, fresh: bool) -> None:
        if columns.start == 0:
            taken(self, columns, values, fresh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unit.Unit, "take_reduced", first)
        return dict(train(case, context, NUM_STEPS)["final"])


def test_lost_messages_are_found() -> None:
    case = Case(2, 1, 2)
    assert worst(spawn(2, mistaken, case)[0], plain(case.configuration)["final"]) > 1e4 * PARITY


def stale(context: ParallelContext, case: Case) -> dict[str, Tensor]:
    """Trained with parameters that are not gathered again after a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unit.Unit, "free", lambda self: None)
        return dict(train(case, context, NUM_STEPS)["final"])


def test_parameters_of_an_earlier_step_are_found() -> None:
    case = Case(2, 1, 3)
    assert worst(spawn(2, stale, case)[0], plain(case.configuration)["final"]) > 1e4 * PARITY


def accumulated(context: ParallelContext, case: Case, num_micro_batches: int) -> list[Tensor]:
    """Two steps' gradient shards, whole; the micro-batches of a step are the structures one by one."""
    potential = sharded.build(case, context)
    optimizer = sharded.optimizer_of(potential, case, context)
    what = sharded.CONFIGURATIONS[case.configuration]
    share, loss = sharded.SHARES[case.dp][context.dp_rank], Loss(what.loss_config())
    parts = [share[k::num_micro_batches] for k in range(num_micro_batches)]
    result = []
    for _ in range(2):
        optimizer.zero_grad()
        counts = label_counts(sharded.batch_of(share), context)
        for k, part in enumerate(parts):
            if k == num_micro_batches - 1:
                optimizer.reducer.start()
            GRADIENT_METHODS[case.method](potential, sharded.batch_of(part), loss, counts)
        optimizer.reducer.finish()
        result += [u.grad_shard.clone() for u in optimizer.units]
    return result


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_accumulation(stage: int) -> None:
    case = Case(2, 1, stage)
    once, twice = (spawn(2, accumulated, case, number) for number in (1, 3))
    for rank in range(2):
        norm = torch.cat(once[rank]).norm()
        for a, b in zip(once[rank], twice[rank], strict=True):
            assert (a - b).abs().max() <= PARITY * norm
