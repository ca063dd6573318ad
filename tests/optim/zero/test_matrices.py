"""What tensor-parallel ranks send for the matrices that they divide, and when."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from megagnn.optim.rule import Rule
from megagnn.optim.zero.offload import MemoryStorage
from megagnn.parallel.context import ParallelContext
from tests.distributed.sharded import Case, build, optimizer_of
from tests.distributed.spawn import spawn


class Found(NamedTuple):
    """Of one rank's step."""

    counted: int
    """Bytes, by the context's traffic."""
    sent: int
    """Bytes that torch.distributed was given for other ranks."""
    events: list[str]
    owned: list[tuple[int, int]]
    """(tensor-parallel rank that updates it, elements of the whole) of each divided matrix."""


def step(context: ParallelContext) -> Found:
    """One with random gradients, unit by unit."""
    MemoryStorage.window = 1
    case = Case(1, 2, 1, rule="muon")
    optimizer = optimizer_of(build(case, context), case, context)
    events, sizes, send = [], [], dist.all_to_all_single

    class Telling:
        def __init__(self, work: Any, number: int) -> None:
            self.work, self.number = work, number

        def wait(self) -> None:
            events.append(f"awaited {self.number}")
            self.work.wait()

    def sending(out: torch.Tensor, tensor: torch.Tensor, into: Any, of: list[int], **rest: Any) -> Telling:
        parts = tensor.split(of)
        sizes.append(sum(part.nbytes for rank, part in enumerate(parts) if rank != context.tp_rank))
        events.append(f"sent {len(sizes) - 1}")
        return Telling(send(out, tensor, into, of, **rest), len(sizes) - 1)

    matrices = optimizer.rule.matrices
    assert matrices is not None

    def directions(*arguments: Any) -> Any:
        events.append("updated")
        return matrices.directions(*arguments)

    optimizer.rule = Rule(optimizer.rule.elements, replace(matrices, directions=directions))
    for unit in optimizer.units:
        unit.grad_shard.normal_()
    dist.all_to_all_single = sending
    with context.traffic.measured() as traffic:
        optimizer.scaled_step(1.0)
    divided = [m for unit in optimizer.units for m in unit.matrices if m.owner is not None]
    owned = [(m.owner or 0, m.layout.full_numel) for m in divided]
    return Found(int(traffic.bytes["tp", "all_to_all"]), sum(sizes), events, owned)


@pytest.fixture(scope="module")
def ranks() -> list[Found]:
    return spawn(2, step, tp=2)


def test_bytes_are_counted_and_those_of_the_formula(ranks: list[Found]) -> None:
    """(t-1)/t of the elements each way, and each rank its share."""
    for rank, found in enumerate(ranks):
        assert found.counted == found.sent
        elements = sum(n * (1 / 2 if owner == rank else 1 - 1 / 2) for owner, n in found.owned)
        assert found.sent == 8 * elements
    whole = sum(n for _, n in ranks[0].owned)
    assert sum(found.sent for found in ranks) == 2 * 8 * whole / 2 > 0
    assert {owner for owner, _ in ranks[0].owned} == {0, 1}


def test_both_ways_travel_while_others_are_updated(ranks: list[Found]) -> None:
    """Gradients leave before the unit before theirs is updated, directions are awaited after the next."""
    num_units = sum(event.startswith("sent") for event in ranks[0].events) // 2
    assert num_units > 2
    gradients = [0, *range(1, 2 * num_units - 1, 2)]  # numbers of their messages, unit by unit
    directions = [*range(2, 2 * num_units - 1, 2), 2 * num_units - 1]
    for found in ranks:
        place = {event: index for index, event in enumerate(found.events)}
        for k in range(num_units - 1):
            assert place[f"sent {gradients[k + 1]}"] < place[f"awaited {gradients[k]}"]
            assert place[f"awaited {directions[k]}"] > place[f"sent {directions[k + 1]}"]
        first = slice(place[f"awaited {gradients[0]}"], place[f"sent {directions[0]}"])
        second = slice(place[f"awaited {gradients[1]}"], place[f"awaited {directions[0]}"])
        assert "updated" in found.events[first]
        assert "updated" in found.events[second]
