"""The checkpoints of a run: written in the background, committed by a rename, the last n and the best kept.

[Note: commit] Ranks write their files and then a marker each, `rank-00003.json`, into one hidden folder. The
main rank waits for the markers of all, writes the manifest, renames the folder, points the links `last` and
`best` at what they name, and removes what is no longer kept. The threads that do so take part in no
collective: those of training go on meanwhile, and the order of collectives must be one. Folders of saves that
were killed are removed when the next run here begins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megagnn.checkpoint import manifest as checkpoint_manifest
from megagnn.checkpoint.boxes import Part, Parts, share_of, whole_parts
from megagnn.checkpoint.folder import (
    FolderCheckpoint,
    checkpoint_steps,
    folder_name,
    point_links,
    read_manifest,
    remove_folder,
    remove_leftovers,
    rotate,
)
from megagnn.checkpoint.manifest import FileEntry, Manifest, TensorEntry, parse_manifest
from megagnn.checkpoint.progress import Progress, random_state
from megagnn.config import RunConfig
from megagnn.models.statistics import Statistics
from megagnn.optim.pieces import Piece
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.world import broadcast_object, gather_along

WAIT_SECONDS = 1800.0
"""That the main rank waits for the others' files: as long as the slowest disk may take."""
_GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class _Job:
    """One save, as this rank's thread needs it."""

    temporary: Path
    final: Path
    parts: Parts
    config: RunConfig
    statistics: Statistics
    progress: Progress


class _OtherRankError(OSError):
    """Another rank could not write its file."""


