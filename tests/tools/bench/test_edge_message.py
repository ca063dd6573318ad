"""The whole-step benchmark's report: ratios within rounds, shares of the ceilings, the worst case kept."""

from __future__ import annotations

from argparse import Namespace

import pytest

from tools.bench import edge_message as bench
from tools.bench import harness


def record(impl: str, seconds: tuple[float, ...], edges: int = 10, **values: object) -> bench.StepRecord:
    settings: dict = {"op": "direct step", "shape": {"E": edges, "F": 64}, "dtype": "float32", **values}
    return bench.StepRecord(impl=impl, seconds=sorted(seconds)[1], round_seconds=seconds, **settings)


def test_speed_up_and_share_are_taken_within_rounds() -> None:
    """Every round twice as slow as the one before, for all: the ratios of a round stay."""
    ours, peer = record("megagnn save", (1.0, 2.0, 4.0)), record("usual index_add", (3.0, 6.0, 12.0))
    assert bench.speed_up(ours, peer) == 3
    assert bench.share(100.0, [0.008, 0.016, 0.032], ours) == pytest.approx(0.8)


def test_timed_fills_in_the_arithmetic_of_each() -> None:
    works = {"megagnn save": lambda: sum(range(1000)), "usual index_add": lambda: sum(range(2000))}
    case = harness.Case("direct step", {"E": 256, "F": 64}, "float32", works)
    args = Namespace(rounds=5, seconds=0.0)
    ours, peer, *ceilings = bench.timed(case, 64, {"megagnn save": 1e6, "usual index_add": 2e6}, args)
    assert [c.note for c in ceilings] == ["ceiling", "ceiling"]
    assert len(ours.round_seconds) == len(ceilings[0].round_seconds) == ours.rounds
    assert ours.speed_up == {"usual index_add": bench.speed_up(ours, peer)}
    assert peer.speed_up == {"usual index_add": 1.0}
    for mine, flops in ((ours, 1e6), (peer, 2e6)):
        assert mine.gflop_per_s == pytest.approx(flops / (mine.seconds or 0.0) / 1e9)
        large = [t / (2.0 * 256 * 64 * 64) for t in ceilings[0].round_seconds]
        assert mine.share_of_product == pytest.approx(bench.share(flops, large, mine))
        assert (mine.share_of_ceiling or 1) <= (mine.share_of_product or 0)


@pytest.mark.skipif(not bench.extension.has_cpu, reason="the evaluations are timed on the CPU kernels")
def test_the_floor_adds_the_evaluations_to_the_products() -> None:
    """With as good as no products the floor is the evaluations' time, and it grows with their number."""
    case = harness.Case("direct step", {"E": 256, "F": 64}, "float32", {"megagnn save": time_of_sum})
    args, flops = Namespace(rounds=3, seconds=0.0), {"megagnn save": 1.0}
    ours, *ceilings = bench.timed(case, 64, flops, args, bench.Floor(1e6))
    per_element = [
        sum(both) / bench.SILU_ELEMENTS for both in zip(*(c.round_seconds for c in ceilings[2:]), strict=True)
    ]
    assert ours.share_of_floor == pytest.approx(bench.share(1e6, per_element, ours), rel=1e-3)
    assert bench.timed(case, 64, flops, args)[0].share_of_floor is None


@pytest.mark.skipif(not bench.extension.has_cpu, reason="the evaluations are timed on the CPU kernels")
def test_the_floor_adds_what_is_kept() -> None:
    """Of the implementation that keeps it, and of no other."""
    works = {"megagnn save": time_of_sum, "megagnn recompute": time_of_sum}
    case = harness.Case("direct step", {"E": 256, "F": 64}, "float32", works)
    floor, flops = bench.Floor(0.0, {"megagnn save": 1e6}), dict.fromkeys(works, 0.0)
    args = Namespace(rounds=3, seconds=0.0)
    save, recompute, *ceilings = bench.timed(case, 64, flops, args, floor)
    streams = [c for c in ceilings if c.impl in ("write kept", "read kept")]
    moved = 1e6 // bench.KEPT_BLOCK * bench.KEPT_BLOCK
    per_byte = [sum(both) / moved for both in zip(*(c.round_seconds for c in streams), strict=True)]
    assert save.share_of_floor == pytest.approx(bench.share(1e6, per_byte, save))
    assert recompute.share_of_floor == 0


def test_the_floor_of_a_step() -> None:
    """c and g of three layers, in float32; conservative steps have none."""
    floor = bench.workload_floor("direct", 64, 1000)
    assert floor == bench.Floor(3 * 3 * 64 * 1000, {"megagnn save": 3 * 2 * 64 * 1000 * 4})
    assert bench.workload_floor("conservative", 64, 1000) is None


def time_of_sum() -> int:
    """Some work."""
    return sum(range(1000))


def test_summary_keeps_the_worst() -> None:
    memory = [{"peak_bytes": 10.0, "share_of_floor": 0.9}, {"peak_bytes": 30.0, "share_of_floor": 0.8}]
    ours = [
        record("megagnn save", (1.0, 1.0, 1.0), edges, speed_up={"usual index_add": up}, **kept)
        for edges, up, kept in zip((10, 20), (2.5, 1.5), memory, strict=True)
    ]
    peers = [record("usual index_add", (2.0, 2.0, 2.0), edges, peak_bytes=100.0) for edges in (10, 20)]
    (line,) = [line for line in bench.summary([*ours, *peers]).splitlines() if "megagnn" in line]
    assert line == "| direct step | 64 | megagnn save | 1.50 | - | - | - | 80% | 0.30 |"
    assert bench.memory_share(ours[1], [*ours, *peers]) == pytest.approx(0.3)
    assert bench.summary(peers) == ""
