"""Pipelines give what one process gives, to 1e-10: predictions, loss, gradient norm, every gradient.

A cover of all pairs of the axes' values runs by default, everything with --full.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megagnn.data import keys
from megagnn.models.potential import build_potential
from megagnn.objective.loss import step_counts
from megagnn.parallel import messages
from megagnn.parallel.context import ParallelContext
from megagnn.pipeline_parallel.model_work import ModelWork, Tensors
from megagnn.pipeline_parallel.pipeline import WINDOW, Pipeline, forward_only, schedule_for
from megagnn.pipeline_parallel.simulate import peaks, simulate
from megagnn.pipeline_parallel.stage import check_owners
from tests.distributed.pipeline import (
    AXES,
    CONFIGURATIONS,
    Cell,
    all_cells,
    few_cells,
    measure,
    micro_batches,
    on_rank,
    reference,
    with_plan,
)
from tests.distributed.spawn import spawn
from tests.models.physics import STATISTICS
from tests.tolerances import PARITY

pytestmark = pytest.mark.timeout(7200)

Found = dict[Cell, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Callable[[int], Found]:
    """Of a world size: what each rank found in each cell; one spawn for all of them."""
    chosen = all_cells() if request.config.getoption("full") else few_cells()
    cells = [with_plan(cell, index) for index, cell in enumerate(chosen)]
    done: dict[int, Found] = {}

    def of(world_size: int) -> Found:
        if world_size not in done:
            mine = [cell for cell in cells if cell.world_size == world_size]
            one = world_size == 1
            ranks = [on_rank(ParallelContext(), mine)] if one else spawn(world_size, on_rank, mine)
            done[world_size] = {cell: [rank[k] for rank in ranks] for k, cell in enumerate(mine)}
        return done[world_size]

    return of


def failures(found: Found) -> list[str]:
    """Cells and the worst of what differs."""
    lines = []
    for cell, ranks in found.items():
        for rank, result in enumerate(ranks):
            name, error = max(result["errors"].items(), key=lambda item: item[1])
            if not error <= PARITY:
                lines.append(f"{cell}, rank {rank}: {name} is off by {error:.3g}")
    return lines


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_one_process(results: Callable[[int], Found], world_size: int) -> None:
    found = results(world_size)
    assert found
    assert not failures(found)
    for cell, ranks in found.items():
        everything = reference(cell.configuration).gradients.keys()
        assert set().union(*(rank["names"] for rank in ranks)) == everything
        if cell.pp > 1:
            assert all(len(rank["names"]) < len(everything) for rank in ranks)


EIGHT = [
    Cell(2, (2, 2), "conservative", "stress", "zero3", "both", "edge"),
    Cell(2, (2, 2), "interleaved", "direct", "zero2", "none", "channel"),
    Cell(4, (1, 2), "1f1b", "direct", "zero1", "layer"),
]


def test_eight_ranks(request: pytest.FixtureRequest) -> None:
    """All three axes at once."""
    if not request.config.getoption("full"):
        pytest.skip("only with --full: eight ranks take minutes to start on a small machine")
    ranks = spawn(8, on_rank, EIGHT)
    assert not failures({cell: [rank[k] for rank in ranks] for k, cell in enumerate(EIGHT)})


def test_the_cover() -> None:
    chosen = few_cells()
    for axis, values in enumerate(AXES[:3]):
        assert {cell[axis] for cell in chosen} == set(values)
    assert len(chosen) < 30


# Planted mistakes.


def seeded_first(patch: pytest.MonkeyPatch) -> None:
    """Tangents of x0 and the cell enter the first stage only."""
    right = ModelWork._seeded

    def wrong(self: ModelWork, stage: int, batch: dict[str, Tensor], rest: Tensors) -> dict[str, Any]:
        return right(self, stage, batch, rest if stage == 0 else [torch.zeros_like(t) for t in rest])

    patch.setattr(ModelWork, "_seeded", wrong)


def not_summed(patch: pytest.MonkeyPatch) -> None:
    """dE/dx0 of the last stage is lost on the way up."""
    right = ModelWork._summed

    def wrong(self: ModelWork, own: Tensors, so_far: Tensors | None) -> list[Tensor]:
        return right(self, own, None if so_far is None else [torch.zeros_like(t) for t in so_far])

    patch.setattr(ModelWork, "_summed", wrong)


def counts_of_a_micro_batch(patch: pytest.MonkeyPatch) -> None:
    """The loss of each micro-batch is over its own counts."""
    right = ModelWork._take_loss

    def wrong(self: ModelWork, i: int, *arguments: Any) -> Tensor:
        self.counts = step_counts(self.micro_batches[i : i + 1], ParallelContext())
        return right(self, i, *arguments)

    patch.setattr(ModelWork, "_take_loss", wrong)


def nothing(patch: pytest.MonkeyPatch) -> None:
    """The control."""


MISTAKES = [nothing, seeded_first, not_summed, counts_of_a_micro_batch]


def with_mistakes(context: ParallelContext, cell: Cell) -> list[float]:
    """The worst error of this rank with each mistake."""
    found = []
    for plant in MISTAKES:
        with pytest.MonkeyPatch.context() as patch:
            plant(patch)
            found.append(max(measure(cell, context)["errors"].values()))
    return found


def test_planted_mistakes_are_found() -> None:
    cell = Cell(2, (1, 1), "conservative", "stress", "flat", "none")
    right, *wrong = map(max, zip(*spawn(2, with_mistakes, cell, pp=2), strict=True))
    assert right <= PARITY
    for plant, error in zip(MISTAKES[1:], wrong, strict=True):
        assert error > 1e6 * PARITY, plant.__name__


# Weights, buffers and refusals.


def begun(context: ParallelContext, forces: str, name: str) -> dict[str, Any]:
    """Initial weights of this rank's part, and what goes wrong where it should."""
    config = CONFIGURATIONS["direct" if forces == "direct" else "stress"].model_config("fused", "none")
    schedule = schedule_for(name, config.forces, context.pp_size, 4)
    pipeline = Pipeline(config, STATISTICS, schedule, context, seed=3, precision=torch.float64)
    model = pipeline.potential.model
    found: dict[str, Any] = {"weights": {n: p.detach().clone() for n, p in model.named_parameters()}}
    total = torch.tensor(float(model.num_parameters()))
    found["count"] = messages.all_reduce(total, context, "pp").item()
    model.register_parameter("shared", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match=r"parameter shared is on pipeline ranks 0 and 1; .* of one stage"):
        check_owners(model, context)
    return found


