"""A rank's knowledge of others: who they are, whether their processes run, and when they were last heard of.

Every `interval` a rank counts its heartbeat up and looks at that of the next rank: a constant number of
messages per rank. It also looks at the process of another rank of its machine, which shows at once that this
one was killed, and vouches for it as long as it runs: one whose threads are held up by a long computation
(Python's global lock) is not silent. The first accusation is the verdict, under one key that all read.
"""

import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist


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
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Peer":
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


@dataclass(frozen=True)
class WatchTimes:
    """Seconds. A killed rank is told within an interval, one that hangs after `stale`."""

    interval: float = 2.0
    """Between two heartbeats."""
    stale: float = 25.0
    """After so long without a heartbeat a rank is given up."""
    grace: float = 3.0
    """For a rank to end by itself, once it knows that another is lost."""
    held: float = 600.0
    """For so long a rank that runs but holds Python's lock is vouched for."""

    @property
    def tick(self) -> float:
        """Between two looks at the verdict."""
        return self.interval / 4


@dataclass(frozen=True)
class Verdict:
    """Why the run ends."""

    rank: int
    text: str
    """A sentence that begins with the rank."""
    speaks: bool = False
    """Whether the accused rank itself said so, and can still read."""


class Silence:
    """Seconds that a count has not changed, as this process saw them: while itself stood still, none pass."""

    def __init__(self, longest_step: float) -> None:
        self._longest, self._since, self.seconds = longest_step, time.monotonic(), 0.0
        self._value: int | None = None

    def look(self, value: int) -> float:
        """The seconds, after another look."""
        now = time.monotonic()
        step = min(now - self._since, self._longest)
        self.seconds = self.seconds + step if value == self._value else 0.0
        self._value, self._since = value, now
        return self.seconds


class Roll:
    """Who is who: each rank writes itself down before the ranks agree, and reads three others after."""

    def __init__(self, store: dist.Store, me: Peer, world_size: int) -> None:
        self.store, self.me, self.world_size = store, me, world_size
        store.set(f"peer/{me.rank}", me.to_json())
        if me.machine:
            self._place = store.add(f"machine/{me.machine}", 1)
            store.set(f"machine/{me.machine}/{self._place}", str(me.rank))

    def read(self, name_of: Callable[[int], str]) -> None:
        """Sets `main`, `next` (of the world), `local` (the next of this machine, or None), and the names."""
        self._name_of = name_of
        self.me = dataclasses.replace(self.me, name=name_of(self.me.rank))
        self.main = self._peer(0)
        self.next = self._peer((self.me.rank + 1) % self.world_size)
        self.local: Peer | None = None
        if self.me.machine:
            place = self._place % self.store.add(f"machine/{self.me.machine}", 0) + 1
            self.local = self._peer(int(self.store.get(f"machine/{self.me.machine}/{place}")))
            self.local = None if self.local == self.me else self.local

    def _peer(self, rank: int) -> Peer:
        peer = Peer.from_json(self.store.get(f"peer/{rank}"))
        return dataclasses.replace(peer, name=self._name_of(rank))


