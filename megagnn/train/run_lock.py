"""One run at a time in a folder."""

import contextlib
import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megagnn.parallel.context import ParallelContext
from megagnn.parallel.world import broadcast_object

NAME = "lock"
OTHER_FOLDER = "choose another folder with --out_dir DIR"
PATIENCE_SECONDS = 5.0
"""How long the processes of a run that was killed may take to be gone."""


@contextlib.contextmanager
def locked(folder: Path, context: ParallelContext, or_else: str = OTHER_FOLDER) -> Iterator[None]:
    """The folder is this run's: the main rank holds the lock, which goes with its process, however that ends.

    It is the lock of training and of sweeps, so neither starts where the other is at work. A POSIX lock and
    not flock's, for those go on in the processes that read data, which outlive a killed rank by seconds.
    Where the file system knows no locks, a warning is all. A run that fails before it has written anything
    leaves no folder.

    Args:
        or_else: what a user may do other than wait, for the error.

    Raises:
        ValueError: another process holds it; on all ranks.
    """
    with contextlib.ExitStack() as stack:
        complaint = ""
        if context.is_main:
            made = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / NAME, "a+"))
            stack.push(_forget(folder, made))  # before the lock goes
            complaint = _take(file.fileno(), folder, or_else)
        complaint = broadcast_object(complaint, context)
        if complaint:
            raise ValueError(complaint)
        yield


def _forget(folder: Path, made: bool) -> Callable[..., None]:
    """A clean-up that removes a folder `made` for this run if the run failed and left it empty."""

    def forget(kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None and made and [path.name for path in folder.iterdir()] == [NAME]:
            (folder / NAME).unlink()
            folder.rmdir()

    return forget


def _take(number: int, folder: Path, or_else: str) -> str:
    """Take the lock; a complaint about who holds it, or empty."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows either for a lock that is held
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            holder = os.pread(number, 200, 0).decode(errors="replace").strip() or "another process"
            return f"another run is at work in {folder} ({holder}); wait for it, stop it, or {or_else}"
        except OSError as error:
            print(f"warning: {folder} cannot be locked ({error}): start no second run in it", file=sys.stderr)
            return ""
        os.ftruncate(number, 0)
        os.write(number, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return ""
