"""What the memory of a step is made of: the allocator's events, each with what it was allocated for.

PyTorch's profiler records every allocation and release with its address, and in which ranges it happened.
`labelled` names such ranges around the few functions that make parameters whole, hold gradients or send
messages; what is allocated within is theirs, what is allocated elsewhere is an activation or a temporary.
Buffers that stay between steps are known by their addresses.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._C._profiler import _EventType
from torch.profiler import record_function

from megagnn.models.potential import Potential
from megagnn.optim.bucket_reducer import Bucket
from megagnn.optim.zero.offload import DiskStorage
from megagnn.optim.zero.reducer import ShardedReducer
from megagnn.optim.zero.unit import Unit
from megagnn.parallel import messages
from tools.bench.memory.step import status_bytes

PARAMETERS, GRADIENTS, STATE = "parameters", "gradients", "optimizer state"
ACTIVATIONS, MESSAGES, FILES = "activations", "communication buffers", "offloaded, resident"
CATEGORIES = (PARAMETERS, GRADIENTS, STATE, FILES, MESSAGES, ACTIVATIONS)
"""In the order in which they are stacked; activations include temporaries and the batch."""
_MEMORY, _PHASE = "memory:", "phase:"
MADE, STEP = "construct", "whole step"
"""Phases: what makes the model and its optimizer, and what is drawn."""

# The innermost range counts. What autograd makes before a gradient reaches its buffer is a temporary.
_MADE_FOR: list[tuple[Any, str, str]] = [
    (Unit, "start_gather", PARAMETERS),
    (Unit, "take_gradient", GRADIENTS),
    (Unit, "update_elements", STATE),
    (ShardedReducer, "_send", GRADIENTS),
    (ShardedReducer, "_launch", MESSAGES),
    (Bucket, "_packed", MESSAGES),
    *(
        (messages, name, MESSAGES)
        for name in (
            "start_all_reduce",
            "start_all_gather",
            "start_fill_rows",
            "start_reduce_scatter",
            "start_all_to_all",
        )
    ),
]
_PHASES: list[tuple[Any, str, str]] = [
    (Potential, "forward", "forward"),
    (Potential, "directional", "forward of pairs"),
    (torch.Tensor, "backward", "backward"),
]


class Event(NamedTuple):
    """One allocation (bytes > 0) or release (bytes < 0)."""

    nanoseconds: int
    address: int
    num_bytes: int
    category: str
    """Of an allocation."""


@dataclass
class Timeline:
    """Bytes of each category from the beginning of a step on."""

    seconds: NDArray[np.float64]
    num_bytes: dict[str, NDArray[np.float64]]
    """{category: what it holds from each of these times to the next}."""
    phases: list[tuple[str, float, float]] = field(default_factory=list)
    """(name, begin, end), s."""
    unseen: int = 0
    """Bytes released where the profiler does not look, gloo's threads, seen when the address came again."""

    @property
    def total(self) -> NDArray[np.float64]:
        """Of all categories."""
        return np.sum(list(self.num_bytes.values()), axis=0)

    def at_peak(self) -> dict[str, float]:
        """Bytes of each category where their sum is largest."""
        at = int(np.argmax(self.total))
        return {category: float(values[at]) for category, values in self.num_bytes.items()}

    def with_files(self, sampled: list[tuple[float, float]]) -> Timeline:
        """With what was resident of files: (s, bytes), each until the next."""
        times = np.array([t for t, _ in sampled] or [0.0])
        held = np.array([size for _, size in sampled] or [0.0])
        inside = times[(times > self.seconds[0]) & (times < self.seconds[-1])]
        seconds = np.union1d(self.seconds, inside)
        last = np.searchsorted(self.seconds, seconds, side="right") - 1
        num_bytes = {category: values[last] for category, values in self.num_bytes.items()}
        sample = np.searchsorted(times, seconds, side="right") - 1
        num_bytes[FILES] = np.where(sample >= 0, held[np.maximum(sample, 0)], held[0])
        return replace(self, seconds=seconds, num_bytes=num_bytes)

    def thinned(self, num_points: int) -> Timeline:
        """So many equal spans of time and the end, each span with what its largest total is made of."""
        edges = np.linspace(self.seconds[0], self.seconds[-1], num_points + 1)
        first = np.searchsorted(self.seconds, edges[:-1], side="right") - 1
        stop = np.maximum(np.searchsorted(self.seconds, edges[1:]), first + 1)
        total = self.total
        keep = [a + int(np.argmax(total[a:b])) for a, b in zip(first, stop, strict=True)]
        num_bytes = {category: values[[*keep, -1]] for category, values in self.num_bytes.items()}
        return replace(self, seconds=edges, num_bytes=num_bytes)


