"""Families of generic operations give on every layout what one process gives, to 1e-10.

Outputs, loss, every parameter's gradient. The EGNN's matrices, with its kernels, are in tests/distributed.

Tensor, pipeline and data parallelism, ZeRO stages, direct forces and conservative ones by one backward, with
layers recomputed and not. A cover of all pairs of the axes' values runs by default. The whole matrix:

    pytest tests/models/test_parity.py --full
"""

from itertools import chain, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megagnn.objective.gradient_methods import GRADIENT_METHODS
from megagnn.objective.loss import label_counts
from megagnn.parallel.context import ParallelContext, grid_context
from megagnn.parallel.world import sum_over_dp
from tests.distributed import pipeline
from tests.distributed.pairwise import pairs_of, pairwise
from tests.distributed.parity import UNEVEN, RecordingLoss, Result, batch_of, errors
from tests.distributed.pipeline import FAMILIES, SCHEDULES, Cell, reference
from tests.distributed.spawn import spawn
from tests.models.physics import randomised
from tests.tolerances import PARITY

pytestmark = pytest.mark.timeout(7200)

PAIRS = ("cartesian-pairs", "egnn-pairs-direct")
AXES: tuple[tuple[Any, ...], ...] = (
    (1, 2),  # pp
    (1, 2),  # tp
    (1, 2),  # dp
    tuple(name for name in FAMILIES if name not in PAIRS),
    ("flat", "zero1", "zero2", "zero3"),
    ("none", "layer"),
)
PAIR_AXES = (*AXES[:3], PAIRS, ("flat", "zero3"), ("none",))
"""Of pair potentials, which have no parameters."""


def all_cells(axes: tuple[tuple[Any, ...], ...] = AXES) -> list[tuple[Any, ...]]:
    """The whole matrix, of up to four ranks."""
    return [cell for cell in product(*axes) if cell[0] * cell[1] * cell[2] <= 4]


def cells(full: bool) -> list[Cell]:
    """With each kind of step's schedules by turns."""
    found, matrices = [], (all_cells(), all_cells(PAIR_AXES))
    chosen = chain.from_iterable(matrices if full else map(pairwise, matrices))
    for k, (pp, tp, dp, configuration, optimizer, recomputation) in enumerate(chosen):
        schedules = SCHEDULES["direct" not in configuration]
        found.append(
            Cell(pp, (tp, dp), schedules[k % len(schedules)], configuration, optimizer, recomputation)
        )
    return found


def measure(cell: Cell, context: ParallelContext) -> dict[str, float]:
    """Errors of this rank in a cell of one pipeline stage, as a training step takes its gradients."""
    what = FAMILIES[cell.configuration]
    potential = randomised(what.model_config("unfused", cell.recomputation), context=context)
    holder: Any = SimpleNamespace(potential=potential)
    optimizer, reducer = pipeline.optimizer_of(cell, holder, context)
    share = UNEVEN[context.dp_size][context.dp_rank]
    batch, loss = batch_of(share), RecordingLoss(what.loss_config())
    optimizer.zero_grad()
    counts = label_counts(batch, context)
    reducer.start()
    total, _ = GRADIENT_METHODS["one_backward"](potential, batch, loss, counts)
    reducer.finish()
    sum_over_dp(total, context)
    loss.outputs["energy"] -= potential.model.reference_energy(batch)
    expected = reference(cell.configuration)
    gradients = pipeline.gradients_of(holder, optimizer, context)
    norm = torch.stack([g.square().sum() for g in expected.gradients.values()]).sum().sqrt()
    found = {"gradient norm": abs(optimizer.gradient_norm(context).item() / norm.item() - 1)}
    return {**found, **errors(Result(loss.outputs, total.item(), gradients), expected, share)}


def on_rank(context: ParallelContext, some: list[Cell]) -> list[dict[str, float]]:
    """Errors of this rank in each cell; the cells' layouts are all of this number of ranks."""
    contexts, found = {}, []
    for cell in some:
        pp, (tp, dp) = where = cell[:2]
        if where not in contexts:
            contexts[where] = grid_context(dp, pp, tp) if context.world_size > 1 else context
        run = (lambda *a: pipeline.measure(*a)["errors"]) if pp > 1 else measure
        try:
            found.append(run(cell, contexts[where]))
        except Exception as error:
            raise RuntimeError(f"in the cell {cell}") from error
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_one_process(world_size: int, request: pytest.FixtureRequest) -> None:
    mine = [cell for cell in cells(request.config.getoption("full")) if cell.world_size == world_size]
    assert mine
    ranks = [on_rank(ParallelContext(), mine)] if world_size == 1 else spawn(world_size, on_rank, mine)
    worst = {str(cell): max(max(rank[k].values()) for rank in ranks) for k, cell in enumerate(mine)}
    print(f"{len(mine)} cells of {world_size} ranks, worst error {max(worst.values()):.1e}")
    failed = {name: error for name, error in worst.items() if not error <= PARITY}
    assert not failed


def test_the_cover_holds_every_pair() -> None:
    everything = all_cells()
    chosen = pairwise(everything)
    assert set().union(*map(pairs_of, chosen)) == set().union(*map(pairs_of, everything))
    assert len(chosen) < 20
    assert len(everything) == 224


def test_every_parameter_has_a_gradient() -> None:
    """No branch is there that nothing reads, and none is zero, so that the cells compare something."""
    for name, what in FAMILIES.items():
        gradients = reference(name).gradients
        potential = randomised(what.model_config("unfused", "none"))
        assert gradients.keys() == {n for n, _ in potential.named_parameters()}
        largest = max(g.abs().max().item() for g in gradients.values())
        assert all(g.abs().max() > 1e-10 * largest for g in gradients.values()), name
