"""Batches while training: what is made in a second, and what training loses beside batches made before.

    python -m tools.bench.loading make                # edges per second and core, and on the way
    python -m tools.bench.loading train --rounds 8    # needs a core for the process that reads
    python -m tools.bench.loading begin               # what a process that reads takes

`make` measures processor time: neighbours searched and read from kept lists, the batch put together, packed
into one piece and unpacked, as it is and narrow. `train` measures wall time: rounds of steps on batches that
lie in memory and on those of one process that reads, in turns, on one thread; the first steps of each round
are not counted, for the process has had the time of the other's round to make their batches. A ratio of the
medians over the rounds of a step's time, and beside it what both rounds' steps took of the processor.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

from megagnn.config import RunConfig, load_config
from megagnn.data import keys
from megagnn.data.dataset import StructureDataset
from megagnn.data.edge_cache import EdgeCache
from megagnn.data.parcel import Parcel
from megagnn.parallel.context import ParallelContext
from megagnn.train.loader import BatchLoader, open_split
from megagnn.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
Batch = dict[str, Tensor]


def processor_seconds(work: Callable[[], Any], repeats: int) -> float:
    """The least of some."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def _each(function: Callable[[Any], Any], values: Sequence[Any]) -> list[Any]:
    return [function(value) for value in values]


def make(config: RunConfig, num_batches: int, repeats: int) -> list[dict[str, Any]]:
    """Lines of what it takes to make batches."""
    context = ParallelContext(device=torch.device("cpu"))
    dataset = open_split(config.data, config.model, "train", context)
    loader = BatchLoader(dataset, config, context, shuffle=True)
    plan = list(itertools.islice(loader.sampler.batches_from(0, 0), num_batches))
    places = [dataset.places(batch) for batch in plan]
    graphs = [dataset.reader().__getitems__(one) for one in places]
    batches = [loader.collate(one) for one in graphs]
    edges = sum(batch[keys.EDGE_INDEX].shape[1] for batch in batches)
    atoms = sum(len(batch[keys.POSITIONS]) for batch in batches)
    works: dict[str, Callable[[], Any]] = {
        "read and search": lambda: [dataset.reader().__getitems__(one) for one in places],
        "put together": lambda: [loader.collate(one) for one in graphs],
    }
    for narrow in (False, True):
        parcels = [Parcel.of(batch, narrow) for batch in batches]
        name = "narrow" if narrow else "as it is"
        works[f"pack, {name}"] = partial(_each, partial(Parcel.of, narrow=narrow), batches)
        works[f"unpack, {name}"] = partial(_each, Parcel.batch, parcels)
    with tempfile.TemporaryDirectory() as folder:
        kept = _with_cache(dataset, Path(folder))
        for one in places:
            kept.reader().__getitems__(one)
        works["read and read neighbours"] = lambda: [kept.reader().__getitems__(one) for one in places]
        lines = [
            {
                "work": name,
                "ns_per_edge": round(1e9 * (seconds := processor_seconds(work, repeats)) / edges, 1),
                "edges_per_second": round(edges / seconds),
                "ms_per_batch": round(1e3 * seconds / len(batches), 3),
            }
            for name, work in works.items()
        ]
    packed = [[Parcel.of(b, narrow).memory for b in batches] for narrow in (False, True)]
    bytes_of = [sum(memory.numel() for memory in some if memory is not None) for some in packed]
    return [
        {
            "batches": len(batches),
            "edges": edges,
            "atoms": atoms,
            "bytes": bytes_of[0],
            "narrow": bytes_of[1],
        },
        *lines,
    ]


def _with_cache(dataset: StructureDataset, folder: Path) -> StructureDataset:
    """The data set with kept lists in another folder than that of its store."""
    kept = StructureDataset([store.path for store in dataset.stores], "train", dataset.cutoff)
    for k, store in enumerate(kept.stores):
        where = folder / str(k)
        where.mkdir()
        counts = StructureDataset([store.path], "all", dataset.cutoff).num_edges
        path, store.path = store.path, where
        kept._caches[k] = EdgeCache.open(store, dataset.cutoff, False, counts, 10**10, make=True)
        store.path = path
    return kept


