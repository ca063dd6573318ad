"""Arithmetic and time of plans: counts are exact, and times are those of the formulas in docs/planning.md."""

import dataclasses

import pytest

from megagnn.models.family import step_flops
from megagnn.plan.cluster import load_cluster
from megagnn.plan.layout import Layout
from megagnn.plan.times import forward_flops, link_bytes, rates, step_units, times, update_flops
from tests.plan.layouts import layout_of

CLUSTER = load_cluster("8xh100")


def executed(layout: Layout) -> float:
    """Of all ranks, from each that a pipeline has."""
    ranks = range(layout.pp)
    once = sum(sum(forward_flops(layout, layout.numbers_on(rank))) for rank in ranks)
    return once * step_units(layout) * layout.micro_batches * layout.dp * layout.tp


@pytest.mark.parametrize("family", ["egnn", "cartesian"])
@pytest.mark.parametrize("forces", ["direct", "conservative"])
@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 1, 2), (2, 2, 2)])
def test_all_ranks_together_compute_what_the_model_takes(
    family: str, forces: str, grid: tuple[int, int, int]
) -> None:
    dp, pp, tp = grid
    parallel = {"pipeline": pp, "tensor": tp}
    model = {"family": family, "forces": forces}
    layout = layout_of(model, dp * pp * tp, parallel=parallel, optim={"accumulate_steps": 4})
    flops = step_flops(layout.model, 4 * dp * 100, 4 * dp * 2000)
    assert times(layout, CLUSTER).flops == flops
    assert executed(layout) == pytest.approx(flops, rel=1e-12)


@pytest.mark.parametrize(("forces", "ratio"), [("direct", 4 / 3), ("conservative", 11 / 8)])
def test_what_is_computed_again_is_executed_and_not_counted(forces: str, ratio: float) -> None:
    plain, again = (layout_of({"forces": forces, "recompute_layers": r}) for r in (False, True))
    assert executed(again) / executed(plain) == pytest.approx(ratio)
    assert times(again, CLUSTER).flops == times(plain, CLUSTER).flops


def test_the_bubble_is_that_of_the_schedule() -> None:
    """1F1B idles p - 1 times forward and backward, also with more micro-batches than are simulated."""
    cluster = dataclasses.replace(
        CLUSTER,
        node=dataclasses.replace(
            CLUSTER.node, link=dataclasses.replace(CLUSTER.node.link, latency_us=0, gbps=1e9)
        ),
    )
    for batches in (8, 64):
        layout = layout_of(
            {"forces": "direct", "num_layers": 64, "update_coordinates": False},
            2,
            parallel={"pipeline": 2},
            optim={"accumulate_steps": batches},
        )
        t = times(layout, cluster)
        assert t.bubble == pytest.approx(t.compute / batches, rel=0.05)


def test_more_ranks_are_never_slower_a_batch_and_messages_cost() -> None:
    one, eight, many = (times(layout_of(ranks=n), CLUSTER) for n in (1, 8, 1024))
    assert one.data == 0 < eight.data < many.data
    assert one.compute == eight.compute == many.compute
    assert one.step == one.compute + one.update


def test_each_axis_has_its_link() -> None:
    parallel = {"tensor": 4, "pipeline": 2}
    layout = layout_of(ranks=16, parallel=parallel, optim={"accumulate_steps": 4})
    found = link_bytes(layout, CLUSTER, times(layout, CLUSTER).sent)
    assert {link: set(by_axis) for link, by_axis in found.items()} == {
        "node": {"tp", "pp"},
        "network": {"dp"},
    }
    parallel = {"tensor": 2, "pipeline": 6}  # twelve ranks in a row: one of the stages' borders is a node's
    long = layout_of({"num_layers": 6}, ranks=24, parallel=parallel, optim={"accumulate_steps": 6})
    found = link_bytes(long, CLUSTER, times(long, CLUSTER).sent)
    assert {link: set(by_axis) for link, by_axis in found.items()} == {
        "node": {"tp"},
        "network": {"dp", "pp"},
    }
    small = link_bytes(layout_of(ranks=8), CLUSTER, times(layout_of(ranks=8), CLUSTER).sent)
    assert set(small["node"]) == {"dp"}
    assert not small["network"]


def test_rates_are_of_the_step() -> None:
    layout = layout_of(ranks=8)
    t = times(layout, CLUSTER)
    r = rates(layout, CLUSTER, t)
    assert r.atoms_per_second == pytest.approx(800 / t.step)
    assert r.watt_hours == pytest.approx(CLUSTER.watts(8) * t.step / 3600)
    assert r.price == pytest.approx(8 * 6.88 * t.step / 3600)
    assert r.of_peak == pytest.approx(t.flops / t.step / (8 * 67e12))
    assert rates(layout, dataclasses.replace(CLUSTER, device_hour=None), t).price is None


def test_updates_of_matrices_have_products() -> None:
    """Muon's five iterations take 30 n^3 operations of a square matrix."""
    model, sharing = {"width": 256, "num_layers": 4, "forces": "none"}, {"rule": "muon", "warmup_steps": 0}
    layout = layout_of(model, optim=sharing, loss={"force_weight": 0})
    square = sum(s.full == (256, 256) for _, unit in layout.units(0) for s in unit)
    assert square > 20
    assert update_flops(layout, 0) == pytest.approx(square * 30 * 256**3, rel=0.01)
    shared = layout_of(model, 4, optim=sharing, loss={"force_weight": 0}, parallel={"zero_stage": 1})
    assert update_flops(shared, 0) == pytest.approx(update_flops(layout, 0) / 4)
    assert update_flops(layout_of(model, loss={"force_weight": 0}), 0) == 0


def test_offloaded_state_moves_over_its_link() -> None:
    near, far = (layout_of({"width": 1024}, optim={"offload": offload}) for offload in ("none", "host"))
    state = 12 * near.num_parameters  # two moments and the average
    slower = times(far, CLUSTER).update - times(near, CLUSTER).update
    link, memory = 1e9 * CLUSTER.node.host_gbps, CLUSTER.memory_rate
    assert slower == pytest.approx(2 * state * (1 / link - 1 / memory), rel=0.01)
