"""Ranks, here threads around one store, agree on their configuration or name the difference."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore

from megagnn.config import config_from_dict, flat_config
from megagnn.launch.agreement import agree, difference, fingerprint_of


def meet(
    fingerprints: list[dict[str, Any]], ranks: list[int] | None = None, seconds: float = 30.0
) -> list[str]:
    """What each rank raises, as text; empty for a rank that goes on."""
    store, size = HashStore(), len(fingerprints)

    def run(rank: int, fingerprint: dict[str, Any]) -> str:
        try:
            agree(store, rank, size, fingerprint, seconds=30)
        except (ValueError, ConnectionError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, ranks or range(size), fingerprints))


def test_equal_configurations_pass() -> None:
    assert meet([fingerprint_of({"model.width": 64}, 3)] * 3) == ["", "", ""]


def test_a_difference_is_told_by_every_rank() -> None:
    told = meet([{"model.width": 128, "a": 1}, {"model.width": 128, "a": 1}, {"model.width": 64, "a": 1}])
    assert len(set(told)) == 1
    assert told[0].startswith("ValueError: rank 2 (host ")
    assert told[0].endswith(
        ") was started with model.width = 64, rank 0 with model.width = 128: start every rank with the same "
        "configuration"
    )


def test_two_processes_of_one_rank() -> None:
    told = meet([{}, {}, {}], ranks=[0, 1, 1])
    assert all("two processes were started as rank 1" in text for text in told), told


def test_missing_ranks_are_named() -> None:
    store = HashStore()
    with pytest.raises(ConnectionError, match=r"2 of the ranks did not start within 0\.2 s: \[1, 2\]"):
        agree(store, 0, 3, {}, seconds=0.2)


def test_text_of_a_difference() -> None:
    mine: dict[str, Any] = {"b": [1], "c": None, "d": 0, "e": 5}
    reference = {"a": "x", "b": [2], "c": True, "d": 0, "e": 4}
    assert difference(1, "h", mine, reference) == (
        "rank 1 (host h) was started with a = nothing, b = [1], c = null, rank 0 with a = x, b = [2], "
        "c = true and 1 more: start every rank with the same configuration"
    )
    assert difference(1, "h", mine, dict(mine)) == ""


def test_what_may_differ_between_machines() -> None:
    values = [{"train": {"threads": 2, "device": "cpu"}}, {"train": {"threads": 3}}, {"train": {"seed": 1}}]
    first, second, third = (fingerprint_of(flat_config(config_from_dict(v)), 2) for v in values)
    assert first == second
    assert "train.seed = 1" in difference(1, "h", third, first)
    assert "number of ranks = 3" in difference(1, "h", fingerprint_of({}, 3), fingerprint_of({}, 2))
