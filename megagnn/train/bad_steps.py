"""Steps that must not be taken: a loss or gradient norm that is not finite, or a norm far above the usual.

Every rank looks at what it has, and all ranks take one decision, from the sum of their votes: machines that
round differently must not part ways. The same message, of four numbers, carries the wish to stop
(`train.signals`). The batches of such a step are kept as files, to find their structures again.
"""

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from ase.formula import Formula
from ase.symbols import Symbols
from safetensors.torch import save_file
from torch import Tensor

from megagnn.checkpoint.progress import Progress
from megagnn.config import RunConfig, TrainConfig
from megagnn.data import keys
from megagnn.data.dataset import StructureDataset
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.world import barrier, sum_numbers

WINDOW = 100  # steps of which the median is taken
ENOUGH = 20  # steps before which it says little


@dataclass(frozen=True)
class Judgement:
    """The decision of all ranks about a step."""

    fault: str = ""
    """The fault of the step; empty for a good one."""
    stop: bool = False
    """Whether a signal asked any rank to stop."""


def judge(
    loss: Tensor,
    norm: Tensor,
    recent_norms: Sequence[float],
    spike_factor: float | None,
    wants_to_stop: bool,
    context: ParallelContext,
) -> Judgement:
    """The same on every rank.

    Args:
        loss: this rank's share, a scalar.
        norm: gradient norm of the whole model, a scalar.
        recent_norms: of the good steps before.
        spike_factor: a norm above so many times their median is a fault; None for no limit.
    """
    own, size = float(loss), float(norm)
    has_limit = spike_factor is not None and len(recent_norms) >= ENOUGH
    median = statistics.median(recent_norms) if has_limit else math.inf
    limit = (spike_factor or 1.0) * median
    votes = [wants_to_stop, not math.isfinite(own), not math.isfinite(size), size > limit]
    stop, bad_loss, bad_norm, spike = sum_numbers(votes, context, "world")
    if bad_loss:
        num_bad = math.ceil(bad_loss / (context.pp_size * context.tp_size))
        fault = f"the loss is not finite on {num_bad} of {context.dp_size} data-parallel rank(s)"
    elif bad_norm:
        fault = f"the gradient norm is {size}"
    elif spike:
        fault = (
            f"the gradient norm {size:.4g} is above optim.spike_factor {spike_factor:g} x {median:.4g}, the "
            f"median of {len(recent_norms)} steps"
        )
    else:
        fault = ""
    return Judgement(fault, stop > 0)


def advance(progress: Progress, config: RunConfig, fault: str, norm: Tensor) -> Progress:
    """Progress of the run after a step that was taken, or after a bad one that was left out."""
    recent = progress.recent_norms
    if not fault and config.optim.spike_factor is not None:
        recent = [*recent, float(norm)][-WINDOW:]
    return dataclasses.replace(
        progress,
        step=progress.step + 1,
        step_in_epoch=progress.step_in_epoch + 1,
        recent_norms=recent,
        bad_in_a_row=progress.bad_in_a_row + 1 if fault else 0,
        skipped_steps=progress.skipped_steps + bool(fault),
    )


FORMAT, VERSION = "megagnn-bad-batch", 1
_NUM_SHOWN = 20


def save_bad_batches(
    out_dir: Path,
    fault: str,
    batches: list[dict[str, Tensor]],
    dataset: StructureDataset,
    progress: Progress,
    loss: float,
    norm: float,
    context: ParallelContext,
) -> str:
    """Each data-parallel rank writes its batches, as `step-N-dpK.safetensors`, or `step-N-dpK-J.safetensors`
    where a step takes several. Returns, when all are there, what to look for.

    Each holds the tensors of keys.py; the metadata, as JSON, say why, and of every structure the store and
    its number there.
    """
    folder = out_dir / "bad_batches"
    prefix = f"step-{progress.step}-dp"
    if context.tp_rank == 0 and context.pp_rank == 0:
        for number, batch in enumerate(batches):
            suffix = f"-{number}" if len(batches) > 1 else ""
            content = {
                "version": VERSION,
                "fault": fault,
                "step": progress.step,
                "epoch": progress.epoch,
                "step_in_epoch": progress.step_in_epoch,
                "dp_rank": context.dp_rank,
                "loss": repr(loss),
                "gradient_norm": repr(norm),
                "sources": dataset.sources,
                "levels": dataset.levels,
                "structures": [
                    (str(path), index) for path, index in map(dataset.origin, batch[keys.STRUCTURE].tolist())
                ],
            }
            path = folder / f"{prefix}{context.dp_rank}{suffix}.safetensors"
            _write(path, batch, {FORMAT: json.dumps(content)})
    barrier(context)
    return str(folder / f"{prefix}*.safetensors")


