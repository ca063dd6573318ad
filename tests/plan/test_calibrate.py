"""Rates that made the times are found again; what is measured makes a cluster to plan with."""

from pathlib import Path

import pytest
import torch

from megagnn.plan import calibrate
from megagnn.plan.calibrate import Point, Rates, fitted, to_toml
from megagnn.plan.cluster import load_cluster

CPU = torch.device("cpu")


def points(products: float, memory: float) -> list[Point]:
    sizes = ((1e9, 1e8), (16e9, 4e8))
    return [Point(a, m, a / products + m / memory) for a, m in sizes]


def test_the_rates_that_made_the_times_are_found() -> None:
    assert fitted(points(9e10, 1e10), 2e11, 5e10) == pytest.approx((9e10, 1e10))


def test_no_rate_is_above_what_is_possible() -> None:
    products, memory = fitted(points(9e10, 1e12), 2e11, 5e10)
    assert memory <= 5e10
    assert products == pytest.approx(9e10, rel=0.1)
    products, memory = fitted(points(4e11, 1e10), 2e11, 5e10)
    assert products == 2e11
    with pytest.raises(ValueError, match="two steps tell products from memory, got 1"):
        fitted(points(1e9, 1e9)[:1], 1e10, 1e10)


def test_measured_rates_are_rates(tmp_path: Path) -> None:
    assert 1e8 < calibrate.product_rate(torch.float32, CPU, 128) < 1e15
    assert 1e8 < calibrate.copy_rate(CPU, 2**20) < 1e13
    assert 1e6 < calibrate.disk_rate(tmp_path, 2**20) < 1e12
    assert not list(tmp_path.iterdir())


def test_steps_have_the_operations_of_their_widths() -> None:
    narrow, wide = (calibrate.step_point(width, CPU) for width in (16, 32))
    assert 2 < wide.operations / narrow.operations < 4
    assert 1 < wide.moved / narrow.moved < 2
    assert 0 < narrow.seconds < 10


def test_a_calibrated_machine_can_be_planned_with(tmp_path: Path) -> None:
    rates = Rates({"float64": 5e10, "float32": 1e11, "bfloat16": 2e10}, 2e10, 6e10, 1.5e10, 1e9, 2e9, 5e-5)
    path = tmp_path / "here.toml"
    path.write_text(to_toml(rates, 'a "core" here', 2, 12.0, "cpu", "a core", 24.0))
    cluster = load_cluster(path)
    assert cluster.rate("float32") == pytest.approx(6e10)
    assert cluster.memory_rate == pytest.approx(1.5e10)
    assert cluster.link(2, 1, 2).gbps == pytest.approx(2)
    assert cluster.num_devices == 2
    assert cluster.name == 'a "core" here'
    assert (cluster.device.memory_gb, cluster.node.host_memory_gb) == (12.0, 24.0)


def test_a_file_that_is_there_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "here.toml"
    path.write_text("# mine")
    with pytest.raises(ValueError, match=r"here\.toml is there already; remove it, or give another name"):
        calibrate.calibrate(path)
    assert path.read_text() == "# mine"
