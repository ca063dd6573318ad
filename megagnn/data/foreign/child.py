"""Read a file in a child process, so that a crash of its library loses that file only.

A child reads one file at a time and serves the next when that is done, so that its start is paid once. Where
it dies, the file it read is told as unreadable; but an earlier file may have left it damaged, so a file is
tried once more in a new child before it is blamed.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Mapping
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

TIME_LIMIT = 120.0
"""Seconds without a word from the child, after which it is ended."""
MEMORY_LIMIT = 4 << 30
"""Bytes of memory of its own that a child may have; maps of files do not count."""

LIBRARIES = {"HDF5_USE_FILE_LOCKING": "FALSE"}
"""Settings of the libraries: files are only read, and some file systems know no locks."""


class ForeignError(ValueError):
    """A file that cannot be read; `num_items` were read before."""

    def __init__(self, message: str, num_items: int) -> None:
        super().__init__(message)
        self.num_items = num_items


class Child:
    """A process that reads files on request."""

    def __init__(self, memory_limit: int = MEMORY_LIMIT) -> None:
        self.owner = os.getpid()
        self.is_new = True
        self.pipe, theirs = Pipe()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megagnn.data.foreign.serve", str(theirs.fileno()), str(memory_limit)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **LIBRARIES},
        )
        theirs.close()

    def receive(self, time_limit: float) -> tuple[str, Any]:
        """The next message, (kind, content); of kind "died" where none comes."""
        connection: Connection = self.pipe
        try:
            if not connection.poll(time_limit):
                return "died", f"no answer within {time_limit:g} s"
            message: tuple[str, Any] = connection.recv()
            return message
        except (EOFError, OSError):
            return "died", _cause(self.process.wait())

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):  # collected as garbage, the pipe may have gone first
            self.pipe.close()


def _cause(status: int) -> str:
    if status < 0:
        return f"its library crashed ({signal.Signals(-status).name})"
    return f"its process ended with status {status}"


_idle: list[Child] = []


def _take(memory_limit: int) -> Child:
    """An idle child of this process, or a new one; after a fork those of the other process are left alone."""
    while _idle:
        child = _idle.pop()
        if child.owner == os.getpid() and child.process.poll() is None:
            return child
    return Child(memory_limit)


def read_in_child(
    reader: str,
    path: Path,
    arguments: Mapping[str, Any] | None = None,
    time_limit: float | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> Generator[Any, None, None]:
    """Yield what a function yields for a file, run in a child process.

    Args:
        reader: "module:function", called with the path and `arguments`.
        time_limit: seconds between two messages of the child (each holds some hundred items or a megabyte);
            None for TIME_LIMIT.
        memory_limit: bytes of memory of the child, where a new one is started.

    Raises:
        ForeignError: what the function raised, with the file; a child that died, or that said nothing for
            too long.
        ValueError: a package that the reader needs is not installed.
    """
    time_limit = TIME_LIMIT if time_limit is None else time_limit
    request = (reader, str(path), dict(arguments or {}))
    num_items, kind, content = 0, "died", None
    while kind == "died":
        child = _take(memory_limit)
        may_retry, child.is_new = not child.is_new, False
        try:
            try:
                child.pipe.send(request)
                kind, content = child.receive(time_limit)
            except OSError:
                kind, content = "died", "its process is gone"
            while kind == "items":
                num_items += len(content)
                yield from content
                kind, content = child.receive(time_limit)
        finally:
            if kind == "items" and child.pipe.poll(0.02):  # the caller has seen enough of a file that is read
                kind, _ = child.receive(time_limit)
            if kind in ("end", "error"):
                _idle.append(child)
            else:
                child.end()
        if kind == "died" and (num_items or not may_retry):
            raise ForeignError(f"cannot read {path}: {content}; is the file whole?", num_items)
    if kind == "missing":
        raise ValueError(
            f"{path} needs the package {content}, which is not installed: pip install {content}, or "
            "megagnn[formats] for those of all formats"
        )
    if kind == "error":
        raise ForeignError(f"cannot read {path}: {content}", num_items)
