"""Ranks that are started again find each other, not what their predecessors left in the store."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore, PrefixStore, Store, TCPStore

from megagnn.launch.agreement import agree
from megagnn.launch.elastic import join_generation, launch_identity


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


def test_missing_ranks_are_named() -> None:
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