@contextlib.contextmanager
def labelled() -> Iterator[None]:
    """Within the context the functions of this module's lists run in ranges that `events` reads."""
    with contextlib.ExitStack() as stack:
        for prefix, functions in ((_MEMORY, _MADE_FOR), (_PHASE, _PHASES)):
            for owner, name, label in functions:
                wrapped = _within(getattr(owner, name), prefix + label)
                stack.enter_context(mock.patch.object(owner, name, wrapped))
        stack.enter_context(mock.patch.object(messages.Pending, "wait", _labelled_wait))
        yield


def phase(name: str) -> record_function:
    """A range that is a phase of the step."""
    return record_function(_PHASE + name)


def _within(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    def inner(*arguments: Any, **named: Any) -> Any:
        with record_function(label):
            return function(*arguments, **named)

    return inner


_wait = messages.Pending.wait


def _labelled_wait(self: messages.Pending) -> torch.Tensor:
    """What a message ends with is the message's; what `then` makes of it is not."""
    if self._work is None:
        return _wait(self)
    with record_function(_MEMORY + MESSAGES):
        return _wait(self)


def events(profiler: Any) -> tuple[list[Event], list[tuple[str, int, int]]]:
    """All of the allocator's events in their order, and the phases (name, begin, end), ns, of a profile."""
    found: list[Event] = []
    phases: list[tuple[str, int, int]] = []
    tree = profiler.profiler.kineto_results.experimental_event_tree()
    waiting = [(event, ACTIVATIONS) for event in reversed(tree)]
    while waiting:
        event, category = waiting.pop()
        if event.tag == _EventType.Allocation:
            extra = event.typed[1]
            found.append(Event(event.start_time_ns, extra.ptr, extra.alloc_size, category))
            continue
        name = event.name
        if name.startswith(_MEMORY):
            category = name.removeprefix(_MEMORY)
        elif name.startswith(_PHASE):
            phases.append((name.removeprefix(_PHASE), event.start_time_ns, event.end_time_ns))
        waiting += [(child, category) for child in reversed(event.children)]
    found.sort(key=lambda event: event.nanoseconds)
    return found, sorted(phases, key=lambda p: p[1])


def allocator_bytes(profiler: Any, until: int) -> float:
    """What the profiler's flat list of the allocator's events adds up to at a time, ns."""
    raw = profiler.profiler.kineto_results.events()
    return float(sum(e.nbytes() for e in raw if e.name() == "[memory]" and e.start_ns() <= until))


def timeline(
    found: list[Event],
    phases: list[tuple[str, int, int]],
    kept: dict[int, str],
    made: str = MADE,
    step: str = STEP,
) -> Timeline:
    """Of the last phase `step`; what lives at the end of the phase `made` is of the category by its address.

    Raises ValueError where there is no such phase.
    """
    for name in (made, step):
        if not any(p[0] == name for p in phases):
            raise ValueError(f"the profile needs a phase '{name}', got {[p[0] for p in phases]}")
    built = max(p[2] for p in phases if p[0] == made)
    _, begin, end = [p for p in phases if p[0] == step][-1]
    live: dict[int, tuple[int, str]] = {}
    total = dict.fromkeys(CATEGORIES, 0)
    known, unseen = False, 0
    rows: list[tuple[int, list[int]]] = []
    for event in found:
        if not known and event.nanoseconds > built:
            known = True
            _recognise(live, total, kept)
        if event.nanoseconds > end:
            break
        before = list(total.values())
        unseen += _count(event, live, total)
        if event.nanoseconds >= begin:
            rows = rows or [(begin, before)]
            rows.append((event.nanoseconds, list(total.values())))
    rows = [*(rows or [(begin, list(total.values()))]), (end, list(total.values()))]
    table = np.array([values for _, values in rows], dtype=np.float64)
    seconds = np.array([1e-9 * (ns - begin) for ns, _ in rows])
    inside = [(n, 1e-9 * (a - begin), 1e-9 * (b - begin)) for n, a, b in phases if a >= begin and b <= end]
    columns = {category: table[:, index] for index, category in enumerate(CATEGORIES)}
    return Timeline(seconds, columns, [p for p in inside if p[0] != step], unseen)


def _recognise(live: dict[int, tuple[int, str]], total: dict[str, int], kept: dict[int, str]) -> None:
    """Buffers that stay are what they are kept for, whoever made them."""
    for address, (size, category) in live.items():
        if address in kept:
            total[category] -= size
            total[kept[address]] += size
            live[address] = (size, kept[address])


def _count(event: Event, live: dict[int, tuple[int, str]], total: dict[str, int]) -> int:
    """Takes an event in; returns the bytes at its address whose release was not seen."""
    if event.num_bytes < 0:
        size, category = live.pop(event.address, (-event.num_bytes, ACTIVATIONS))
        total[category] -= size
        return 0
    unseen, category = live.pop(event.address, (0, ACTIVATIONS))
    total[category] -= unseen
    live[event.address] = (event.num_bytes, event.category)
    total[event.category] += event.num_bytes
    return unseen


class FilePages:
    """Samples, while it is entered and before pages are released, what is resident of files of a folder.

    `samples` are (Unix time in s, bytes): what the process holds of all mapped files (RssFile and RssShmem of
    /proc/self/status), less what it held of others at the beginning or the end, where it held less, for the
    system may take pages of libraries back. /proc/self/smaps tells them apart.
    """

    def __init__(self, folder: str, interval: float = 0.002) -> None:
        self.folder, self.interval = folder, interval
        self.samples: list[tuple[float, float]] = []
        self._stop = threading.Event()

    def __enter__(self) -> FilePages:
        self._others = _mapped() - resident_of(self.folder)
        release = self._release = DiskStorage.release

        def sampled(storage: DiskStorage, buffers: Iterable[Tensor]) -> None:
            self.samples.append((time.time(), _mapped()))
            release(storage, buffers)

        DiskStorage.release = sampled  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        DiskStorage.release = self._release  # type: ignore[method-assign]
        self._stop.set()
        self._thread.join()
        others = min(self._others, _mapped() - resident_of(self.folder))
        self.samples = [(at, max(0.0, held - others)) for at, held in sorted(self.samples)]

    def _run(self) -> None:
        while not self._stop.is_set():
            self.samples.append((time.time(), _mapped()))
            self._stop.wait(self.interval)


def _mapped() -> float:
    return status_bytes("RssFile") + status_bytes("RssShmem")


def resident_of(folder: str) -> float:
    """Bytes of mapped files of a folder, deleted ones, too, that are in this process's memory."""
    total, inside = 0, False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            fields = line.split()
            if not fields[0].endswith(":"):  # the head of a mapping: addresses, rights, ..., path
                inside = len(fields) > 5 and fields[5].startswith(folder + "/")
            elif inside and fields[0] == "Rss:":
                total += 1024 * int(fields[1])
    return float(total)