def test_initial_weights_are_those_of_the_whole() -> None:
    config = CONFIGURATIONS["direct"].model_config("fused", "none")
    whole = build_potential(config, STATISTICS, 3, torch.float64).model
    ranks = spawn(2, begun, "direct", "interleaved", pp=2)
    weights = ranks[0]["weights"] | ranks[1]["weights"]
    assert not ranks[0]["weights"].keys() & ranks[1]["weights"].keys()
    assert weights.keys() == dict(whole.named_parameters()).keys()
    for name, parameter in whole.named_parameters():
        assert torch.equal(weights[name], parameter)
    assert ranks[0]["count"] == ranks[1]["count"] == whole.num_parameters()


def test_refusals() -> None:
    config = CONFIGURATIONS["stress"].model_config("fused", "none")
    with pytest.raises(ValueError, match=r"'1f1b' is not for .* = 'conservative'; use one of two-pass"):
        schedule_for("1f1b", "conservative", 2, 4)
    with pytest.raises(ValueError, match=r"'two-pass' is not for .* = 'direct'; use one of gpipe, 1f1b"):
        schedule_for("two-pass", "direct", 2, 4)
    one = ParallelContext()
    with pytest.raises(ValueError, match="two-pass is for 2 pipeline ranks, but there are 1"):
        Pipeline(config, STATISTICS, schedule_for("two-pass", "conservative", 2, 4), one)
    direct = CONFIGURATIONS["direct"].model_config("fused", "none")
    many = schedule_for("interleaved", "direct", 1, 4)
    assert many.num_stages == 2
    pipeline = Pipeline(direct, STATISTICS, many, one, precision=torch.float64)
    batches = micro_batches(one)
    with pytest.raises(ValueError, match="is for 4 micro-batches, got 3; some may be empty"):
        pipeline.gradients(batches[:3], None, step_counts(batches, one))  # type: ignore[arg-type]


def test_predictions_of_any_number_of_micro_batches() -> None:
    """Without a loss nothing is kept, and nothing needs a gradient."""
    config = CONFIGURATIONS["direct"].model_config("fused", "none")
    one = ParallelContext()
    schedule = schedule_for("interleaved", "direct", 1, 4)
    pipeline = Pipeline(config, STATISTICS, schedule, one, seed=1, precision=torch.float64)
    whole = build_potential(config, STATISTICS, 1, torch.float64)
    batches = micro_batches(one)[:3]
    for got, batch in zip(pipeline.predict(batches), batches, strict=True):
        expected = whole(batch)
        assert got.keys() == expected.keys() == {keys.ENERGY, keys.FORCES}
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value.detach(), rtol=PARITY, atol=PARITY)
            assert not got[key].requires_grad


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zb-h1", "conservative"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_predictions_overlap(name: str, num_ranks: int) -> None:
    """A window's batches follow one another: ranks are idle for the way through the stages alone."""
    forces = "conservative" if name == "conservative" else "direct"
    training = schedule_for(name, forces, num_ranks, 2 * num_ranks)
    m = WINDOW * num_ranks
    schedule = forward_only(training, m, forces == "conservative")
    found = simulate(schedule)
    assert found.finished
    chunks = schedule.num_stages // num_ranks
    assert found.bubble == pytest.approx((num_ranks - 1) / (chunks * m + num_ranks - 1))
    assert found.bubble < 1 / 5
    assert max(peaks(schedule, {"f": 1})) <= num_ranks


def test_predictions_take_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGURATIONS["stress"].model_config("fused", "none")
    one = ParallelContext()
    pipeline = Pipeline(
        config, STATISTICS, schedule_for("two-pass", "conservative", 1, 4), one, precision=torch.float64
    )
    given = [*micro_batches(one), *micro_batches(one)[:2]]
    sizes = []
    run = pipeline.potential._predict

    def counted(batches: Any) -> list[dict[str, Tensor]]:
        sizes.append(len(batches))
        return run(batches)

    monkeypatch.setattr(pipeline.potential, "_predict", counted)
    found = list(pipeline.potential.predictions(iter(given)))
    assert sizes == [WINDOW, 2]
    assert all(batch is wanted for (batch, _), wanted in zip(found, given, strict=True))
    for batch, outputs in found:
        torch.testing.assert_close(outputs[keys.ENERGY], pipeline.potential(batch)[keys.ENERGY])
