"""The command `megagnn label`: label sources in parallel, in chunks that survive, to a packed store."""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megagnn import __version__
from megagnn.data.labels.chunks import (
    DECIMALS,
    GROUPS_PER_CHUNK,
    Chunk,
    chunk_path,
    load_chunk,
    produce_chunk,
)
from megagnn.data.labels.engines import require
from megagnn.data.labels.sources import SOURCES, Source, find_sources
from megagnn.data.record import Structure
from megagnn.data.store import write_store

FRACTIONS = (0.8, 0.1, 0.1)
RULE = "hash of group: blake2b(group, person=b'megagnn') / 2**64 against cumulated fractions"

STALL_CHUNKS = 20  # consecutive chunks that bring nothing new

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class LabelJob:
    """What to label.

    Attributes:
        num: structures of each source.
        per_group: geometries drawn of each molecule or slab.
        out: the store's directory.
        keep_parts: leave the finished chunks, for a later job with a larger `num`.
    """

    sources: list[Source]
    num: int
    seed: int
    workers: int
    out: Path
    per_group: int = 4
    keep_parts: bool = False

    @property
    def parts(self) -> Path:
        """Directory of finished chunks, beside the store; removed when the store is written."""
        return self.out.with_name(self.out.name + ".parts")


@dataclass
class Tally:
    """Chunks of one source accepted so far, always the first, which a run of any other shape accepts."""

    source: Source
    num: int
    num_chunks: int = 0
    num_structures: int = 0
    num_labelled: int = 0
    num_duplicates: int = 0
    num_idle: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)

    @property
    def done(self) -> bool:
        return self.num_structures >= self.num

    def accept(self, chunk: Chunk) -> list[Structure]:
        """Count the next chunk, and return what it adds: no known molecule, and no more than `num` in all."""
        fresh = [s for s in chunk.structures if self.source.repeats or s.group not in self.seen]
        added = fresh[: self.num - self.num_structures]
        self.seen.update(s.group for s in chunk.structures)
        self.kept.update(s.group for s in added)
        self.num_chunks += 1
        self.num_structures += len(added)
        self.num_labelled += chunk.num_labelled
        self.num_duplicates += chunk.num_duplicates + len(chunk.structures) - len(fresh)
        self.num_idle = 0 if fresh else self.num_idle + 1
        self.rejected.update(chunk.rejected)
        if self.num_idle >= STALL_CHUNKS and not self.done:
            raise ValueError(
                f"source {self.source.name} found no new molecule in {STALL_CHUNKS} chunks after "
                f"{self.num_structures} of {self.num} structures: its molecules are used up; lower --num "
                "or raise --per-group"
            )
        return added

    def wants(self, index: int) -> bool:
        """Whether chunk `index` is likely needed, if those before it hold as much as the accepted ones."""
        per_chunk = self.num_structures / self.num_chunks if self.num_chunks else 1.0
        return self.num_structures + (index - self.num_chunks) * per_chunk < self.num


