"""The manifest of a sharded checkpoint: what it is of, which files it has, and which part of which tensor
lies in which of them.

[Note: folders] A checkpoint is a folder `step-00001234` of one safetensors file per rank and `manifest.json`.
It is written as `.step-00001234.TOKEN.tmp` and renamed when all is on the disk: the name is the commit, and
whatever has that name is whole. The manifest holds the size and the SHA-256 of every file, and ends in the
SHA-256 of its own text: a bit that changes anywhere is seen. No part of it is a pickle.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import megagnn
from megagnn.checkpoint.boxes import Box, parse_key
from megagnn.checkpoint.progress import FORMAT, VERSION, Progress
from megagnn.config import RunConfig, config_from_dict, config_to_dict
from megagnn.models.statistics import Statistics

NAME = "manifest.json"
_SEAL = ',\n "sha256": "{}"\n}}\n'
_READ_BYTES = 2**22


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint."""

    size: int
    """Bytes."""
    sha256: str
    boxes: tuple[str, ...]
    """Names of its tensors, see `Box.key`."""


@dataclass(frozen=True)
class TensorEntry:
    """A whole tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """The content of a checkpoint's manifest."""

    config: RunConfig
    statistics: Statistics
    progress: Progress
    grid: tuple[int, int, int]
    """Data-parallel, pipeline and tensor-parallel ranks that wrote it."""
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]

    def text(self) -> str:
        content = {
            "format": FORMAT,
            "version": VERSION,
            "megagnn": megagnn.__version__,
            "torch": torch.__version__,
            "config": config_to_dict(self.config),
            "statistics": self.statistics.to_dict(),
            "progress": asdict(self.progress),
            "grid": self.grid,
            "tensors": {n: [str(t.dtype).removeprefix("torch."), t.shape] for n, t in self.tensors.items()},
            "files": {name: asdict(entry) for name, entry in self.files.items()},
        }
        body = json.dumps(content, indent=1).removesuffix("\n}")
        return body + _SEAL.format(hashlib.sha256(body.encode()).hexdigest())

    def boxes(self) -> Iterable[tuple[str, Box, str, str]]:
        """(tensor, box, file, the box's name in it) of all files."""
        for file, entry in self.files.items():
            for key in entry.boxes:
                yield (*parse_key(key), file, key)


def parse_manifest(text: bytes, where: Path) -> Manifest:
    """The manifest of the text of a file.

    Raises:
        ValueError: any byte of it differs from what was written, or another version wrote it.
    """
    length = len(_SEAL.format("0" * 64))
    body, seal = text[:-length], text[-length:]
    if seal != _SEAL.format(hashlib.sha256(body).hexdigest()).encode():
        raise ValueError(f"{where} is damaged or truncated: its checksum is not that of its text")
    content: dict[str, Any] = json.loads(text)
    if content["format"] != FORMAT or content["version"] != VERSION:
        raise ValueError(
            f"{where} is of format {content['format']} version {content['version']}, this megagnn reads "
            f"{FORMAT} version {VERSION}"
        )
    tensors = {n: TensorEntry(getattr(torch, d), tuple(s)) for n, (d, s) in content["tensors"].items()}
    files = {n: FileEntry(e["size"], e["sha256"], tuple(e["boxes"])) for n, e in content["files"].items()}
    dp, pp, tp = content["grid"]
    return Manifest(
        config_from_dict(content["config"]),
        Statistics.from_dict(content["statistics"]),
        Progress(**content["progress"]),
        (dp, pp, tp),
        tensors,
        files,
    )


def complaints(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Errors of these files, by name; empty if they are what was written."""
    found = []
    for name in names:
        entry, path = manifest.files[name], folder / name
        try:
            size = path.stat().st_size
            if size != entry.size:
                word = "truncated" if size < entry.size else "damaged"
                found.append(f"{path} is {word}: it has {size} bytes, the manifest says {entry.size}")
            elif sha256_of(path) != entry.sha256:
                found.append(f"{path} is damaged: its SHA-256 is not the one of the manifest")
        except FileNotFoundError:
            found.append(f"{path} is missing")
        except OSError as error:
            found.append(f"{path} cannot be read ({error})")
    return found


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file and wait until it is on the disk; raises OSError."""
    path.touch()
    mode = path.stat().st_mode  # others may read what the umask lets them, which safetensors does not
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # its own word for what the system refused, such as a full disk
        raise OSError(f"{path} cannot be written ({error}); is there room on the disk?") from None
    os.chmod(path, mode)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_durably(path: Path, text: str) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until names made or changed in a folder are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
