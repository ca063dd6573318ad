"""A rank that dies, fails or stops: the others say which one and end, long before a collective gives up."""

import re
import socket
import subprocess
import sys

import pytest

from megagnn.launch.heartbeat import WatchTimes
from tests.distributed.ranks import (
    TIMEOUT_S,
    Ended,
    clean_environment,
    free_port,
    run_ranks,
    torchrun_like,
)

BOUND_S = 60.0
SHORT = WatchTimes(interval=0.5, stale=6.0, grace=1.0)
DEAD = "died: its process is gone (killed, or out of memory?); this rank stops, too"


def program(rank: int, fault: str, times: WatchTimes) -> list[str]:
    numbers = (str(seconds) for seconds in (times.interval, times.stale, times.grace))
    return ["tests.distributed.faulty", str(rank), fault, *numbers]


def run(world_size: int, rank: int, fault: str, times: WatchTimes = SHORT) -> list[Ended]:
    port, stays = free_port(), rank if fault == "SIGSTOP" else -1
    environments = [torchrun_like(rank, world_size, port) for rank in range(world_size)]
    return run_ranks([program(rank, fault, times)] * world_size, environments, stays)


def check_told(ended: list[Ended], culprit: int, what: str) -> float:
    """Every other rank names the culprit, in its last line, and has failed; returns how long that took."""
    grief = re.search(r"grief (\S+)", ended[culprit].out)
    assert grief, ended[culprit].err
    name = f"rank {culprit} (dp{culprit}-pp0-tp0, host {socket.gethostname()}, pid {ended[culprit].pid}) "
    others = [(rank, end) for rank, end in enumerate(ended) if rank != culprit]
    for rank, end in others:
        last = end.err.strip().splitlines()[-1]
        assert f"[rank {rank}]: error: " in last or f"error [rank {rank}]: PeerLostError: " in last, end.err
        assert name + what in last
        assert end.code in (1, 2)
        assert "done" not in end.out
    seconds = max(end.at for _, end in others) - float(grief[1])
    print(f"told after {seconds:.1f} s")
    assert seconds < BOUND_S
    return seconds


def test_killed_while_the_others_sum() -> None:
    """gloo tells them of a closed connection; what they raise instead names the rank."""
    ended = run(3, 1, "SIGKILL")
    check_told(ended, 1, DEAD)
    assert all("PeerLostError" in end.err for end in (ended[0], ended[2]))


def test_killed_while_the_others_compute() -> None:
    """The main rank, which holds the store, while the other is in no collective that could fail."""
    ended = run(2, 0, "SIGKILL-compute")
    check_told(ended, 0, DEAD)
    assert "PeerLostError" not in ended[1].err, "the guard's word"


def test_an_exception_is_told_with_its_text() -> None:
    """By the main rank, too, which holds the store: it stays until the others have read."""
    ended = run(3, 0, "raise")
    check_told(ended, 0, "failed: ValueError: bad label in structure 7; this rank stops, too")
    assert "error [rank 0]: ValueError: bad label in structure 7" in ended[0].err, "its own error is its own"


def test_ended_by_a_signal() -> None:
    ended = run(2, 1, "SIGTERM")
    check_told(ended, 1, "was ended by a signal (SIGTERM)")
    assert ended[1].code == 143


def test_stopped_with_the_default_times() -> None:
    times = WatchTimes()
    seconds = check_told(
        run(2, 1, "SIGSTOP", times), 1, "was not heard of for 25 s: it is stopped, by SIGSTOP or a debugger"
    )
    assert seconds > times.stale, "a rank may be silent for so long"


def test_stopped_with_the_store() -> None:
    check_told(
        run(2, 0, "SIGSTOP"), 0, "was not heard of for 6 s: it hangs, is stopped or cut off (the store"
    )


@pytest.mark.parametrize("fault", ["lock", "lock-all"])
def test_a_long_computation_is_no_fault(fault: str) -> None:
    """No thread of the rank runs for longer than a silent rank is given; or of both ranks at once."""
    ended = run(2, 1, fault, WatchTimes(interval=0.3, stale=3.0, grace=0.5))
    assert [end.code for end in ended] == [0, 0], [end.err for end in ended]
    assert all("done" in end.out for end in ended)


def test_under_torchrun_the_rank_is_named() -> None:
    """Its agent ends the others, which are in no collective, by SIGTERM."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = subprocess.run(
        [*launcher, *program(1, "SIGKILL-compute", SHORT)],
        capture_output=True,
        text=True,
        env=clean_environment(),
        check=False,
        timeout=TIMEOUT_S,
    )
    assert done.returncode != 0
    pid = re.search(r"rank 1 is dp1-pp0-tp0, pid (\d+)", done.stdout)
    assert pid
    name = f"rank 1 (dp1-pp0-tp0, host {socket.gethostname()}, pid {pid[1]}) "
    assert f"megagnn [rank 0]: error: {name}{DEAD}" in done.stderr
