"""The child process of child.py: `python -m megagnn.data.foreign.serve FD BYTES` reads files on request."""

import importlib
import re
import resource
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from megagnn.data.foreign import RefusedError

COLOURS = re.compile(r"\x1b\[[\d;]*m")
"""Codes of terminals, in which ADIOS2 writes its messages."""
NUM_ITEMS, NUM_BYTES, SECONDS = 200, 1 << 20, 0.5
"""A message is sent when it holds so much, or when the first item in it is so old."""


def main(pipe: Connection, memory_limit: int) -> None:
    """Serve requests until the parent is gone."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard == resource.RLIM_INFINITY or hard > memory_limit:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_limit, hard))
    while True:
        try:
            reader, path, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(pipe, reader, path, arguments))


def _answer(pipe: Connection, reader: str, path: str, arguments: dict[str, Any]) -> tuple[str, Any]:
    module, _, function = reader.partition(":")
    try:
        read = getattr(importlib.import_module(module), function)
        for items in messages(read(path, **arguments)):
            pipe.send(("items", items))
    except ModuleNotFoundError as error:
        return "missing", str(error.name)
    except MemoryError:
        return (
            "error",
            f"it needs more memory than the {resource.getrlimit(resource.RLIMIT_DATA)[0]:,} B allowed",
        )
    except BrokenPipeError:
        raise
    except RefusedError as error:
        return "error", str(error)
    except Exception as error:  # whatever a library raises of a damaged file
        text = COLOURS.sub("", str(error)) or type(error).__name__
        return "error", f"{text}; is the file whole?"
    return "end", None


def messages(items: Iterator[Any]) -> Iterator[list[Any]]:
    """Items in lists, none of which is long, large or late; what was read before an error is kept."""
    held: list[Any] = []
    size, began = 0, time.monotonic()
    try:
        for item in items:
            refused = _refused(item)
            if refused:
                item = f"{item.get('where', 'structure')}: {refused}"
            held.append(item)
            size += size_of(item)
            if len(held) >= NUM_ITEMS or size >= NUM_BYTES or time.monotonic() - began > SECONDS:
                yield held
                held, size, began = [], 0, time.monotonic()
    except Exception:
        if held:
            yield held
        raise
    if held:
        yield held


def _refused(item: Any) -> str:
    """Why an item must not be sent: unpickled by the parent, an array of objects could be any."""
    if isinstance(item, dict):
        return next(filter(None, map(_refused, item.values())), "")
    kind = item.dtype.kind if isinstance(item, (np.ndarray, np.generic)) else ""
    return f"an array of type {item.dtype}, which is neither numbers nor text" if kind not in "biufSU" else ""


def size_of(item: Any) -> int:
    """Bytes of the arrays of an item, dictionaries of them included."""
    if isinstance(item, dict):
        return sum(map(size_of, item.values()))
    return int(getattr(item, "nbytes", 64))


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), int(sys.argv[2]))
