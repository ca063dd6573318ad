"""Folders of sharded checkpoints: names, links, what stays and what goes; see [Note: folders]."""

import difflib
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megagnn.checkpoint.boxes import parts_by_name
from megagnn.checkpoint.manifest import NAME, Manifest, complaints, parse_manifest
from megagnn.checkpoint.progress import Progress, set_random_state
from megagnn.checkpoint.reader import load_parts, load_whole
from megagnn.config import RunConfig
from megagnn.models.statistics import Statistics
from megagnn.optim.pieces import Piece
from megagnn.parallel.context import ParallelContext

LINKS = ("last", "best")
_NAMES = ("best", "best.safetensors", "last")
_MAX_NAMES = 2  # in a message
_LONGEST_NAME = 64
_STEP = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.(step-\d{8,}|last|best)\..*\.(tmp|old)")


@dataclass(frozen=True)
class FolderCheckpoint:
    """A sharded checkpoint on the disk, whose manifest is read."""

    path: Path
    manifest: Manifest

    @property
    def config(self) -> RunConfig:
        return self.manifest.config

    @property
    def statistics(self) -> Statistics:
        return self.manifest.statistics

    @property
    def progress(self) -> Progress:
        return self.manifest.progress

    def load(self, pieces: Sequence[Piece]) -> None:
        """Fill pieces of any layout: this rank reads what it needs.

        Raises:
            ValueError: the checkpoint is of another model.
        """
        load_parts(self.path, self.manifest, parts_by_name(pieces))

    def whole(self, kinds: Sequence[str]) -> dict[str, Tensor]:
        """{"KIND/NAME": whole tensor}."""
        names = [name for name in self.manifest.tensors if name.split("/")[0] in kinds]
        return load_whole(self.path, self.manifest, names)

    def whole_tensor(self, name: str) -> Tensor:
        """The whole of one tensor, "KIND/NAME"; raises ValueError if it is not there."""
        if name not in self.manifest.tensors:
            raise ValueError(f"checkpoint {self.path} does not fit the model: missing {name}")
        return load_whole(self.path, self.manifest, [name])[name]

    def restore_random_state(self, context: ParallelContext) -> None:
        """The generators of this process, where it has the place of one that wrote."""
        prefix = f"random/{context.rank}/"
        names = [name for name in self.manifest.tensors if name.startswith(prefix)]
        if self.manifest.grid != (context.dp_size, context.pp_size, context.tp_size) or not names:
            return
        states = load_whole(self.path, self.manifest, names)
        set_random_state({name.removeprefix(prefix): states[name] for name in names}, context.device)


def folder_name(step: int) -> str:
    """step-00001234."""
    return f"step-{step:08d}"


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending."""
    if not folder.is_dir():
        return []
    found = (_STEP.fullmatch(entry.name) for entry in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def read_manifest(folder: Path) -> bytes:
    """The text of a checkpoint's manifest; raises OSError."""
    return (folder / NAME).read_bytes()


def open_folder(folder: Path) -> FolderCheckpoint:
    """Read a checkpoint's manifest and verify all its files.

    Raises:
        ValueError: something is damaged or missing, by name.
    """
    try:
        manifest = parse_manifest(read_manifest(folder), folder / NAME)
    except OSError as error:
        raise ValueError(f"{folder / NAME} cannot be read ({error})") from None
    found = complaints(folder, manifest, manifest.files)
    if found:
        raise ValueError("; ".join(found))
    return FolderCheckpoint(folder, manifest)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed saves and removals left behind."""
    if folder.is_dir():
        for entry in folder.iterdir():
            if _LEFTOVER.fullmatch(entry.name):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a checkpoint: first its name, so that nobody sees half of it."""
    if path.is_dir():
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
        shutil.rmtree(old, ignore_errors=True)


def point_links(folder: Path, progress: Progress) -> None:
    """`last` and `best` to what the newest checkpoint says they are; each changes in one go."""
    for link, step in zip(LINKS, (progress.step, progress.best_step), strict=True):
        if step is None or not (folder / folder_name(step)).is_dir():
            continue
        beside = folder / f".{link}.{os.getpid()}.tmp"
        beside.unlink(missing_ok=True)
        try:
            beside.symlink_to(folder_name(step))
        except OSError:  # a file system without links: a file that says the name
            beside.write_text(folder_name(step) + "\n")
        os.replace(beside, folder / link)


def follow(path: Path) -> Path:
    """The path that a link leads to, or a file in a link's place (`point_links`)."""
    path = path.resolve()
    if path.name in LINKS and path.is_file():
        name = path.read_bytes()[:_LONGEST_NAME].decode(errors="replace").strip()
        return path.with_name(name) if _STEP.fullmatch(name) else path
    return path


def rotate(folder: Path, keep: int) -> None:
    """Remove all checkpoints but the newest `keep` and the best of each of them, so that whichever of them a
    run goes on from finds its best."""
    steps = checkpoint_steps(folder)
    kept = set(steps[-keep:])
    for step in steps[-keep:]:
        path = folder / folder_name(step)
        try:
            kept.add(parse_manifest(read_manifest(path), path / NAME).progress.best_step or step)
        except (OSError, ValueError):
            continue  # damaged: the next run says so
    for step in steps:
        if step not in kept:
            remove_folder(folder / folder_name(step))


def way_out(path: Path) -> str:
    """A hint at checkpoints near a path that is none, as the end of a sentence."""
    found = _near(path)
    if found:
        return f"did you mean {' or '.join(map(str, found[:_MAX_NAMES]))}?"
    return "give a run's checkpoints/best, or a file made by `megagnn export`"


def _near(path: Path) -> list[Path]:
    """Checkpoints in the folder or run of this name, or of the name that is most like it."""
    if path.is_dir():
        return _of_run(path)
    missing, folder = path, path.parent
    while not folder.is_dir() and folder != folder.parent:
        missing, folder = folder, folder.parent
    if folder.name == "checkpoints" or any((folder / name).exists() for name in LINKS):
        known = [name for name in _NAMES if (folder / name).exists()]
        known += [folder_name(step) for step in checkpoint_steps(folder)]
        like = difflib.get_close_matches(missing.name, known, n=_MAX_NAMES)
        return [folder / name for name in like or known]
    of_run = {entry.name: _of_run(entry) for entry in folder.iterdir() if entry.is_dir()}
    like = difflib.get_close_matches(missing.name, [name for name, found in of_run.items() if found], n=1)
    return of_run[like[0]] if like else _of_run(folder)


def _of_run(folder: Path) -> list[Path]:
    """Checkpoints of a run's folder, or of its folder of checkpoints."""
    places = (folder, folder / "checkpoints")
    return [place / name for place in places for name in _NAMES if (place / name).exists()]