class Heartbeat(threading.Thread):
    """The thread that speaks with the store; it may be held up there, so another one watches it."""

    def __init__(self, store: dist.Store, roll: Roll, where: str, times: WatchTimes) -> None:
        super().__init__(name="megagnn-heartbeat", daemon=True)
        self.store, self.roll, self.where, self.times = store, roll, where, times
        self.exchanges = 0
        """Answers of the store so far."""
        self.verdict: Verdict | None = None
        self.decided = threading.Event()
        self._wake, self._end, self._clean = threading.Event(), False, False
        self._accusation: Verdict | None = None
        self._silence, self._local_silence = Silence(2 * times.interval), Silence(2 * times.interval)
        self._due = 0.0

    def hurry(self) -> None:
        self._wake.set()

    def accuse(self, verdict: Verdict, seconds: float) -> None:
        """Make this the verdict, unless there is one; waits until it is told, but not for longer."""
        self._accusation = verdict
        self._wake.set()
        self.decided.wait(seconds)

    def finish(self, clean: bool, seconds: float) -> None:
        """Say goodbye, after a clean end, and stop; the main rank leaves last, so that all can read."""
        self._clean, self._end = clean, True
        self._wake.set()
        self.join(seconds)

    def decide(self, verdict: Verdict) -> None:
        """Make a verdict the one that this rank acts on; the first stays."""
        self.verdict = self.verdict or verdict
        self.decided.set()

    def run(self) -> None:
        try:
            while not self._end:
                self._exchange()
                self._wake.wait(self.times.tick)
                self._wake.clear()
            self._exchange()
            self._leave()
        except RuntimeError:
            if not self._end:
                self.decide(self._store_lost())

    def _exchange(self) -> None:
        if self.verdict is None:
            self._look_at_others()
            if self._accusation is not None:
                text = json.dumps(vars(self._accusation))
                self.store.compare_set("verdict", "", text)
            if self.store.check(["verdict"]):
                verdict = Verdict(**json.loads(self.store.get("verdict")))
                self.store.add("seen", 1)
                self.decide(verdict)
        elif time.monotonic() >= self._due:
            self._beat()
        self.exchanges += 1

    def _beat(self) -> None:
        self._due = time.monotonic() + self.times.interval
        self.store.add(f"beat/{self.roll.me.rank}", 1)

    def _look_at_others(self) -> None:
        local, state = self.roll.local, "unknown"
        if local is not None:
            state = process_state(local, self.roll.me.machine)
            if state == "gone":
                self._suspect(local, "died: its process is gone (killed, or out of memory?)")
        if time.monotonic() < self._due:
            return
        self._beat()
        if local is not None and state == "running":
            held = self._local_silence.look(self.store.add(f"beat/{local.rank}", 0))
            if 0 < held < self.times.held:
                self.store.add(f"vouch/{local.rank}", 1)
        signs = [self.store.add(f"{kind}/{self.roll.next.rank}", 0) for kind in ("beat", "vouch")]
        if self._silence.look(sum(signs)) > self.times.stale:
            stopped = process_state(self.roll.next, self.roll.me.machine) == "stopped"
            self._suspect(self.roll.next, silence_text(self.times.stale, stopped))

    def _suspect(self, peer: Peer, text: str) -> None:
        if self._accusation is None and not self.store.check([f"bye/{peer.rank}"]):
            self._accusation = Verdict(peer.rank, f"{peer} {text}")

    def _store_lost(self) -> Verdict:
        """The store's machine takes its connections with it."""
        main = self.roll.main
        if process_state(main, self.roll.me.machine) == "gone":
            return Verdict(0, f"{main} died: its process is gone (killed, or out of memory?)")
        return Verdict(
            0, f"{main} or its launcher is gone: the store at {self.where} has closed the connection"
        )

    def _leave(self) -> None:
        if self._clean:
            self.store.set(f"bye/{self.roll.me.rank}", "")
            self.store.add("goodbyes", 1)
        if self.roll.me.rank != 0:
            return
        key, num, seconds = "goodbyes", self.roll.world_size, self.times.stale
        if not self._clean:
            speaks = self.verdict is not None and self.verdict.speaks
            key, num, seconds = "seen", self.roll.world_size - (0 if speaks else 1), self.times.grace
        until = time.monotonic() + seconds
        while self.store.add(key, 0) < num and time.monotonic() < until:
            time.sleep(0.02)


def silence_text(seconds: float, stopped: bool = False) -> str:
    """The rest of the sentence about a rank that was given up."""
    why = "it is stopped, by SIGSTOP or a debugger" if stopped else "it hangs, is stopped or cut off"
    return f"was not heard of for {seconds:g} s: {why}"
