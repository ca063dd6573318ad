"""Label sources in parallel, in chunks that survive interruption, and assemble the packed store."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megagnn import __version__
from megagnn.data.labels.chunks import DECIMALS, GROUPS_PER_CHUNK, chunk_path, load_chunk, produce_chunk
from megagnn.data.labels.engines import require
from megagnn.data.labels.pool import worker_pool
from megagnn.data.labels.sources import Source
from megagnn.data.labels.splits import FRACTIONS, RULE, hash_splits
from megagnn.data.labels.tally import Tally
from megagnn.data.record import Structure
from megagnn.data.store import write_store


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
