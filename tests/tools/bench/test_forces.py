"""The benchmark of memory and one backward: its variants, its report, its memory of a saved batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.bench import forces as bench
from tools.bench.memory.step import peak_memory_on
from tools.bench.work import edge as workload
from tools.bench.work import forces as forces_workload


def record(name: str, peak: float, time: float, over_floor: float) -> bench.ForcesRecord:
    made = bench.ForcesRecord("conservative step", {"E": 10, "F": 64}, "float32", name, seconds=time)
    made.time_over_baseline, made.over_floor, made.peak_bytes = time, over_floor, {3: peak}
    return made


def test_variants_and_baseline() -> None:
    """Every memory with both methods, of losses that differentiate once with one."""
    assert len(forces_workload.variants("conservative")) == 2 * len(workload.MEMORY)
    assert forces_workload.variants("direct") == [workload.our_name(memory) for memory in workload.MEMORY]
    assert forces_workload.baseline("conservative") == "megagnn unfused layers create_graph"
    asked = bench.chosen("conservative", ["both"])
    assert asked == ["megagnn both", "megagnn unfused layers create_graph"]
    for name in forces_workload.variants("conservative"):
        assert workload.our_name(*workload.variant(name)) == name


def test_targets_are_judged() -> None:
    base = record("megagnn unfused layers create_graph", 30.0, 1.0, 4.0)
    both, block = record("megagnn both", 9.0, 1.7, 1.2), record("megagnn recompute", 11.0, 1.8, 1.3)
    unasked = record("megagnn save", 20.0, 0.5, 1.1)
    assert bench.targets([unasked, block, both, base]) == [
        "",
        "recompute: memory, L = 3 0.367 (missed), time 1.80 (missed), over floor 1.30 (missed)",
        "both: memory, L = 3 0.300 (met), time 1.70 (met), over floor 1.20 (met)",
    ]
    assert "| both | 1700 | 1.70 | 1.20 | - | 0.0 (0.300) |" in bench.markdown([both, base])


@pytest.mark.parametrize("loss", forces_workload.LOSSES)
def test_all_variants_take_the_same_step(loss: str) -> None:
    made, forces = forces_workload.dense(2000), forces_workload.LOSSES[loss]
    steps = {name: made.step(name, forces, 16, 2) for name in forces_workload.variants(loss)}
    assert workload.check_equal(steps) < 1e-4


def test_memory_of_a_saved_batch(tmp_path: Path) -> None:
    """Kept pre-activations need more than blocks that are made again."""
    forces_workload.dense(2000).save(tmp_path / "batch.pt")
    kept, again = (
        peak_memory_on(tmp_path / "batch.pt", f"megagnn {memory}", "conservative", 32, 3, threads=1)
        for memory in ("save", "recompute")
    )
    assert 0 < again < 0.7 * kept
