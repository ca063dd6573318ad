"""Checkpoints: one safetensors file each, written atomically, checksummed; loading unpickles nothing.

Tensors are named `model/NAME` (weights), `average/NAME` (their moving average) and `optimizer/INDEX/NAME`.
The file's metadata holds, as JSON, the configuration, the statistics of the training split, the progress of
the run and a checksum.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import megagnn
from megagnn.config import RunConfig, config_from_dict, config_to_dict
from megagnn.models.potential import Potential, build_potential
from megagnn.models.precision import Precision, precision_of
from megagnn.models.statistics import Statistics
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import gather_whole, layout_of
from megagnn.tensor_parallel.cost import PlanChoice

FORMAT, VERSION = "megagnn-checkpoint", 1


@dataclass(frozen=True)
class Progress:
    """Where a run stands: with the tensors, all that makes a resumed run the same bits."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Epoch the next step belongs to."""
    step_in_epoch: int = 0
    """Steps of that epoch done."""
    best_loss: float = float("inf")
    """Lowest validation loss so far."""
    average_updates: int = 0
    """Updates of the moving average so far."""
    dp_size: int = 1
    """Data-parallel ranks of the run: with another number, batches would be others."""
    recent_norms: list[float] = field(default_factory=list)
    """Gradient norms of the last good steps, for their median; kept where optim.spike_factor is set."""
    bad_in_a_row: int = 0
    """Bad steps since the last good one."""
    skipped_steps: int = 0
    """Bad steps in all."""


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
        save_file(tensors, temporary, metadata={FORMAT: json.dumps(content)})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises:
        ValueError: not a checkpoint, truncated, or bits differ from what was written.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, not a checkpoint; did you mean {path / 'best.safetensors'} or "
            f"{path / 'checkpoints' / 'best.safetensors'}?"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"checkpoint {path} is truncated or not a safetensors file ({error}); use another "
            "one, such as last.safetensors or best.safetensors beside it"
        ) from None
    if FORMAT not in metadata:
        raise ValueError(
            f"{path} is a safetensors file but not a megagnn checkpoint: its metadata has no '{FORMAT}'"
        )
    try:
        content = json.loads(metadata[FORMAT])
    except json.JSONDecodeError as error:
        raise ValueError(f"checkpoint {path} is damaged: its metadata is not JSON ({error})") from None
    if content["version"] != VERSION:
        raise ValueError(
            f"checkpoint {path} has format version {content['version']}, this megagnn reads version {VERSION}"
        )
    if _checksum(tensors, content) != content["sha256"]:
        raise ValueError(f"checkpoint {path} is damaged: its checksum is not the one it was written with")
    return Checkpoint(
        config_from_dict(content["config"]),
        Statistics.from_dict(content["statistics"]),
        Progress(**content["progress"]),
        tensors,
        path,
    )


def load_potential(
    checkpoint: str | Path | Checkpoint,
    precision: Precision | torch.dtype | None = None,
    average: bool = True,
    context: ParallelContext | None = None,
    plan: PlanChoice = "auto",
) -> Potential:
    """The potential of a checkpoint, with averaged weights unless `average` is false, on any layout.

    precision: another than that of the run; the weights are converted. A moving average of bfloat16 weights
    was kept in float32, so a run in bfloat16 gives float32 more than its own weights say.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint)
    if precision is None:
        train = checkpoint.config.train
        precision = precision_of(train.dtype, train.geometry)
    potential = build_potential(
        checkpoint.config.model, checkpoint.statistics, precision=precision, context=context, plan=plan
    )
    load_weights(potential.model, checkpoint.weights("average" if average else "model"), checkpoint.path)
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


def whole_weights(model: nn.Module, values: dict[str, Tensor], context: ParallelContext) -> dict[str, Tensor]:
    """Slices of a model's parameters, or of anything of their shape, by name, to whole ones on every rank."""
    layouts = {name: layout_of(parameter) for name, parameter in model.named_parameters()}
    return {name: gather_whole(value, layouts[name], context) for name, value in values.items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer, context: ParallelContext) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, whole; all ranks of a tensor-parallel group must call it."""
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    parameters = _parameters(optimizer)
    return {
        f"optimizer/{index}/{name}": gather_whole(value, layout_of(parameters[index]), context)
        if value.shape == parameters[index].shape
        else value
        for index, entry in state.items()
        for name, value in entry.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`, on any layout: each rank takes its slice."""
    state: dict[int, dict[str, Tensor]] = {}
    parameters = _parameters(optimizer)
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/")
            layout = layout_of(parameters[int(index)])
            value = layout.slice_of(value) if value.shape == layout.full_shape else value
            # A copy: optimizers take tensors over, read them in the order of memory, and change them.
            state.setdefault(int(index), {})[name] = value.clone(memory_format=torch.contiguous_format)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _checksum(tensors: dict[str, Tensor], content: dict[str, Any]) -> str:
    """SHA-256 of the rest of the metadata and of every tensor's name, type, shape and bytes."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
