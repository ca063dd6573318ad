"""Whether a run may continue from a checkpoint, and what it takes from it."""

import dataclasses
import hashlib
import json
import sys
from typing import Any

import numpy as np

from megagnn.checkpoint.folder import FolderCheckpoint
from megagnn.checkpoint.progress import Progress
from megagnn.config import RunConfig, flat_config
from megagnn.data.dataset import StructureDataset
from megagnn.data.sampler import BudgetSampler
from megagnn.models.statistics import Statistics
from megagnn.optim.pieces import Piece
from megagnn.overrides import Change, change_of
from megagnn.parallel.context import ParallelContext


def check_same_run(
    checkpoint: FolderCheckpoint,
    config: RunConfig,
    statistics: Statistics,
    context: ParallelContext,
    has_forces: bool = True,
) -> None:
    """Refuse to continue another run; warn, on the main rank, of settings that make the result another one.

    has_forces: whether training structures have them; else the output scale follows from references.

    Raises:
        ValueError: a key of class `Change.REFUSED` that differs, or other training data.
    """
    where = f"cannot resume from {checkpoint.path}"
    if checkpoint.progress.dp_size != context.dp_size and context.is_main:
        print(
            f"warning: {checkpoint.path} was trained on {checkpoint.progress.dp_size} data-parallel rank(s), "
            f"this is {context.dp_size}: the run goes on behind the last structure it has seen, but a batch "
            "now holds about as many times more structures, and the result is another one; for the same "
            f"bits, set parallel.data = {checkpoint.progress.dp_size}",
            file=sys.stderr,
        )
    then, now = flat_config(checkpoint.config), flat_config(config)
    changed = _changed(then, now)
    for key in changed:
        if Change.REFUSED in change_of(RunConfig, key):
            raise ValueError(
                f"{where}: {key} was {then.get(key)!r} and is now {now.get(key)!r}; give it the old "
                "value, or start another run in another out_dir"
            )
    then_fitted = checkpoint.statistics
    if config.init_from is not None:
        same = _same_new_data(then_fitted, statistics)
    else:
        same = _same_data(then_fitted, statistics, has_forces)
    if not same:
        raise ValueError(f"{where}: the training data are not those of the run; give it the same data.paths")
    told = [key for key in changed if Change.UNTOLD not in change_of(RunConfig, key)]
    if config.train.num_epochs is not None and "train.num_epochs" not in changed:
        told = [key for key in told if key != "train.num_steps"]  # follows from the epochs
    if told and context.is_main:
        print(f"warning: resumed with other settings than before: {', '.join(told)}", file=sys.stderr)


def judges_anew(checkpoint: FolderCheckpoint, config: RunConfig, judged_by: str) -> str:
    """Why the lowest validation loss so far is no measure for the next ones, in words; empty if it is.

    judged_by: fingerprint of the validation split.
    """
    progress, then, now = checkpoint.progress, flat_config(checkpoint.config), flat_config(config)
    why = [key for key in _changed(then, now) if Change.JUDGED in change_of(RunConfig, key)]
    if progress.validated_on and progress.validated_on != judged_by:
        why.append("the validation split")
    if not why or progress.best_step is None:
        return ""
    return (
        f"validation losses cannot be compared with those before, for {', '.join(why)} changed: the best "
        f"checkpoint is sought anew, and that of step {progress.best_step} stays best until the next "
        "validation"
    )


def known_pieces(
    checkpoint: FolderCheckpoint, pieces: list[Piece], config: RunConfig
) -> tuple[list[Piece], str]:
    """Those that a checkpoint of another update rule has, and what begins anew, in words."""
    before, now = checkpoint.config.optim.rule, config.optim.rule
    if before == now:
        return pieces, ""
    known = [f"{p.kind}/{p.name}" in checkpoint.manifest.tensors for p in pieces]
    anew = sorted({p.kind for p, there in zip(pieces, known, strict=True) if not there})
    kinds = (" and " if len(anew) < 3 else ", ").join(anew)
    told = f"{kinds} of hidden matrices begin{'s' if len(anew) == 1 else ''} anew"
    return (
        [p for p, there in zip(pieces, known, strict=True) if there],
        f"optim.rule was '{before}' and is '{now}' now: {told}; all else goes on",
    )


def fingerprint_of(dataset: StructureDataset) -> str:
    """A hash of a split of some stores: of its structures and their labels, wherever they lie."""
    digest = hashlib.sha256()
    for store in dataset.stores:
        digest.update(json.dumps(sorted(store.header.sha256.items())).encode())
    for column in dataset.origins():
        digest.update(column.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def position_of(progress: Progress, sampler: BudgetSampler) -> Progress:
    """Where a run on the ranks of `sampler` goes on: of the epoch, the same structures are left."""
    if progress.dp_size == sampler.dp_size:
        return progress
    then = sampler.on_ranks(progress.dp_size)
    num_batches = progress.step_in_epoch * sampler.per_step
    done = then.num_structures(progress.epoch, num_batches, progress.first_structure)
    first = progress.first_structure + done
    return dataclasses.replace(progress, dp_size=sampler.dp_size, first_structure=first, step_in_epoch=0)


def _changed(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Keys with another value; a table's entries are keys that one of the two may lack."""
    return [key for key in {**now, **then} if now.get(key) != then.get(key)]


def _same_new_data(then: Statistics, now: Statistics) -> bool:
    """Whether statistics that a checkpoint gave a part of are of the data that `now` was fitted on."""
    if then.sources != now.sources or then.levels != now.levels or then.source_levels != now.source_levels:
        return False
    held = zip(then.source_elements, now.source_elements, strict=True)
    return all(set(b) <= set(a) for a, b in held) and np.allclose(
        then.mean_energy, now.mean_energy, rtol=1e-6, atol=1e-6
    )


def _same_data(then: Statistics, now: Statistics, has_forces: bool) -> bool:
    """Equal but for rounding of the fit; references follow from rules that a resume may change."""
    a, b = dataclasses.asdict(then), dataclasses.asdict(now)
    fitted: tuple[str, ...] = ("mean_energy", "mean_neighbours")
    chosen: tuple[str, ...] = ("references", "shifts", "unspanned")
    if has_forces:
        fitted += ("output_scale",)
    else:
        chosen += ("output_scale",)
    if any(a[key] != b[key] for key in a if key not in fitted + chosen):
        return False
    return all(np.allclose(a[key], b[key], rtol=1e-6, atol=1e-6) for key in fitted)