class CheckpointStore:
    """Checkpoints in `folder`. All ranks make one and call `save`, `wait` and `newest` together.

    Args:
        keep: newest checkpoints that stay, and the best of each of them.
        asynchronous: `save` returns when what is to be written is copied to host memory.
    """

    def __init__(
        self, folder: Path, context: ParallelContext, keep: int = 2, asynchronous: bool = True
    ) -> None:
        self.folder, self.context, self.keep, self.asynchronous = folder, context, keep, asynchronous
        # of this run: a rank of an earlier one that is not dead yet writes elsewhere
        self.token = broadcast_object(secrets.token_hex(4), context)
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._last_step: int | None = None
        """Step of the last save of this run."""

    def clean(self) -> None:
        """Remove what killed saves left behind; at the beginning of a run."""
        if self.context.is_main:
            remove_leftovers(self.folder)

    def save(
        self, pieces: Sequence[Piece], config: RunConfig, statistics: Statistics, progress: Progress
    ) -> None:
        """Begin to save what the pieces hold now; waits for the save before.

        Of the step that was saved last, tensors are what they were: its manifest alone is replaced.

        Raises:
            OSError: that one failed, on any rank.
        """
        self.wait()
        if progress.step == self._last_step:
            self._say_again(progress)
            return
        self._last_step = progress.step
        parts = self._staged(share_of(pieces, self.context))
        state = random_state(self.context.device)
        parts |= whole_parts({f"random/{self.context.rank}/{name}": value for name, value in state.items()})
        name = folder_name(progress.step)
        temporary = self.folder / f".{name}.{self.token}.tmp"
        job = _Job(temporary, self.folder / name, parts, config, statistics, progress)
        if self.asynchronous:
            self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._run(job)
            self.wait()

    def _say_again(self, progress: Progress) -> None:
        """Another progress, such as a best loss, for the step that was saved last."""
        if self.context.is_main:
            folder = self.folder / folder_name(progress.step)
            path = folder / checkpoint_manifest.NAME
            manifest = parse_manifest(read_manifest(folder), path)
            beside = path.with_name(f".{path.name}.tmp")
            manifest = dataclasses.replace(manifest, progress=progress)
            checkpoint_manifest.write_durably(beside, manifest.text())
            os.replace(beside, path)
            checkpoint_manifest.sync_folder(folder)
            point_links(self.folder, progress)
            rotate(self.folder, self.keep)

    def check(self) -> None:
        """Raises the error with which a save of this rank has failed meanwhile."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Until the save is done and committed on all ranks; raises OSError, on all, if one failed."""
        self._join()
        own, self._error = self._error, None
        for error in gather_along(None if own is None else str(own), self.context, "world"):
            if error is not None:
                self._last_step = None  # it was not written
                raise OSError(error) from own

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits. After an error only for a while, and for no other rank: those may be dead."""
        if kind is None:
            self.wait()
        else:
            self._join(_GRACE_SECONDS)

    def newest(self) -> FolderCheckpoint | None:
        """The newest checkpoint that is whole, the same on all ranks; None where there is none at all.

        Each file is read once, by one of the ranks. Damaged ones are named on stderr and set aside.

        Raises:
            ValueError: none of those that are there is whole.
        """
        damaged: list[tuple[Path, str]] = []
        steps = broadcast_object(checkpoint_steps(self.folder), self.context)
        for step in reversed(steps):
            folder = self.folder / folder_name(step)
            found = self._examine(folder)
            if isinstance(found, FolderCheckpoint):
                if self.context.is_main:
                    _set_aside(damaged, folder)
                    point_links(self.folder, found.progress)  # the run may have been killed before it did
                return found
            damaged.append((folder, found))
        if damaged:
            told = "\n".join(complaint for _, complaint in damaged)
            raise ValueError(
                f"no checkpoint in {self.folder} can be used; start again with --overwrite\n{told}"
            )
        return None

    def _examine(self, folder: Path) -> FolderCheckpoint | str:
        """The checkpoint, or what is wrong with it."""
        text: bytes | str = b""
        if self.context.is_main:
            try:
                text = read_manifest(folder)
            except OSError as error:
                text = f"{folder / checkpoint_manifest.NAME} cannot be read ({error})"
        text = broadcast_object(text, self.context)
        if isinstance(text, str):
            return text
        try:
            manifest = parse_manifest(text, folder / checkpoint_manifest.NAME)
        except ValueError as error:  # the same text on all ranks
            return str(error)
        names = sorted(manifest.files)[self.context.rank :: self.context.world_size]
        own = checkpoint_manifest.complaints(folder, manifest, names)
        found = [line for lines in gather_along(own, self.context, "world") for line in lines]
        return "; ".join(found) if found else FolderCheckpoint(folder, manifest)

    def _staged(self, parts: Parts) -> Parts:
        """Copies in host memory, whose buffers are kept for the next save."""
        if not self.asynchronous:
            return {n: [Part(p.box, p.values.cpu(), p.full_shape) for p in held] for n, held in parts.items()}
        staged: Parts = {}
        on_device = self.context.device.type == "cuda"
        for name, held in parts.items():
            for part in held:
                key = part.box.key(name)
                if key not in self._buffers:
                    self._buffers[key] = torch.empty_like(part.values, device="cpu", pin_memory=on_device)
                self._buffers[key].copy_(part.values, non_blocking=True)
                staged.setdefault(name, []).append(Part(part.box, self._buffers[key], part.full_shape))
        if on_device:
            torch.cuda.synchronize(self.context.device)
        return staged

    def _run(self, job: _Job) -> None:
        marker = job.temporary / f"{self._rank_name(self.context.rank)}.json"
        try:
            job.temporary.mkdir(parents=True, exist_ok=True)
            _leave(marker, _write_rank(job, self._rank_name(self.context.rank)))
            if self.context.is_main:
                self._commit(job)
        except _OtherRankError as error:
            self._error = error
        except Exception as error:  # whatever it is, it is the training thread's to raise
            text = f"checkpoint {job.final} was not written: {self.context}: {error}"
            self._error = OSError(text)
            self._error.__cause__ = error
            _leave_word(marker, text)

    def _commit(self, job: _Job) -> None:
        tensors: dict[str, TensorEntry] = {}
        files: dict[str, FileEntry] = {}
        for name, marker in self._markers(job.temporary).items():
            for tensor, (dtype, shape) in marker["tensors"].items():
                tensors[tensor] = TensorEntry(getattr(torch, dtype), tuple(shape))
            entry = marker["file"]
            files[f"{name}.safetensors"] = FileEntry(entry["size"], entry["sha256"], tuple(entry["boxes"]))
            (job.temporary / f"{name}.json").unlink()
        grid = (self.context.dp_size, self.context.pp_size, self.context.tp_size)
        manifest = Manifest(job.config, job.statistics, job.progress, grid, tensors, files)
        checkpoint_manifest.write_durably(job.temporary / checkpoint_manifest.NAME, manifest.text())
        checkpoint_manifest.sync_folder(job.temporary)
        remove_folder(job.final)
        os.rename(job.temporary, job.final)
        checkpoint_manifest.sync_folder(self.folder)
        point_links(self.folder, job.progress)
        rotate(self.folder, self.keep)

    def _markers(self, folder: Path) -> dict[str, dict[str, Any]]:
        names = [self._rank_name(rank) for rank in range(self.context.world_size)]
        found: dict[str, dict[str, Any]] = {}
        deadline, pause = time.monotonic() + WAIT_SECONDS, 0.002
        while len(found) < len(names):
            for name in names:
                if name not in found and (folder / f"{name}.json").exists():
                    found[name] = json.loads((folder / f"{name}.json").read_text())
                    if "error" in found[name]:
                        raise _OtherRankError(found[name]["error"])
                if (folder / f"{name}.failed").exists():
                    raise _OtherRankError(
                        f"checkpoint files of {name} in {folder} were not written; {name} says why"
                    )
            if len(found) < len(names):
                if time.monotonic() > deadline:
                    missing = [name for name in names if name not in found]
                    raise TimeoutError(
                        f"{len(missing)} of the ranks have not written their files within {WAIT_SECONDS:g} "
                        f"s, {missing[0]} among them; is {self.folder} on a disk that all ranks see?"
                    )
                time.sleep(pause)
                pause = min(1.5 * pause, 0.5)
        return {name: found[name] for name in names}

    def _join(self, seconds: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(seconds)
            self._thread = None

    @staticmethod
    def _rank_name(rank: int) -> str:
        return f"rank-{rank:05d}"


def save_parts(path: Path, parts: Parts) -> None:
    """Write a rank's parts to a file, each box under its name."""
    named = {part.box.key(name): part.values for name, held in parts.items() for part in held}
    checkpoint_manifest.write_tensors(path, {k: t.detach().cpu().contiguous() for k, t in named.items()})


