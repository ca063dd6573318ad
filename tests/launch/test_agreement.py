"""Ranks, here threads around one store, agree on their configuration or name the difference."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore, PrefixStore, Store, TCPStore

from megagnn.config import config_from_dict, flat_config
from megagnn.launch.agreement import agree, difference, fingerprint_of, join_generation, launch_identity


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


def start(store: Store, ranks: list[int], size: int, delays: dict[int, float]) -> list[str]:
    """What each of these ranks, threads around the store, finds; `TIMEOUT` where others are missing."""

    def run(rank: int) -> str:
        time.sleep(delays.get(rank, 0))
        try:
            generation = join_generation(store, rank, size, seconds=20 if len(ranks) == size else 0.3)
        except ConnectionError:
            return "TIMEOUT"
        agree(PrefixStore(generation, store), rank, size, {}, seconds=20)
        return generation

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(run, ranks))


@pytest.mark.parametrize("late", [{0: 0.4}, {1: 0.4}, {0: 0.2, 2: 0.4}, {}])
def test_each_start_has_its_own_generation(late: dict[int, float]) -> None:
    """Whoever comes first: the main rank, or others, who find the generation of their predecessors."""
    store = HashStore()
    for number in (1, 2, 3):
        assert start(store, [0, 1, 2], 3, late) == [f"generation/{number}"] * 3


@pytest.mark.parametrize("there", [[0], [0, 1], [1], [1, 2]])
def test_after_a_start_that_some_did_not_live_to_see(there: list[int]) -> None:
    store = HashStore()
    assert set(start(store, there, 3, {})) == {"TIMEOUT"}
    found = start(store, [0, 1, 2], 3, {0: 0.3})
    assert len(set(found)) == 1
    assert found[0] == f"generation/{2 if 0 in there else 1}"


def test_keys_that_did_not_change_would_fail() -> None:
    """The mistake this guards against: around one set of keys the second start sees two of each rank."""
    store = HashStore()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: agree(store, rank, 2, {}, seconds=20), range(2)))
    with pytest.raises(ValueError, match="two processes were started as rank 1"):
        agree(store, 1, 2, {}, seconds=20)


def test_ranks_missing_from_a_generation_are_named() -> None:
    store = HashStore()
    with pytest.raises(ConnectionError, match=r"2 of the ranks did not start within 0\.1 s: \[1, 2\]"):
        join_generation(store, 0, 3, seconds=0.1)
    with pytest.raises(ConnectionError, match=r"1 of the ranks did not start within 0\.1 s: \[0\]"):
        join_generation(HashStore(), 1, 3, seconds=0.1)


def test_the_identity_of_a_launch() -> None:
    first, second = (TCPStore("127.0.0.1", 0, is_master=True) for _ in range(2))
    names = []
    for store in (first, first, second):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        names.append(launch_identity({**environment, "TORCHELASTIC_USE_AGENT_STORE": "True"}))
        assert launch_identity(environment) == "", "a store that a rank holds ends with it"
    assert names[0] == names[1] != names[2]
    assert names[0]
