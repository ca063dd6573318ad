"""Parts of the watch that need no ranks: states of processes, silence, what a broken connection is."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest
from torch.distributed import DistNetworkError

from megagnn.launch import heartbeat
from megagnn.launch.heartbeat import Peer, Silence, _stat, process_state, this_peer
from megagnn.launch.watch import is_broken_connection


def test_a_peer_is_named_in_full_and_survives_the_store() -> None:
    peer = Peer(3, "node7", 4711, name="dp1-pp0-tp1")
    assert str(peer) == "rank 3 (dp1-pp0-tp1, host node7, pid 4711)"
    assert Peer.from_json(peer.to_json()) == peer


def eventually(peer: Peer, state: str) -> bool:
    deadline = time.monotonic() + 20
    while process_state(peer, peer.machine) != state and time.monotonic() < deadline:
        time.sleep(0.01)
    return process_state(peer, peer.machine) == state


def test_states_of_a_process() -> None:
    me = this_peer(0)
    assert process_state(me, me.machine) == "running"
    assert process_state(me, "another machine") == "unknown"
    assert process_state(me, "") == "unknown"
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    try:
        found = _stat(child.pid)
        assert found is not None
        peer = Peer(1, me.host, child.pid, found[1], me.machine)
        assert eventually(peer, "running")
        os.kill(child.pid, signal.SIGSTOP)
        assert eventually(peer, "stopped")
        child.kill()
        assert eventually(peer, "gone"), "a process that nobody has waited for yet"
    finally:
        child.kill()
        child.communicate()
    assert process_state(peer, me.machine) == "gone"
    reused = dataclasses.replace(me, started=me.started - 1)
    assert process_state(reused, me.machine) == "gone", "its number was given to another process"


def test_silence_counts_only_time_in_which_we_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    silence, seen = Silence(longest_step=4.0), []
    for step, value in ((0, 1), (2, 1), (2, 1), (2, 2), (2, 2), (90, 2), (2, 2)):
        now[0] += step
        seen.append(silence.look(value))
    assert seen == [0, 2, 4, 0, 2, 6, 8]


@pytest.mark.parametrize(
    ("error", "broken"),
    [
        (
            RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Read error"),
            True,
        ),
        (RuntimeError("NCCL communicator was aborted on rank 1."), True),
        (DistNetworkError("Broken pipe"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (RuntimeError("DataLoader timed out after 5 seconds"), False),
        (ValueError("Connection closed by peer"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_what_a_broken_connection_is(error: BaseException, broken: bool) -> None:
    assert is_broken_connection(error) is broken