def _write_rank(job: _Job, name: str) -> dict[str, Any]:
    path = job.temporary / f"{name}.safetensors"
    save_parts(path, job.parts)
    boxes = tuple(part.box.key(tensor) for tensor, parts in job.parts.items() for part in parts)
    entry = FileEntry(path.stat().st_size, checkpoint_manifest.sha256_of(path), boxes)
    tensors = {
        tensor: [str(parts[0].values.dtype).removeprefix("torch."), parts[0].full_shape]
        for tensor, parts in job.parts.items()
    }
    return {"file": asdict(entry), "tensors": tensors}


def _leave(marker: Path, content: dict[str, Any]) -> None:
    """Whoever sees a marker sees all of it."""
    beside = marker.with_suffix(".part")
    beside.write_text(json.dumps(content))
    os.replace(beside, marker)


def _leave_word(marker: Path, text: str) -> None:
    """Tells of a failure, so that no rank waits; on a full disk by a name, which takes no room."""
    data = marker.with_suffix(".safetensors")
    with contextlib.suppress(OSError):
        if data.exists():
            os.truncate(data, 0)
        _leave(marker, {"error": text})
        return
    for present in (data, marker.with_suffix(".part")):
        with contextlib.suppress(OSError):
            os.replace(present, marker.with_suffix(".failed"))
            return


def _set_aside(damaged: list[tuple[Path, str]], used: Path) -> None:
    for folder, complaint in damaged:
        aside = folder.with_name(f"{folder.name}.damaged")
        print(f"warning: {complaint}; it is now {aside.name}, using {used} instead", file=sys.stderr)
        remove_folder(aside)
        os.rename(folder, aside)
