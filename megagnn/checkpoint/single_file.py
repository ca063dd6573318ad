"""Checkpoints in memory, whole: read from a folder that a run wrote or from one file, written to one file.

In a single safetensors file tensors are named `model/NAME` (weights), `average/NAME` (their moving average)
and, where it was exported with it, `STATE/NAME` (the optimizer's state: AdamW's are `exp_avg`, `exp_avg_sq`).
The file's metadata holds, as JSON, the configuration, the statistics of the training split, the progress of
the run and a checksum. Loading unpickles nothing.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from torch import Tensor, nn

import megagnn
from megagnn.checkpoint.folder import FolderCheckpoint, follow, open_folder, way_out
from megagnn.checkpoint.manifest import NAME as MANIFEST
from megagnn.checkpoint.manifest import write_tensors
from megagnn.checkpoint.progress import FORMAT, VERSION, Progress
from megagnn.config import RunConfig, config_from_dict, config_to_dict
from megagnn.models.family import PlanChoice
from megagnn.models.potential import Potential, build_potential
from megagnn.models.precision import Precision, precision_of
from megagnn.models.statistics import Statistics
from megagnn.optim.pieces import whole_slice
from megagnn.optim.rules import rule_of
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import layout_of

WEIGHTS = ("model", "average")


def everything(config: RunConfig) -> tuple[str, ...]:
    """Kinds of tensors that a run goes on from: the weights, and the state of its optimizer."""
    return (*WEIGHTS, *rule_of(config.optim.rule).state)


T = TypeVar("T")
_READABLE = (1, 2)  # 1 names the optimizer's state by numbers; the weights are the same


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    config: RunConfig
    statistics: Statistics
    progress: Progress
    tensors: dict[str, Tensor]
    path: Path

    def weights(self, kind: str) -> dict[str, Tensor]:
        """{parameter name: tensor}; `kind` is "model" or "average"."""
        prefix = f"{kind}/"
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}


def save_checkpoint(
    path: Path, config: RunConfig, statistics: Statistics, progress: Progress, tensors: dict[str, Tensor]
) -> None:
    """Write beside `path`, flush to disk, move into place: a reader sees the old file or the new."""
    tensors = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "megagnn": megagnn.__version__,
        "torch": torch.__version__,
        "config": config_to_dict(config),
        "statistics": statistics.to_dict(),
        "progress": asdict(progress),
    }
    content["sha256"] = _checksum(tensors, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_tensors(temporary, tensors, {FORMAT: json.dumps(content)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def open_checkpoint(path: str | Path) -> Checkpoint | FolderCheckpoint:
    """Verify a checkpoint and read what it is of: a file, which is read whole, or a folder, of which ranks
    then read what they need.

    Raises:
        ValueError: not a checkpoint, truncated, or bits differ from what was written.
        FileNotFoundError: no such file.
    """
    path = Path(os.path.expanduser(path))

    def opened(target: Path) -> Checkpoint | FolderCheckpoint:
        if target.is_file():
            return _load_file(path)
        if not target.is_dir():
            raise FileNotFoundError(f"no checkpoint at {path}; {way_out(path)}")
        if not (target / MANIFEST).exists():
            raise ValueError(f"{path} is a folder, not a checkpoint; {way_out(path)}")
        return open_folder(target)

    return _while_it_stays(path, opened)


def load_checkpoint(path: str | Path, optimizer: bool = False) -> Checkpoint:
    """Verify and read a checkpoint: a file, or of a folder all whole weights, with the optimizer's state if
    asked for; raises as `open_checkpoint`."""

    path = Path(os.path.expanduser(path))

    def whole(folder: Path) -> Checkpoint:
        found = open_folder(folder)
        kinds = everything(found.config) if optimizer else WEIGHTS
        return Checkpoint(found.config, found.statistics, found.progress, found.whole(kinds), path)

    opened = open_checkpoint(path)
    return opened if isinstance(opened, Checkpoint) else _while_it_stays(path, whole)


def _while_it_stays(path: Path, read: Callable[[Path], T]) -> T:
    """What is read of a folder; again, if `path` is a link to another by the time that one cannot be read."""
    while True:
        target = follow(path)
        try:
            return read(target)
        except (ValueError, FileNotFoundError):
            if follow(path) == target:
                raise


def _load_file(path: Path) -> Checkpoint:
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"checkpoint {path} is truncated or not a safetensors file ({error}); use another one, such as "
            "last or best beside it"
        ) from None
    if FORMAT not in metadata:
        raise ValueError(
            f"{path} is a safetensors file but not a megagnn checkpoint: its metadata has no '{FORMAT}'"
        )
    try:
        content = json.loads(metadata[FORMAT])
    except json.JSONDecodeError as error:
        raise ValueError(f"checkpoint {path} is damaged: its metadata is not JSON ({error})") from None
    if not isinstance(content, dict) or content.get("sha256") != _checksum(tensors, content):
        raise ValueError(f"checkpoint {path} is damaged: its checksum is not the one it was written with")
    if content["version"] not in _READABLE:
        raise ValueError(
            f"checkpoint {path} has format version {content['version']}, this megagnn reads versions "
            f"{_READABLE}"
        )
    return Checkpoint(
        config_from_dict(content["config"]),
        Statistics.from_dict(content["statistics"]),
        Progress(**content["progress"]),
        tensors,
        path,
    )


def load_potential(
    checkpoint: str | Path | Checkpoint | FolderCheckpoint,
    precision: Precision | torch.dtype | None = None,
    average: bool = True,
    context: ParallelContext | None = None,
    plan: PlanChoice = "auto",
) -> Potential:
    """The potential of a checkpoint, with averaged weights unless `average` is false, on any layout.

    precision: another than that of the run; the weights are converted. A moving average of bfloat16 weights
    was kept in float32, so a run in bfloat16 gives float32 more than its own weights say.
    """
    if not isinstance(checkpoint, Checkpoint | FolderCheckpoint):
        checkpoint = open_checkpoint(checkpoint)
    if precision is None:
        train = checkpoint.config.train
        precision = precision_of(train.dtype, train.geometry)
    potential = build_potential(
        checkpoint.config.model, checkpoint.statistics, precision=precision, context=context, plan=plan
    )
    kind = "average" if average else "model"
    if isinstance(checkpoint, FolderCheckpoint):
        named = potential.model.named_parameters()
        checkpoint.load([whole_slice(name, kind, p, p) for name, p in named])
    else:
        load_weights(potential.model, checkpoint.weights(kind), checkpoint.path)
    return potential


@torch.no_grad()
def load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Copy whole weights into a model, each rank its slice, converting the dtype.

    Raises ValueError if names or shapes differ.
    """
    own = dict(model.named_parameters())
    if own.keys() != weights.keys():
        missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
        raise ValueError(
            f"checkpoint {path} does not fit the model: missing {missing[:3]}, unexpected {extra[:3]}"
        )
    for name, parameter in own.items():
        layout = layout_of(parameter)
        if layout.full_shape != weights[name].shape:
            raise ValueError(
                f"checkpoint {path} does not fit the model: {name} is {tuple(weights[name].shape)}, "
                f"the model has {layout.full_shape}"
            )
        parameter.copy_(layout.slice_of(weights[name]))


def _checksum(tensors: dict[str, Tensor], content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
