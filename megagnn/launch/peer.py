"""A rank as the others know it: its names, where it runs, and whether its process is there."""

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path


class PeerLostError(ConnectionError):
    """Another rank died, failed or hangs; the message names it."""


@dataclass(frozen=True)
class Peer:
    """A rank, as it appears in messages, and its process, as its machine knows it."""

    rank: int
    host: str
    pid: int
    started: int = 0
    """Start time in the kernel's ticks: a process identifier may be given away again."""
    machine: str = ""
    """Same for processes that see each other under these identifiers; empty where none is known."""
    name: str = ""
    """dp0-pp0-tp1, once the grid is agreed on."""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.name}, host {self.host}, pid {self.pid})"

    def to_json(self) -> str:
        """For the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Peer":
        """From the store."""
        return cls(**json.loads(text))


def this_peer(rank: int) -> Peer:
    """This process."""
    _, started = _stat(os.getpid()) or ("", 0)
    return Peer(rank, socket.gethostname(), os.getpid(), started, _machine())


def process_state(peer: Peer, machine: str) -> str:
    """ "running", "stopped" (SIGSTOP, a debugger), "gone", or "unknown" for a process of another machine."""
    if not machine or peer.machine != machine:
        return "unknown"
    found = _stat(peer.pid)
    if found is None or found[1] != peer.started or found[0] in "ZX":
        return "gone"
    return "stopped" if found[0] in "Tt" else "running"


def _machine() -> str:
    """Boot and process namespace; empty where the system has no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}" if _stat(os.getpid()) else ""
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, int] | None:
    """(state letter, start time) of a process; None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])
