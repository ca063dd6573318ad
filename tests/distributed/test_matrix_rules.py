"""Rules of matrices on any layout give the parameters of one process, and stages 1 to 3 the same bits.

Muon after 20 steps. SOAP after one update from the same state: with other roundings the eigenvectors of
small or near eigenvalues turn, and Adam gives all of them steps of one size, so that runs part.

A cover of all pairs of the axes' values runs by default, everything with --full.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megagnn.optim.rules import muon
from megagnn.parallel.context import ParallelContext
from tests.distributed.matrices import Cell, cells, error, on_rank, one_process, train
from tests.distributed.spawn import spawn
from tests.tolerances import PARITY

pytestmark = pytest.mark.timeout(7200)
Results = dict[Cell, list[dict[str, Tensor]]]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Callable[[int], Results]:
    """Of a world size: what each rank found in each cell."""
    everything, done = cases(request), {}

    def of(world_size: int) -> Results:
        if world_size not in done:
            mine = [cell for cell in everything if cell.world_size == world_size]
            if world_size == 1:
                ranks = [[train(cell, ParallelContext()) for cell in mine]]
            else:
                ranks = spawn(world_size, on_rank, mine)
            done[world_size] = {cell: list(found) for cell, *found in zip(mine, *ranks, strict=True)}
        return done[world_size]

    return of


def cases(request: Any) -> list[Cell]:
    full = request.config.getoption("full")
    soap = cells(full, "soap")
    return cells(full) + (soap if full else soap[::2])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_parameters_of_one_process(results: Callable[[int], Results], world_size: int) -> None:
    for cell, ranks in results(world_size).items():
        for got in ranks:
            assert error(got, one_process(cell.configuration, cell.rule)) <= PARITY, str(cell)


@pytest.mark.parametrize("world_size", [2, 4])
def test_stages_1_to_3_give_the_same_bits(results: Callable[[int], Results], world_size: int) -> None:
    found = results(world_size)
    # Over micro-batches of a pipeline, stage 1 adds up before it sends and the others after it.
    compared = [
        c
        for c in found
        if c.rule == "muon" and c.stage > 1 and c.layout[2] == 1 and c._replace(stage=1) in found
    ]
    assert compared
    for cell in compared:
        for got, first in zip(found[cell], found[cell._replace(stage=1)], strict=True):
            assert all(torch.equal(got[name], first[name]) for name in got), str(cell)


def test_a_slice_orthogonalised_alone_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted mistake of divided matrices is off by more than a percent."""
    whole = muon.orthogonalised

    def halves(x: Tensor, scale: float = 1.0) -> Tensor:
        return torch.cat([whole(half, scale) for half in x.chunk(2, 1)], 1)

    monkeypatch.setattr(muon, "orthogonalised", halves)
    got = train(Cell((1, 1, 1), 0, "direct"), ParallelContext())
    monkeypatch.undo()
    assert error(got, one_process("direct")) > 0.01
