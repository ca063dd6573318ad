"""A chunk: a few groups of structures made and labelled from one seed, and its file.

Chunk k of a source draws all its random numbers from SeedSequence([seed, source number, k]). Chunks know
nothing of each other, so the data do not depend on how many workers made them, in which order, or in how many
sittings.
"""

import os
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from megagnn.data.labels.engines import LabelError
from megagnn.data.labels.sources import SOURCES, Source
from megagnn.data.record import Structure

GROUPS_PER_CHUNK = 25
DECIMALS = 4  # positions and cells lie on a grid of 1e-4 Å


@dataclass
class Chunk:
    """Labelled structures of one chunk, and what was tried for them.

    num_labelled counts calls to the engine; rejected counts those that gave no structure, by reason;
    num_duplicates counts structures left unlabelled because the chunk already held their group.
    """

    structures: list[Structure] = field(default_factory=list)
    num_labelled: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    num_duplicates: int = 0


def as_stored(structure: Structure) -> Structure:
    """The structure with positions and cell as a store will hold them: on a grid of decimals, in float32.

    Labels are computed for these numbers, so stored labels belong to stored positions exactly. The decimal
    grid costs nothing (a geometry like any other) and lets the packed archive compress.
    """

    def stored(values: np.ndarray) -> np.ndarray:
        return np.round(values, DECIMALS).astype(np.float32).astype(np.float64)

    return replace(structure, positions=stored(structure.positions), cell=stored(structure.cell))


def make_chunk(source: Source, seed: int, index: int, per_group: int) -> Chunk:
    """Generate and label a chunk: GROUPS_PER_CHUNK groups of `per_group` structures, less those rejected."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, source.number, index]))
    chunk = Chunk()
    seen: set[str] = set()
    for _ in range(GROUPS_PER_CHUNK):
        structures = list(source.recipe.generate(per_group, rng))
        group = structures[0].group
        if group in seen and not source.repeats:
            chunk.num_duplicates += len(structures)
            continue
        seen.add(group)
        for structure in structures:
            chunk.num_labelled += 1
            try:
                chunk.structures.append(_labelled(source, as_stored(structure)))
            except LabelError as failure:
                chunk.rejected[str(failure)] += 1
    return chunk


def _labelled(source: Source, structure: Structure) -> Structure:
    labels = source.engine.label(structure)
    if not (np.isfinite(labels.energy) and np.isfinite(labels.forces).all()):
        raise LabelError("not_finite")
    if np.linalg.norm(labels.forces, axis=1).max() > source.max_force:
        raise LabelError("max_force")
    return replace(structure, energy=labels.energy, forces=labels.forces, stress=labels.stress,
                   source=source.name, level=source.engine.method)  # fmt: skip


def save_chunk(path: Path, chunk: Chunk) -> None:
    """Write a chunk in one step: whole under its name, or not at all."""
    structures, reasons = chunk.structures, sorted(chunk.rejected)
    arrays = {
        "num_atoms": np.array([s.num_atoms for s in structures], dtype=np.int64),
        "atomic_numbers": np.concatenate([np.zeros(0, np.uint8), *(s.atomic_numbers for s in structures)]),
        "positions": np.concatenate([np.zeros((0, 3), "f4"), *(s.positions for s in structures)], dtype="f4"),
        "forces": np.concatenate([np.zeros((0, 3)), *(s.labels["forces"] for s in structures)]),
        "stress": np.array(
            [np.full((3, 3), np.nan) if s.stress is None else s.stress for s in structures]
        ).reshape(-1, 3, 3),
        "energy": np.array([s.energy for s in structures], dtype=np.float64),
        "cell": np.array([s.cell for s in structures], dtype=np.float32).reshape(-1, 3, 3),
        "pbc": np.array([s.pbc for s in structures], dtype=bool).reshape(-1, 3),
        "group": np.array([s.group for s in structures], dtype=np.str_),
        "num_labelled": np.array(chunk.num_labelled),
        "num_duplicates": np.array(chunk.num_duplicates),
        "reasons": np.array(reasons, dtype=np.str_),
        "num_rejected": np.array([chunk.rejected[reason] for reason in reasons], dtype=np.int64),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_chunk(path: Path, source: Source) -> Chunk | None:
    """Read a chunk; None where it is missing or damaged (a machine that lost power), to be made again."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    counts = zip(arrays["reasons"].tolist(), arrays["num_rejected"].tolist(), strict=True)
    num_labelled, num_duplicates = int(arrays["num_labelled"]), int(arrays["num_duplicates"])
    return Chunk(list(_unpack(arrays, source)), num_labelled, Counter(dict(counts)), num_duplicates)


def _unpack(arrays: dict[str, np.ndarray], source: Source) -> Iterator[Structure]:
    ends = np.cumsum(arrays["num_atoms"])
    stresses = arrays.get("stress", np.full((len(ends), 3, 3), np.nan))  # parts of earlier versions have none
    for i, (count, end) in enumerate(zip(arrays["num_atoms"], ends, strict=True)):
        atoms = slice(end - count, end)
        yield Structure(
            arrays["atomic_numbers"][atoms],
            arrays["positions"][atoms].astype(np.float64),
            arrays["cell"][i].astype(np.float64),
            arrays["pbc"][i],
            energy=float(arrays["energy"][i]),
            forces=arrays["forces"][atoms],
            stress=None if np.isnan(stresses[i]).any() else stresses[i],
            group=str(arrays["group"][i]),
            source=source.name,
            level=source.engine.method,
        )


def chunk_path(parts: Path, index: int) -> Path:
    """File of chunk `index` in a source's directory of parts."""
    return parts / f"chunk-{index:06d}.npz"


def produce_chunk(name: str, seed: int, index: int, per_group: int, parts: Path) -> None:
    """What a worker does: make chunk `index` of the source called `name` and write it."""
    save_chunk(chunk_path(parts, index), make_chunk(SOURCES[name], seed, index, per_group))
