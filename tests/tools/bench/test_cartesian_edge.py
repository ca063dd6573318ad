"""The benchmark of the Cartesian edge operation: its cases check themselves, and would see a wrong result."""

from __future__ import annotations

from argparse import Namespace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from megagnn.ops import extension
from tools.bench import cartesian_edge, harness
from tools.bench.memory.step import peak_of_events

compiled = pytest.mark.skipif(extension.module is None, reason="the extension is not built")


@pytest.mark.parametrize("splines", [0, 7])
@pytest.mark.parametrize("op", cartesian_edge.OPS)
def test_the_cases_are_right(op: str, splines: int) -> None:
    case = cartesian_edge.case(op, "lean", 90, 5, splines)
    ours, peer = case.implementations.values()
    assert ours is not None
    assert peer is not None
    assert harness.check(case)["megagnn"] < 1e-5
    assert case.num_bytes == 9 * 5 * 4 * 90 * (2 if "pair" in op else 1) * (3 if "backward" in op else 1)


@compiled
def test_others_take_the_edges_that_fit_and_only_they_keep_something_for_each_edge() -> None:
    edges = 3 * cartesian_edge.CHECKED
    case = cartesian_edge.case("backward", "painn", edges, 8, memory=1e6)
    assert case.checked is not None
    assert case.checked.shape["E"] == cartesian_edge.CHECKED
    assert set(case.portions) == {"pytorch"}
    work = case.implementations["pytorch"]
    assert work is not None
    assert 0.2 < case.portions["pytorch"] < 0.9
    assert 0.5e6 < peak_of_events(work) < 1.2e6
    assert case.kept_bytes["megagnn"] == 0
    assert case.kept_bytes["pytorch"] > edges * 4 * 8 * 4  # products of each edge and channel, float32
    ours, peer, _ = harness.compare(case, Namespace(rounds=1, seconds=0.0))
    assert ours.portion == 1 > peer.portion


PEERS = [(paths, name) for paths, kinds in cartesian_edge.peers.PEERS.items() for name in kinds]


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize(("paths", "name"), PEERS)
def test_peers_do_the_same(paths: str, name: str, op: str) -> None:
    case = cartesian_edge.case(op, paths, 90, 5, against=[name])
    assert list(case.implementations) == ["megagnn", name]
    if find_spec(name):
        assert harness.check(case)[name] < 1e-5
    else:
        assert case.implementations[name] is None


class Plain(cartesian_edge.peers.Painn):
    """The paths of PaiNN by gathers and sums, for a package that is always there."""

    factor = 1.0

    def __init__(self, problem: cartesian_edge.peers.Problem) -> None:
        self.problem = problem
        self.leaves = [problem.weight, *problem.features.values()]
        self.cotangents = list(problem.cotangents.values())

    def forward(self) -> list[Tensor]:
        p = self.problem
        weight, h, v = self.leaves
        w1, w4, w7 = (p.basis @ w.T for w in weight * self.factor)
        s, unit = h[p.sender], p.unit.unsqueeze(-1)
        m_v = (w4 * s).unsqueeze(1) * unit + w7.unsqueeze(1) * v[p.sender]
        return [torch.zeros_like(x).index_add(0, p.receiver, m) for x, m in ((h, w1 * s), (v, m_v))]

    def comparable(self, result: list[Tensor], _: list[Tensor]) -> list[Tensor]:
        return result


@pytest.mark.parametrize("splines", [0, 7])
@pytest.mark.parametrize("op", ["forward", "backward"])
def test_a_peer_is_compared(op: str, splines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cartesian_edge.peers.PEERS["painn"], "json", Plain)
    case = cartesian_edge.case(op, "painn", 90, 5, splines, against=["json"])
    assert harness.check(case)["json"] < 1e-5
    monkeypatch.setattr(Plain, "factor", 1.01)
    with pytest.raises(ValueError, match="json must be right"):
        harness.check(case)


@compiled
def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cartesian_edge.planes_of
    monkeypatch.setattr(cartesian_edge, "planes_of", lambda x, dtype: right(x, dtype) * 1.01)
    with pytest.raises(ValueError, match=r"megagnn must be right to 0\.001, got an error of 0\.0"):
        harness.compare(cartesian_edge.case("forward", "painn", 90, 5), Namespace(rounds=1, seconds=0.0))