def label(job: LabelJob) -> dict[str, Any]:
    """Run a job and write its store; a job that was stopped continues where it was.

    Returns:
        The provenance of each source.

    Raises:
        ValueError: a missing engine, an existing store, or parts of a different job.
    """
    if job.out.exists():
        raise ValueError(f"{job.out} already exists; choose another --out or remove it")
    for name, value in (("--num", job.num), ("--workers", job.workers), ("--per-group", job.per_group)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if job.seed < 0:
        raise ValueError(f"--seed must not be negative, got {job.seed}")
    plans = {source.name: _plan(job, source) for source in job.sources}
    for source in job.sources:
        _open_parts(job.parts / source.name, plans[source.name])
    with worker_pool(job.workers) as pool:
        tallies = [_run_source(job, source, pool) for source in job.sources]
    provenance = {t.source.name: _provenance(plans[t.source.name], t) for t in tallies}
    write_store(
        job.out,
        (structure for tally in tallies for structure in _structures(job, tally)),
        splits=lambda groups, _: hash_splits(groups),
        split_description={"rule": RULE, "fractions": list(FRACTIONS)},
        provenance=provenance,
    )
    if not job.keep_parts:
        for source in job.sources:
            shutil.rmtree(job.parts / source.name)
        if not any(job.parts.iterdir()):
            job.parts.rmdir()
    return provenance


def _plan(job: LabelJob, source: Source) -> dict[str, Any]:
    """Everything the numbers depend on, except how many of them are asked for."""
    versions = {package: require(package) for package in source.packages}
    return {
        "engine": source.engine.package,
        "version": versions[source.engine.package],
        "method": source.engine.method,
        "settings": source.engine.settings,
        "recipe": asdict(source.recipe),  # type: ignore[call-overload]
        "megagnn": __version__,
        "seed": job.seed,
        "per_group": job.per_group,
        "groups_per_chunk": GROUPS_PER_CHUNK,
        "position_decimals": DECIMALS,
        "max_force": source.max_force,
        "packages": {**versions, "numpy": require("numpy")},
    }


def _open_parts(parts: Path, plan: dict[str, Any]) -> None:
    """Make the directory of parts with its plan, or check that it belongs to the same plan."""
    file = parts / "plan.json"
    if not file.exists():
        if parts.exists() and any(parts.iterdir()):
            raise ValueError(f"{parts} holds files but no plan.json to say what they are; remove it")
        parts.mkdir(parents=True, exist_ok=True)
        temporary = parts.with_name(f".{parts.name}.plan.tmp")
        temporary.write_text(json.dumps(plan, indent=2))
        os.replace(temporary, file)
        return
    found, wanted = json.loads(file.read_text()), json.loads(json.dumps(plan))
    for key in wanted:
        if found.get(key) != wanted[key]:
            raise ValueError(
                f"{parts} holds parts of another job: {key} is {found.get(key)!r} there and {wanted[key]!r} "
                f"here; choose another --out, or remove {parts} to start anew"
            )


def _run_source(job: LabelJob, source: Source, pool: ProcessPoolExecutor) -> Tally:
    """Make chunks until the first ones hold `num` structures; those on disk are taken as they are."""
    parts, tally = job.parts / source.name, Tally(source, job.num)
    pending: dict[int, Future[None]] = {}

    def submit(index: int) -> Future[None]:
        return pool.submit(produce_chunk, source.name, job.seed, index, job.per_group, parts)

    with tqdm(total=job.num, desc=source.name, unit="structure", smoothing=0.1) as bar:
        while not tally.done:
            # Keep every worker busy with the next chunks that are missing and likely to be needed.
            index = tally.num_chunks
            while sum(not f.done() for f in pending.values()) < job.workers and tally.wants(index):
                if index not in pending and not chunk_path(parts, index).exists():
                    pending[index] = submit(index)
                index += 1
            chunk = load_chunk(chunk_path(parts, tally.num_chunks), source)
            if chunk is None:  # under way, or on disk but damaged
                (pending.get(tally.num_chunks) or submit(tally.num_chunks)).result()
                chunk = load_chunk(chunk_path(parts, tally.num_chunks), source)
                assert chunk is not None
            pending.pop(tally.num_chunks, None)
            bar.update(len(tally.accept(chunk)))
        bar.set_postfix(rejected=f"{sum(tally.rejected.values()) / tally.num_labelled:.1%}")
    for future in pending.values():
        future.cancel()
    return tally


def _structures(job: LabelJob, tally: Tally) -> Iterator[Structure]:
    """The accepted structures again, from disk: memory holds one chunk, whatever the size of the data."""
    again = Tally(tally.source, tally.num)
    for index in range(tally.num_chunks):
        chunk = load_chunk(chunk_path(job.parts / tally.source.name, index), tally.source)
        if chunk is None:
            raise ValueError(
                f"chunk {index} of {tally.source.name} vanished while the store was written; run again"
            )
        yield from again.accept(chunk)


def _provenance(plan: dict[str, Any], tally: Tally) -> dict[str, Any]:
    num_rejected = sum(tally.rejected.values())
    return {
        **plan,
        "num_structures": tally.num_structures,
        "num_labelled": tally.num_labelled,
        "num_rejected": num_rejected,
        "rejection_rate": num_rejected / tally.num_labelled,
        "rejected": dict(sorted(tally.rejected.items())),
        "num_duplicates": tally.num_duplicates,
        "num_groups": len(tally.kept),
    }


def hash_splits(
    groups: Iterable[str], fractions: tuple[float, float, float] = FRACTIONS
) -> NDArray[np.uint8]:
    """Split code (0 train, 1 valid, 2 test) of each structure, from its group alone.

    A shuffled split depends on what else is in the data, so that a molecule held out of the GFN2 source could
    be trained on in the GFN1 source, or a larger set could train on the test molecules of a smaller one. A
    hash cannot. The price: fractions are met on average, to about sqrt(f (1 - f) / number of groups).

    Args:
        groups: split key of each structure.
        fractions: shares of train, valid and test; they sum to 1.

    Raises:
        ValueError: fractions that are negative or do not sum to 1.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1.0) > 1e-9:
        raise ValueError(f"split fractions must be non-negative and sum to 1, got {fractions}")
    edges = np.cumsum(fractions)[:2]
    codes: dict[str, int] = {}
    splits = []
    for group in groups:
        if group not in codes:
            digest = blake2b(group.encode(), digest_size=8, person=b"megagnn").digest()
            codes[group] = int(np.searchsorted(edges, int.from_bytes(digest, "big") / 2**64, side="right"))
        splits.append(codes[group])
    return np.array(splits, dtype=np.uint8)


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes of one thread each. Spawned, not forked: the engines' OpenMP does not survive a fork."""
    saved = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))  # read when a worker loads its libraries
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it: a worker whose parent was killed would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    listing = "; ".join(f"{source.name}: {source.summary}" for source in SOURCES.values())
    parser.add_argument("--source", required=True, metavar="NAME[,NAME]", help=listing)
    parser.add_argument(
        "--num", type=int, default=4000, help="structures of each source (default %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same data (default %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes; does not change the data (default %(default)s)"
    )
    parser.add_argument(
        "--per-group",
        type=int,
        default=4,
        metavar="K",
        help="geometries drawn of each molecule or slab (default %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the packed store to write")
    parser.add_argument(
        "--keep-parts",
        action="store_true",
        help="keep DIR.parts, from which a later run with a larger --num continues",
    )


def run(args: argparse.Namespace) -> int:
    """Label, write the store, say what was made. Returns the exit status."""
    sources = find_sources([name.strip() for name in args.source.split(",")])
    job = LabelJob(sources, args.num, args.seed, args.workers, args.out, args.per_group, args.keep_parts)
    try:
        provenance = label(job)
    except KeyboardInterrupt:
        print(f"\nstopped; finished parts are kept in {job.parts}, the same command continues from them")
        return 130
    for name, made in provenance.items():
        reasons = ", ".join(f"{reason} {count}" for reason, count in made["rejected"].items()) or "none"
        print(
            f"{name}: {made['num_structures']} structures of {made['num_groups']} groups, "
            f"{made['method']} ({made['engine']} {made['version']}), "
            f"{made['rejection_rate']:.1%} of {made['num_labelled']} rejected ({reasons}), "
            f"{made['num_duplicates']} repeats of a molecule dropped"
        )
    print(f"wrote {job.out}")
    return 0
