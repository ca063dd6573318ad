"""The benchmark of the Cartesian edge operation: its cases check themselves, and would see a wrong result."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megagnn.ops import extension
from tools.bench import cartesian_edge, harness

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
def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cartesian_edge.planes_of
    monkeypatch.setattr(cartesian_edge, "planes_of", lambda x, dtype: right(x, dtype) * 1.01)
    with pytest.raises(ValueError, match=r"megagnn must be right to 0\.001, got an error of 0\.0"):
        harness.compare(cartesian_edge.case("forward", "painn", 90, 5), Namespace(rounds=1, seconds=0.0))
