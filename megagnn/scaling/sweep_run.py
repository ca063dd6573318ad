"""One run of a sweep: train, or go on where it was killed; measure; append its line of results."""

import dataclasses
import json
import math
import platform
import resource
import time
from pathlib import Path

import torch

import megagnn
from megagnn.checkpoint.folder import checkpoint_steps
from megagnn.checkpoint.single_file import load_potential, open_checkpoint
from megagnn.config import RunConfig, flat_config
from megagnn.data.dataset import StructureDataset
from megagnn.data.store import Store, check_sides
from megagnn.launch.context import parallel_context
from megagnn.models.config import ModelConfig
from megagnn.models.family import step_flops
from megagnn.models.statistics import Statistics
from megagnn.objective.loss import Loss
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.world import barrier, broadcast_object
from megagnn.scaling.laws.record import Error, RunRecord
from megagnn.scaling.records import append_line
from megagnn.scaling.sweep import PlannedRun, Sweep
from megagnn.train.evaluate import evaluate
from megagnn.train.loader import BatchLoader, open_split
from megagnn.train.pretraining import parts_of
from megagnn.train.run_lock import locked
from megagnn.train.trainer import Trainer

# Errors of a source, as metrics.py names them, to losses: name, unit, factor.
_METRICS = {
    "force_mae_mev_per_angstrom": ("force_mae", "eV/Å"),
    "energy_mae_mev_per_atom": ("energy_mae", "eV/atom"),
    "force_rmse_mev_per_angstrom": ("force_rmse", "eV/Å"),
    "energy_rmse_mev_per_atom": ("energy_rmse", "eV/atom"),
    "stress_mae_mev_per_cubic_angstrom": ("stress_mae", "eV/Å^3"),
}


def run_one(sweep: Sweep, run: PlannedRun) -> None:
    """Train a run to its end and append its line, on one process or the ranks of a launcher.

    Raises:
        ValueError: bad data or settings, a group that `evaluate` has on another side than the data of the
            run, a source, level or element there that the run lacks, or another process has this run.
        FloatingPointError: it diverged.
        ConnectionAbortedError: a signal stopped it; it is saved.
    """
    config = run.config
    fingerprint = {**flat_config(config), "sweep": str(sweep.path), "run": run.name}
    layout, train = config.parallel, config.train
    with (
        parallel_context(train.device, train.threads, layout, fingerprint) as context,
        locked(run.out_dir, context, "start another run by --index"),
    ):
        done = broadcast_object(run.name in sweep.finished() if context.is_main else None, context)
        if done:
            return
        if sweep.evaluate:
            check_sides([Store.open(path) for path in (*config.data.paths, *sweep.evaluate)])
        flops, seconds = 0.0, 0.0
        trainer: Trainer | None = None
        for part in parts_of(config):
            trainer = None  # one at a time in memory
            trainer = _trainer(part, context)
            for split in sweep.splits:  # what the run cannot be judged on is told before it trains
                _evaluated(sweep, run, split, context, trainer.statistics)
            taken = _trained(trainer, context)
            flops, seconds = flops + _flops(trainer), seconds + (math.nan if taken is None else taken)
        assert trainer is not None
        total = None if math.isnan(seconds) else seconds
        record = _measured(sweep, run, trainer, total, flops, context)
        if context.is_main:
            append_line(sweep.results, record.to_json())
        barrier(context)


def _trainer(config: RunConfig, context: ParallelContext) -> Trainer:
    """Of a new run, or of one that goes on."""
    if config.data.num_workers == "auto":  # cores that a run does not use are those of the sweep's other runs
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=0))
    started = bool(checkpoint_steps(Path(config.out_dir) / "checkpoints"))
    resume = broadcast_object(started if context.is_main else None, context)
    return Trainer(config, context, resume=bool(resume))


def _evaluated(
    sweep: Sweep, run: PlannedRun, split: str, context: ParallelContext, statistics: Statistics
) -> StructureDataset:
    """The structures of a split that a run is judged on."""
    data = dataclasses.replace(run.config.data, paths=sweep.evaluate or run.config.data.paths)
    return open_split(data, run.config.model, split, context, statistics)


