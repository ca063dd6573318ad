"""Before the first collective: the ranks find each other's store and agree that they are of one run.

[Note: generations] torchrun starts ranks again after one of them failed, around a store that remembers the
earlier ones. All are started together, and all ended before any is started again. What says which start this
is must be the same on all of them, and TORCHELASTIC_RESTART_COUNT is not: an agent counts the failures of its
own machine alone. So the main rank counts. It opens a generation in the store and closes it when every seat
is taken. Another rank takes its seat in the newest generation; a seat that is taken, or a newer generation,
tells it that this one was its predecessor's.
"""

import json
import os
import reprlib
import socket
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import megagnn
from megagnn.config import RunConfig
from megagnn.launch.rendezvous import Rendezvous
from megagnn.overrides import Change, change_of

JOIN_SECONDS = 300.0
_READ_SECONDS = 10.0  # that the store outlives the outcome, so that every rank reads it
_NUM_SHOWN = 3
_AGREED = "agreed"


def open_store(meeting: Rendezvous, seconds: float = JOIN_SECONDS, first: bool = True) -> dist.Store:
    """A connection to the ranks' store, which the main rank or torchrun holds.

    Args:
        first: not a second connection of the same process.

    Raises:
        ValueError: the port is taken.
        ConnectionError: nobody listens there in time.
    """
    serves, where = meeting.serves and first, f"{meeting.host}:{meeting.port}"
    try:
        store = dist.TCPStore(
            meeting.host,
            meeting.port,
            is_master=serves,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            master_listen_fd=meeting.listener if serves else None,
        )
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        if serves:
            raise ValueError(
                f"rank 0 cannot listen at {where} ({line}); set MASTER_PORT to a free port, on every rank"
            ) from error
        raise ConnectionError(
            f"rank {meeting.rank} did not reach rank 0 at {where} within {seconds:g} s ({line}); see whether "
            "rank 0 started, and whether MASTER_ADDR and MASTER_PORT are right"
        ) from error
    return dist.PrefixStore(meeting.prefix, store)


def fingerprint_of(config: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """Values that must be the same on every rank: a flat configuration, versions, the number of ranks."""
    versions = {"megagnn": megagnn.__version__, "torch": torch.__version__, "number of ranks": world_size}
    shared = {key: v for key, v in config.items() if Change.LOCAL not in change_of(RunConfig, key)}
    return {**versions, **shared}


def agree(
    store: dist.Store, rank: int, world_size: int, fingerprint: dict[str, Any], seconds: float = JOIN_SECONDS
) -> None:
    """Return when all ranks are there and started alike. Each compares with rank 0 and the last to agree, or
    the first that does not, says so under one key that all read: a constant number of messages per rank.

    Raises:
        ValueError: two ranks differ, the same on every rank; or two processes have one rank.
        ConnectionError: ranks are missing; names them.
    """
    mine = json.dumps([socket.gethostname(), fingerprint])
    seats = store.add(f"seat/{rank}", 1)
    if rank == 0 and seats == 1:
        store.set("fingerprint", mine)
    deadline = time.monotonic() + seconds
    _wait_for("fingerprint", store, range(1), deadline, seconds)
    host, (_, reference) = socket.gethostname(), json.loads(store.get("fingerprint"))
    complaint = difference(rank, host, json.loads(mine)[1], reference)
    if seats > 1:
        complaint = f"two processes were started as rank {rank}, one on host {host}: give each its own"
    if complaint:
        store.compare_set("outcome", "", complaint)
    elif store.add("agreed", 1) == world_size:
        store.compare_set("outcome", "", _AGREED)
    _wait_for("outcome", store, range(world_size), deadline, seconds)
    outcome = store.get("outcome").decode()
    told = store.add("told", 1)
    until = time.monotonic() + _READ_SECONDS
    while rank == 0 and told < world_size and time.monotonic() < until:  # the others still read its store
        time.sleep(0.05)
        told = store.add("told", 0)
    if outcome == _AGREED and not complaint:
        return
    raise ValueError(complaint if outcome == _AGREED else outcome)


def _wait_for(key: str, store: dist.Store, ranks: range, deadline: float, seconds: float) -> None:
    """Raises ConnectionError, with the ranks that have not come, when a key is not there by the deadline."""
    pause = 0.02
    while not store.check([key]):
        if time.monotonic() > deadline:
            missing = [rank for rank in ranks if not store.check([f"seat/{rank}"])]
            raise ConnectionError(missing_ranks(missing, seconds))
        time.sleep(pause)
        pause = min(1.5 * pause, 0.5)


def missing_ranks(ranks: list[int], seconds: float) -> str:
    """The message about ranks that did not start."""
    return (
        f"{len(ranks)} of the ranks did not start within {seconds:g} s: {reprlib.repr(ranks)}; "
        "their own output may say why"
    )


def difference(rank: int, host: str, mine: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """The first keys in which a rank differs from rank 0, with both values; empty if there are none."""
    keys = [key for key in {**reference, **mine} if mine.get(key) != reference.get(key)]
    if not keys:
        return ""
    more = f" and {len(keys) - _NUM_SHOWN} more" if len(keys) > _NUM_SHOWN else ""
    return (
        f"rank {rank} (host {host}) was started with {_values(mine, keys)}, rank 0 with "
        f"{_values(reference, keys)}{more}: start every rank with the same configuration"
    )


def _values(values: Mapping[str, Any], keys: list[str]) -> str:
    return ", ".join(f"{key} = {_text(values.get(key, 'nothing'))}" for key in keys[:_NUM_SHOWN])


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


_PAUSE = 0.02


def join_generation(store: dist.Store, rank: int, world_size: int, seconds: float = JOIN_SECONDS) -> str:
    """Waits until all ranks of this start are there, [Note: generations]; returns the prefix of their keys.

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
