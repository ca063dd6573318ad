"""The benchmark of optimizer steps: what it counts, that it checks before it times, and its shares."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megagnn.optim.rules import muon
from tools.bench import harness
from tools.bench import rules as bench


def test_its_operations_are_those_of_the_products() -> None:
    matrices = bench.of_muon(bench.optimizer("muon", 8))
    assert len(matrices) == 21  # seven of a layer: what the table takes
    with FlopCounterMode(display=False) as counter:
        bench.products(matrices)()
    assert counter.get_total_flops() == bench.update_flops(matrices) == 21 * 30 * 8**3


def test_a_wrong_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    bench.check(16)
    monkeypatch.setattr(muon, "NUM_ITERATIONS", 4)
    with pytest.raises(ValueError, match=r"F = 16: must move as torch's to 0\.05, got 0\.[1-9]"):
        bench.check(16)


def test_shares_are_those_of_the_times() -> None:
    """1 ms of 20 ms beside 1,000 atoms is 5 %, and about a fifth of it beside 5,000."""
    names = {"muon": 1e-3, "adamw": 1e-4, "training step, 1000 atoms": 19.1e-3, "products": 1e-3}
    names["training step, 5000 atoms"] = 95.1e-3
    shape = {"F": 64, "L": 3}
    records = [harness.Record("", shape, "", name, round_seconds=(9.0, t)) for name, t in names.items()]
    text = bench.markdown(records)
    assert "| 1,000 | 5.0% | 5.0% |" in text
    assert "| 5,000 | 1.0% | 1.0% |" in text
    assert "below 5% from 1,000 atoms on" in text


def test_a_training_step_has_so_many_edges() -> None:
    loss = bench.training_step(8, 60)()
    assert torch.isfinite(loss)