def _write(path: Path, batch: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Beside, then into place: a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(
            {k: value.cpu().clone().contiguous() for k, value in batch.items() if "/" not in k},
            temporary,
            metadata,
        )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def end_of_run(fault: str, progress: Progress, train: TrainConfig, where: str, kept: str) -> str:
    """The message of a run that ends: why, what is kept, and the ways out."""
    if train.on_bad_step == "skip":
        fault += f", after {progress.bad_in_a_row} bad steps in a row (train.max_bad_steps)"
    way_out = (
        ""
        if train.on_bad_step == "skip"
        else ", or continue without such steps by --resume --train.on_bad_step skip"
    )
    return (
        f"{fault} at step {progress.step}; {kept}. Its batches are in {where}: `megagnn inspect FILE` lists "
        f"the structures, the suspicious ones first. Correct bad labels, lower optim.learning_rate or "
        f"optim.clip_norm{way_out}"
    )


def is_bad_batch(path: Path) -> bool:
    """Whether a file is one of `save_bad_batches`; never raises."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return FORMAT in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return False


def load_bad_batch(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(batch, metadata) of a file of `save_bad_batches`."""
    with safetensors.safe_open(path, "pt") as file:
        content: dict[str, Any] = json.loads(file.metadata()[FORMAT])
        return {name: file.get_tensor(name) for name in file.keys()}, content  # noqa: SIM118 (not a dict)


def describe_bad_batch(path: Path) -> str:
    """Readable summary: why, and the structures, those with numbers that are not finite first, then those
    with the largest forces or, without such labels, the closest atoms."""
    batch, content = load_bad_batch(path)
    rows = [_row(batch, content, index) for index in range(len(batch[keys.NUM_ATOMS]))]
    rows.sort(key=lambda row: row[0])
    lines = [
        f"bad batch    {path}",
        f"why          {content['fault']}",
        f"where        step {content['step']} (epoch {content['epoch']}, step {content['step_in_epoch']} "
        f"of it), data-parallel rank {content['dp_rank']}",
        f"numbers      loss of this rank {content['loss']}, gradient norm {content['gradient_norm']}",
        f"holds        {len(rows)} structures, {len(batch[keys.ATOMIC_NUMBERS])} atoms, "
        f"{batch[keys.EDGE_INDEX].shape[1]} edges",
        *(text for _, text in rows[:_NUM_SHOWN]),
    ]
    if len(rows) > _NUM_SHOWN:
        lines.append(f"and {len(rows) - _NUM_SHOWN} more, less suspicious")
    return "\n".join(lines)


def _row(batch: dict[str, Tensor], content: dict[str, Any], index: int) -> tuple[tuple[float, ...], str]:
    """(how suspicious, less is more; a line) of one structure."""
    first, last = batch[keys.GRAPH_PTR][index : index + 2].tolist()
    store, number = content["structures"][index]
    symbols: Formula = Symbols(batch[keys.ATOMIC_NUMBERS][first:last].numpy()).formula
    shortest = _shortest_edge(batch, index)
    words, finite, force = [f"shortest edge {shortest:.3f} Å"], not math.isnan(shortest), -1.0
    if batch[keys.HAS_ENERGY][index]:
        energy = batch[keys.ENERGY][index].item() / (last - first)
        words.append(f"energy {energy:.4f} eV/atom")
        finite &= math.isfinite(energy)
    if batch[keys.HAS_FORCES][index]:
        force = batch[keys.FORCES][first:last].abs().max().item()
        words.append(f"largest force {force:.3f} eV/Å")
        finite &= bool(torch.isfinite(batch[keys.FORCES][first:last]).all())
    if batch[keys.HAS_STRESS][index]:
        stress = batch[keys.STRESS][index].abs().max().item()
        words.append(f"largest stress {stress:.4f} eV/Å^3")
        finite &= math.isfinite(stress)
    name = content["sources"][int(batch[keys.SOURCE][index])]
    flag = "" if finite else "NOT FINITE: "
    text = f"  {flag}{store} structure {number} ({name}, {symbols:metal}): {', '.join(words)}"
    return (finite, -force if math.isfinite(force) else -math.inf, shortest), text


def _shortest_edge(batch: dict[str, Tensor], index: int) -> float:
    """Å; infinite without edges."""
    destination, source = batch[keys.EDGE_INDEX]
    shifts = batch[keys.CELL_SHIFTS]
    own = (batch[keys.BATCH][destination] == index) & ((destination != source) | shifts.any(1))
    cell = batch[keys.CELL][index].double()
    x = batch[keys.POSITIONS].double()
    r_EC = x[source[own]] + shifts[own].double() @ cell - x[destination[own]]
    lengths = r_EC.norm(dim=1)
    return lengths.min().item() if lengths.numel() else math.inf
