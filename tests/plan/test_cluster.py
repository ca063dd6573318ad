import re
from pathlib import Path

import pytest

from megagnn.plan.cluster import (
    FOLDER,
    cluster_of,
    load_cluster,
    tomllib,  # type: ignore[attr-defined]
)

NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))


def values(name: str = "8xh100") -> dict:  # type: ignore[type-arg]
    return dict(tomllib.loads((FOLDER / f"{name}.toml").read_text()))


def test_the_usual_machines_are_there() -> None:
    assert {"8xa100", "8xh100", "8xh200", "perlmutter", "frontier", "laptop", "2core"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_describes_what_can_be(name: str) -> None:
    cluster = load_cluster(name)
    assert cluster.node.link.gbps >= cluster.network.gbps
    assert cluster.device.float64 <= cluster.device.float32
    assert 0 < cluster.memory_limit < 1e9 * cluster.device.memory_gb
    assert cluster == load_cluster(FOLDER / f"{name}.toml")


@pytest.mark.parametrize("name", ["8xa100", "8xh100", "8xh200", "perlmutter", "frontier"])
def test_each_figure_has_its_source_or_says_that_it_is_assumed(name: str) -> None:
    text = (FOLDER / f"{name}.toml").read_text().split("[efficiency]")[0]
    figures = [line for line in text.splitlines() if re.match(r"\w+ = [\d.]", line)]
    figures = [line for line in figures if not line.startswith(("num_nodes", "devices"))]
    assert len(figures) >= 14
    assert not [line for line in figures if "#" not in line]


def test_a_group_within_a_node_has_its_links() -> None:
    cluster = load_cluster("8xh100")
    assert cluster.link(8, 1, 64).gbps == cluster.link(2, 4, 64).gbps == pytest.approx(0.7 * 450)
    assert cluster.link(2, 8, 64).gbps == cluster.link(16, 1, 64).gbps == pytest.approx(0.7 * 50)
    assert cluster.link(8, 1, 64).seconds(315e9, 10) == pytest.approx(1 + 50e-6)


def test_a_group_that_lies_on_two_nodes_has_the_network() -> None:
    """Of three ranks each on nodes of eight, the third group is ranks 6, 7 and 8."""
    cluster = load_cluster("8xh100")
    assert not cluster.is_within_node(3, 1, 24)
    assert cluster.is_within_node(3, 1, 6)
    assert not cluster.is_within_node(3, 2, 24)


def test_power_is_that_of_devices_nodes_and_hall() -> None:
    cluster = load_cluster("8xh100")
    assert cluster.watts(8) == pytest.approx(1.1 * 10_200)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_nodes": 0}, "'num_nodes': input should be greater than 0, got 0"),
        ({"nodes": 3}, "unknown configuration key 'nodes'; nearest valid key: 'node'"),
        ({"network": {"gbps": -1, "latency_us": 1}}, "'network.gbps': .*greater than 0, got -1"),
        ({"network": {"latency_us": 1}}, "'network.gbps': .*required"),
    ],
)
def test_values_that_cannot_be_are_named(change: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        cluster_of({**values(), **change})


def test_an_unknown_name_gets_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"8xh10 is no file and none of .*did you mean '8xh100'\?"):
        load_cluster("8xh10")
    (tmp_path / "a.toml").write_text("name = ")
    with pytest.raises(ValueError, match=r"a\.toml is not valid TOML"):
        load_cluster(tmp_path / "a.toml")
