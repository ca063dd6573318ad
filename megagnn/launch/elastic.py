"""Ranks that torchrun starts again after one of them failed, around a store that remembers the earlier ones.

[Note: generations] All ranks are started together, and torchrun ends all before it starts any again. What
says which start this is must be the same on all of them, and TORCHELASTIC_RESTART_COUNT is not: an agent
counts the failures of its own machine alone. So the main rank counts. It opens a generation in the store and
closes it when every seat is taken. Another rank takes its seat in the newest generation; a seat that is
taken, or a newer generation, tells it that this one was its predecessor's.
"""

import os
import time
import uuid
from collections.abc import Mapping

import torch.distributed as dist

from megagnn.launch.agreement import JOIN_SECONDS, missing_ranks

_PAUSE = 0.02


def join_generation(store: dist.Store, rank: int, world_size: int, seconds: float = JOIN_SECONDS) -> str:
    """Waits until all ranks of this start are there; returns the prefix of their keys, the same on all.

    Raises:
        ConnectionError: ranks are missing; names them.
    """
    deadline = time.monotonic() + seconds
    if rank == 0:
        number = store.add("generation", 1)
        _wait_for_all(store, number, world_size, deadline, seconds)
        store.set(f"opened/{number}/closed", "")
        return f"generation/{number}"
    number, mine, pause = 0, False, _PAUSE
    while True:
        newest = store.add("generation", 0)
        if newest != number:
            number = newest
            mine = store.add(f"opened/{number}/seat/{rank}", 1) == 1
            if mine:
                store.add(f"opened/{number}/seats", 1)
        if number and mine and store.check([f"opened/{number}/closed"]):
            return f"generation/{number}"
        if time.monotonic() > deadline:
            raise ConnectionError(missing_ranks(_absent(store, number, world_size) if mine else [0], seconds))
        time.sleep(pause)
        pause = min(1.5 * pause, 0.5)


def _wait_for_all(store: dist.Store, number: int, world_size: int, deadline: float, seconds: float) -> None:
    while store.add(f"opened/{number}/seats", 0) < world_size - 1:
        if time.monotonic() > deadline:
            raise ConnectionError(missing_ranks(_absent(store, number, world_size), seconds))
        time.sleep(_PAUSE)


def _absent(store: dist.Store, number: int, world_size: int) -> list[int]:
    return [rank for rank in range(1, world_size) if not store.check([f"opened/{number}/seat/{rank}"])]


def launch_identity(environment: Mapping[str, str] = os.environ) -> str:
    """The same for all processes of one torchrun, those it started again included; empty where torchrun does
    not hold the store.

    Two commands may share their run's name and address, so it is a number that the store keeps.
    """
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return ""
    store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False)
    return str(store.compare_set("megagnn/launch", "", uuid.uuid4().hex).decode())
