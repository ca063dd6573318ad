"""A lost rank ends all others, with a message that names it, instead of a wait for the collective's timeout.

[Note: faults] The main thread may be inside a collective, where no Python reaches it, so two threads watch:
`Heartbeat` speaks with the store, and the guard here sees whether the store answers, whether the launcher
sends SIGTERM, and whether there is a verdict. Then the main thread has `grace` to end by itself, which it
does if its collective fails; else the guard prints the verdict and ends the process. If the main thread comes
first, with the text of gloo or NCCL, `explain` waits for the verdict and gives that instead. A SIGTERM ends
the process, too, unless the main thread handles it itself (`train.signals`), and a second one in any case.
"""

import os
import re
import select
import signal
import threading
import time
from typing import Any

import torch.distributed as dist

from megagnn.launch.heartbeat import (
    Heartbeat,
    PeerLostError,
    Roll,
    Silence,
    Verdict,
    WatchTimes,
    silence_text,
)

# What a collective says when a peer has left: nothing about why.
_BROKEN = re.compile(
    r"gloo/|closed by peer|reset by peer|Broken pipe|NCCL|ncclRemote",
    re.IGNORECASE,
)
_TERMINATION_SECONDS = 0.8  # after SIGTERM: Open MPI sends SIGKILL after one second
_GUARD_TICK = 0.1
SAME_WISH_SECONDS = 2.0
"""Launchers and batch systems may both send SIGTERM: what comes so soon after is the same wish."""


class Watcher:
    """Watches from `start` until `stop`, in the main thread's back."""

    def __init__(self, store: dist.Store, roll: Roll, where: str, times: WatchTimes) -> None:
        self.roll, self.where, self.times = roll, where, times
        self.heartbeat = Heartbeat(store, roll, where, times)
        self._over = threading.Lock()  # held by the one who has the last word: main thread or guard
        self._stopped = threading.Event()
        self._terminations = _Terminations()
        self._guard = threading.Thread(target=self._keep_guard, name="megagnn-guard", daemon=True)

    def start(self) -> None:
        """Every rank has written itself down."""
        self._terminations.catch()
        self.heartbeat.start()
        self._guard.start()

    def explain(self, error: BaseException) -> PeerLostError | None:
        """The error to raise instead of one that a lost rank caused. An error of this rank's own is told to
        the others, and None returned. Watches no longer after that."""
        beat, times = self.heartbeat, self.times
        if is_broken_connection(error):
            beat.hurry()
            beat.decided.wait(times.stale + 2 * times.interval + times.grace)
        verdict = beat.verdict
        if verdict is None:
            lines = str(error).strip().splitlines() or [""]
            text = f"{self.roll.me} failed: {type(error).__name__}: {lines[0]}".rstrip(": ")
            beat.accuse(Verdict(self.roll.me.rank, text, speaks=True), times.grace)
            verdict = beat.verdict
        self.stop(clean=False)
        if verdict is None or not is_broken_connection(error) or (verdict.speaks and self._is_me(verdict)):
            return None
        return PeerLostError(self._last_words(verdict))

    def stop(self, clean: bool) -> None:
        with self._over:
            self._stopped.set()
        self._terminations.release()
        self.heartbeat.finish(clean, self.times.stale + self.times.interval if clean else self.times.grace)

    def _keep_guard(self) -> None:
        silence, known, asked, terminated = Silence(1.0), 0.0, 0.0, 0.0
        while not self._stopped.is_set():
            caught = self._terminations.wait(_GUARD_TICK)
            beat, now = self.heartbeat, time.monotonic()
            if caught:
                again = asked and now - asked > SAME_WISH_SECONDS
                asked = asked or now
                beat.hurry()  # the launcher may say so because another rank is lost
                if again or not self._terminations.are_handled:
                    terminated = terminated or now
            if silence.look(beat.exchanges) > self.times.stale:
                beat.decide(Verdict(0, self._store_is_silent()))
            if terminated:
                beat.hurry()
                if now - terminated > _TERMINATION_SECONDS:
                    text = f"{self.roll.me} was ended by a signal (SIGTERM), of the launcher or a user"
                    beat.accuse(Verdict(self.roll.me.rank, text, speaks=True), _GUARD_TICK)
                    beat.decide(Verdict(self.roll.me.rank, text, speaks=True))
            known = known or (now if beat.verdict is not None else 0.0)
            if known and (asked or now - known > self.times.grace):
                self._end(143 if asked else 1)

    def _store_is_silent(self) -> str:
        return (
            f"{self.roll.main} {silence_text(self.times.stale)} (the store at {self.where} does not answer)"
        )

    def _is_me(self, verdict: Verdict) -> bool:
        return verdict.rank == self.roll.me.rank

    def _last_words(self, verdict: Verdict) -> str:
        if self._is_me(verdict):
            return verdict.text if verdict.speaks else f"{verdict.text}; the other ranks stopped without it"
        return f"{verdict.text}; this rank stops, too"

    def _end(self, code: int) -> None:
        """The last word is the guard's, unless the main thread already has it."""
        with self._over:
            if self._stopped.is_set():
                return
            verdict = self.heartbeat.verdict
            assert verdict is not None
            text = f"\nmegagnn [rank {self.roll.me.rank}]: error: {self._last_words(verdict)}\n"
            os.write(2, text.encode())  # sys.stderr may be locked by the main thread
            self.heartbeat.finish(False, self.times.grace)  # the main rank's store stays until all have read
            os._exit(code)


def is_broken_connection(error: BaseException) -> bool:
    """Whether a collective failed because of another rank, as its text has it."""
    broken = isinstance(error, RuntimeError) and bool(_BROKEN.search(str(error)))
    return broken or isinstance(error, dist.DistError)


class _Terminations:
    """SIGTERM as bytes in a pipe, for another thread; in the main thread only, if nobody handles it."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._former: int | None = None
        os.register_at_fork(after_in_child=self.release)

    def catch(self) -> None:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._former = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            signal.signal(signal.SIGTERM, _leave_it_to_the_guard)

    def wait(self, seconds: float) -> bool:
        """Whether SIGTERM came within so many seconds."""
        ready, _, _ = select.select([self._read], [], [], seconds)
        return bool(ready) and signal.SIGTERM in os.read(self._read, 512)

    @property
    def are_handled(self) -> bool:
        """Whether the main thread ends by itself: it has put a handler of its own in the place of ours."""
        return signal.getsignal(signal.SIGTERM) is not _leave_it_to_the_guard

    def release(self) -> None:
        if self._former is not None:
            signal.set_wakeup_fd(self._former)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._former = None


def _leave_it_to_the_guard(*_: Any) -> None:
    """Python writes the signal's number to the pipe before it comes here."""