def _trained(trainer: Trainer, context: ParallelContext) -> float | None:
    """Train to the end. Returns the seconds of the whole training, this process's rate times all steps; None
    where there was nothing left to train and no note of them."""
    first, start = trainer.progress.step, time.perf_counter()
    stopped_by = trainer.run()
    step = trainer.progress.step
    if stopped_by:
        raise ConnectionAbortedError(
            f"stopped by {stopped_by} after step {step} of {trainer.config.train.num_steps}; saved, and the "
            "same command continues"
        )
    notes = trainer.out_dir / "training.json"
    if step > first:
        seconds = (time.perf_counter() - start) * step / (step - first)
        if context.is_main:
            notes.write_text(json.dumps({"seconds": seconds}) + "\n")
        return seconds
    try:  # killed between the last step and the line of results
        return float(json.loads(notes.read_text())["seconds"])
    except (OSError, ValueError, KeyError):
        return None


def _measured(
    sweep: Sweep,
    run: PlannedRun,
    trainer: Trainer,
    seconds: float | None,
    flops: float,
    context: ParallelContext,
) -> RunRecord:
    """The line of results, of the checkpoint with the lowest validation loss."""
    config, model = run.config, run.config.model
    checkpoint = open_checkpoint(trainer.best_path)
    potential = load_potential(checkpoint, context=context).to(context.device)
    losses: dict[str, Error] = {}
    for split in sweep.splits:
        dataset = _evaluated(sweep, run, split, context, checkpoint.statistics)
        loader = BatchLoader(dataset, config, context, shuffle=False)
        result = evaluate(potential, loader, context, Loss(config.loss))
        prefix = "" if split == sweep.splits[0] else f"{split}/"
        found = losses_of(result.per_source, result.loss)
        losses |= {prefix + name: value for name, value in found.items()}
    seen = trainer.train.dataset
    versions = {
        "megagnn": megagnn.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return RunRecord(
        run=run.name,
        recipe=run.recipe,
        width=model.width,
        depth=model.num_layers,
        parameters=trainer.potential.model.num_parameters(),
        structures=len(seen),
        atoms=int(seen.num_atoms.sum()),
        seed=config.train.seed,
        learning_rate=config.optim.learning_rate,
        flops=flops,
        steps=trainer.progress.step,
        epochs=_epochs(trainer),
        losses=losses,
        seconds=seconds,
        memory_gib=_peak_memory(context),
        technique=technique(model, config),
        versions={**versions, "settings": run.digest},
    )


def _epochs(trainer: Trainer) -> float:
    """Passes over the data."""
    progress = trainer.progress
    batches = progress.step_in_epoch * trainer.config.optim.accumulate_steps
    seen = trainer.train.sampler.num_structures(progress.epoch, batches, progress.first_structure)
    return progress.epoch + (progress.first_structure + seen) / len(trainer.train.dataset)


def _flops(trainer: Trainer) -> float:
    data = trainer.train.dataset
    return _epochs(trainer) * step_flops(
        trainer.config.model, int(data.num_atoms.sum()), int(data.num_edges.sum())
    )


def losses_of(per_source: dict[str, dict[str, float]], objective: float) -> dict[str, Error]:
    """Errors as means over sources, each source alike, then those of each source where there are several."""
    losses: dict[str, Error] = {}
    for metric, (name, unit) in _METRICS.items():
        found = {source: m[metric] * 1e-3 for source, m in per_source.items() if metric in m}
        if found and all(value > 0 for value in found.values()):
            losses[name] = Error(sum(found.values()) / len(found), unit)
            if len(found) > 1:
                losses |= {f"{source}/{name}": Error(value, unit) for source, value in found.items()}
    losses["objective"] = Error(objective, "objective")
    return losses


def technique(model: ModelConfig, config: RunConfig) -> str:
    """How a run is divided and saves memory and time, in words: `fused edges, save, pipeline 2 (1f1b)`."""
    parts = model.technique()
    if config.train.dtype != "float32":
        parts.append(config.train.dtype)
    if config.parallel.zero_stage:
        parts.append(f"ZeRO {config.parallel.zero_stage}")
    if config.optim.offload != "none":
        parts.append(f"offload to {config.optim.offload}")
    if config.parallel.pipeline > 1:
        parts.append(f"pipeline {config.parallel.pipeline} ({config.schedule})")
    if config.parallel.tensor > 1:
        parts.append(f"tensor {config.parallel.tensor}")
    return ", ".join(parts)


def _peak_memory(context: ParallelContext) -> float:
    if context.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
