"""Where checkpoints lie near a path that is none, for error messages."""

from __future__ import annotations

import difflib
from pathlib import Path

from megagnn.checkpoint.folder import LINKS, checkpoint_steps, folder_name

NAMES = ("best", "best.safetensors", "last")
MAX_NAMES = 2


def way_out(path: Path) -> str:
    """What to give instead of a path at which there is no checkpoint, as the end of a sentence."""
    found = _near(path)
    if found:
        return f"did you mean {' or '.join(map(str, found[:MAX_NAMES]))}?"
    return "give a run's checkpoints/best, or a file made by `megagnn export`"


def _near(path: Path) -> list[Path]:
    """Checkpoints in the folder or run of this name, or of the name that is most like it."""
    if path.is_dir():
        return _of_run(path)
    missing, folder = path, path.parent
    while not folder.is_dir() and folder != folder.parent:
        missing, folder = folder, folder.parent
    if folder.name == "checkpoints" or any((folder / name).exists() for name in LINKS):
        known = [name for name in NAMES if (folder / name).exists()]
        known += [folder_name(step) for step in checkpoint_steps(folder)]
        like = difflib.get_close_matches(missing.name, known, n=MAX_NAMES)
        return [folder / name for name in like or known]
    of_run = {entry.name: _of_run(entry) for entry in folder.iterdir() if entry.is_dir()}
    like = difflib.get_close_matches(missing.name, [name for name, found in of_run.items() if found], n=1)
    return of_run[like[0]] if like else _of_run(folder)


def _of_run(folder: Path) -> list[Path]:
    """Checkpoints of a run's folder, or of its folder of checkpoints."""
    places = (folder, folder / "checkpoints")
    return [place / name for place in places for name in NAMES if (place / name).exists()]
