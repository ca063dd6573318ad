"""The benchmark of the atoms' products: what it counts, and that it checks before it times."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megagnn.ops import node
from tools.bench import harness
from tools.bench import node as bench_node


@pytest.mark.parametrize("op", bench_node.PRODUCTS)
@pytest.mark.parametrize("backward", [False, True])
def test_its_operations_are_those_of_the_chain(op: str, backward: bool) -> None:
    case = bench_node.case(op, 6, 8, backward)
    chain = case.implementations["chain"]
    assert chain
    with FlopCounterMode(display=False) as counter:
        chain()
    assert counter.get_total_flops() == case.num_flops


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = node.silu_linear

    def wrong(*arguments: Any) -> torch.Tensor:
        return right(*arguments) * 1.01

    monkeypatch.setattr(node, "silu_linear", wrong)
    with pytest.raises(ValueError, match=r"megagnn must be right to 0\.0001, got an error of 0\.01"):
        harness.compare(bench_node.case("silu_linear", 6, 8, False), Namespace(rounds=1, seconds=0.0))
