"""Every layout gives what one process gives, to 1e-10: outputs, loss and every parameter's gradient.

A cover of all pairs of the axes' values runs by default. The whole matrix, and its table for docs/results:

    pytest tests/distributed/test_parity.py --full --table docs/results/parity.md
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megagnn.parallel.context import ParallelContext
from tests.distributed.pairwise import pairs_of, pairwise
from tests.distributed.parity import (
    AXES,
    CONFIGURATIONS,
    Cell,
    Outcome,
    Result,
    all_cells,
    batch_of,
    errors,
    measure,
    merged,
    on_rank,
    reference,
)
from tests.distributed.parity_table import table
from tests.distributed.spawn import spawn
from tests.tolerances import PARITY, PARITY_FLOOR

pytestmark = pytest.mark.timeout(7200)  # --full takes longer than a test may otherwise

Run = Callable[[int], list[Outcome]]


@pytest.fixture(scope="module")
def cells(request: pytest.FixtureRequest) -> list[Cell]:
    full = request.config.getoption("full")
    return all_cells() if full else [Cell._make(cell) for cell in pairwise(all_cells())]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def outcomes(cells: list[Cell]) -> Run:
    """Of a world size; one spawn for all its cells, for starting ranks is what takes time."""
    done: dict[int, list[Outcome]] = {}

    def run(world_size: int) -> list[Outcome]:
        if world_size not in done:
            mine = [cell for cell in cells if cell.world_size == world_size]
            if world_size == 1:
                per_rank = [[measure(cell, ParallelContext()) for cell in mine]]
            else:
                per_rank = spawn(world_size, on_rank, mine)
            done[world_size] = merged(mine, per_rank)
        return done[world_size]

    return run


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_one_process(outcomes: Run, world_size: int) -> None:
    found = outcomes(world_size)
    assert found
    failed = sorted((o for o in found if not o.passes), key=lambda o: -max(o.errors.values()))
    assert not failed, f"{len(failed)} of {len(found)} cells differ:\n" + "\n".join(map(str, failed[:20]))


def test_table(outcomes: Run, cells: list[Cell], request: pytest.FixtureRequest) -> None:
    """Every cell is in the table once; with --table it is written."""
    command = "pytest tests/distributed/test_parity.py" + (
        " --full" if request.config.getoption("full") else ""
    )
    text = table([outcome for world_size in (1, 2, 4) for outcome in outcomes(world_size)], command)
    assert f"{len(cells)} cells" in text
    for axis, values in AXES.items():
        rows = [line for line in text.splitlines() if line.startswith(f"| {axis} |")]
        assert len(rows) == len(values)
        assert sum(int(row.split("|")[3]) for row in rows) == len(cells)
    path = request.config.getoption("table")
    if path:
        Path(path).write_text(text)


def test_the_cover_holds_every_pair() -> None:
    everything = all_cells()
    chosen = pairwise(everything)
    wanted = set().union(*map(pairs_of, everything))
    assert set().union(*map(pairs_of, chosen)) == wanted
    # Every two values that are allowed together; one that none allows would be missing in both.
    for pair in [("channel", "edge", "auto"), ("none", "block", "layer", "both")]:
        for value in pair:
            assert {cell[5] for cell in chosen if value in cell} == set(CONFIGURATIONS)
    assert len(chosen) < 40
    assert chosen == pairwise(everything)


def test_pairwise_of_a_literal_matrix() -> None:
    cells = [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
    assert pairwise(cells) == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)]
    without = [("a", "c"), ("b", "c"), ("b", "d")]  # (a, d) is not allowed, and so not wanted
    assert pairwise(without) == without


def test_a_failure_names_the_cell_and_the_worst_tensor() -> None:
    expected = reference("stress")
    gradients = dict(expected.gradients)
    name = next(iter(gradients))
    gradients[name] = gradients[name] * (1 + 1e-8)
    cell = Cell((2, 1), "edge", "one_backward", "both", "fused", "stress")
    share = CONFIGURATIONS["stress"].shares[1][0]
    outcome = Outcome(cell, errors(expected._replace(gradients=gradients), expected, share))
    assert not outcome.passes
    assert outcome.outputs == 0
    text = f"tp2-dp1 edge one_backward both fused stress: gradient of {name} is off by 1e-08, allowed 1e-10"
    assert str(outcome) == text


def test_errors_are_relative_to_each_tensor() -> None:
    """A small tensor's error is not hidden by a large one; one that vanishes has a floor; NaN fails."""

    def result(energies: list[float], loss: float) -> Result:
        gradients = {"a": torch.tensor([1e6]), "b": torch.zeros(1)}
        return Result({"energy": torch.tensor(energies)}, loss, gradients)

    expected, got = result([4.0, 2.0], 1.0), result([3.0, 2.0], 2.0)
    found = errors(got, expected, (0, 1))
    assert found == {"loss": 1.0, "energy": 0.25, "gradient of a": 0.0, "gradient of b": 0.0}
    got.gradients["b"] = torch.tensor([1e6 * PARITY_FLOOR])
    assert errors(got, expected, (0, 1))["gradient of b"] == pytest.approx(PARITY)
    got.gradients["b"] = torch.tensor([float("nan")])
    assert errors(got, expected, (0, 1))["gradient of b"] == float("inf")


def test_no_reference_is_trivial() -> None:
    """A cell compares numbers that are there: labels of every kind, rows of unequal length, no zeros."""
    batch = batch_of(range(6))
    degrees = batch["row_ptr"].diff()
    assert degrees.min() == 0
    assert degrees.max() == 12
    for name, configuration in CONFIGURATIONS.items():
        result = reference(name)
        assert ("stress" in result.outputs) == configuration.model.get("stress", False)
        assert all(x.abs().max() > 1e-3 for x in result.outputs.values())
        assert all(g.abs().max() > 0 for g in result.gradients.values())
    kinds = {configuration.loss for configuration in CONFIGURATIONS.values()}
    assert kinds == {"mae", "mse", "huber"}