def train(config: RunConfig, rounds: int, num_steps: int) -> dict[str, Any]:
    """Seconds of a step on batches made before and on those of a process that reads, in turns."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            dataclasses.replace(config, out_dir=folder), ParallelContext(device=torch.device("cpu"))
        )
        ahead = 4  # batches that wait when a round begins, and one that is being made
        trainer.train.num_workers = 0
        made = list(itertools.islice(trainer.train.batches(), num_steps + ahead))
        trainer.train.num_workers = 1

        def read() -> Iterator[list[Batch]]:
            while True:  # the same structures each round: steps of one size
                yield from itertools.islice((b for _, b in trainer.train.stream(0, 0, 0)), len(made))

        times: dict[str, list[tuple[float, float]]] = {"made before": [], "one process": []}
        batches = read()
        monitor, signals = MagicMock(), MagicMock(received="")
        for _ in range(rounds + 1):
            for name in times:
                source = ([batch] for batch in made) if name == "made before" else batches
                for k, batch in enumerate(itertools.islice(source, len(made))):
                    if k == ahead:
                        start, processor = time.perf_counter(), time.process_time()
                    trainer._step(batch, monitor, signals)
                times[name].append(
                    ((time.perf_counter() - start) / num_steps, (time.process_time() - processor) / num_steps)
                )
        trainer.train.close()
    walls = {name: statistics.median(w for w, _ in found[1:]) for name, found in times.items()}
    busy = {name: min(p for _, p in found[1:]) for name, found in times.items()}
    ratios = sorted(a[0] / b[0] for a, b in list(zip(*times.values(), strict=True))[1:])
    return {
        "steps": num_steps,
        "ms_per_step": {name: round(1e3 * wall, 2) for name, wall in walls.items()},
        "throughput": round(statistics.median(ratios), 4),
        "throughput_range": [round(ratios[0], 4), round(ratios[-1], 4)],
        "processor_ms_per_step": {name: round(1e3 * least, 2) for name, least in busy.items()},
        "processor_throughput": round(busy["made before"] / busy["one process"], 4),
    }


def begin(config: RunConfig) -> dict[str, Any]:
    """Processor time and memory of a process that reads, when its first batch has come."""
    context = ParallelContext(device=torch.device("cpu"))
    data = dataclasses.replace(config.data, num_workers=1)
    dataset = open_split(data, config.model, "train", context)
    loader = BatchLoader(dataset, dataclasses.replace(config, data=data), context, shuffle=True)
    start = time.perf_counter()
    batches = loader.batches()
    next(batches)
    assert loader._loader is not None
    iterator: Any = loader._loader._iterator
    process = Path("/proc") / str(iterator._workers[0].pid)
    ticks = process.joinpath("stat").read_text().rpartition(")")[2].split()[11:13]
    status = dict(line.split(":", 1) for line in process.joinpath("status").read_text().splitlines())
    loader.close()
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "processor_seconds": sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
        **{name: status[name].strip() for name in ("VmRSS", "RssAnon")},
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("make", "train", "begin"))
    parser.add_argument("--config", type=Path, default=ROOT / "examples/configs/quickstart.toml")
    parser.add_argument("--steps", type=int, default=40, help="of a round; batches of `make`")
    parser.add_argument("--rounds", type=int, default=6)
    args, overrides = parser.parse_known_args()
    config = load_config(args.config, overrides)
    works: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "make": lambda: make(config, args.steps, args.rounds),
        "train": lambda: [train(config, args.rounds, args.steps)],
        "begin": lambda: [begin(config)],
    }
    for line in works[args.what]():
        print(json.dumps(line))


if __name__ == "__main__":
    main()
