"""The training loop."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagnn.checkpoint.export import export_checkpoint
from megagnn.checkpoint.folder import FolderCheckpoint
from megagnn.checkpoint.progress import Progress
from megagnn.checkpoint.writer import CheckpointStore
from megagnn.config import RunConfig, check_patience, config_to_dict, with_num_steps
from megagnn.data import keys
from megagnn.data.dataset import StructureDataset
from megagnn.data.reference_file import for_sources, read_reference_energies
from megagnn.launch.context import device_name
from megagnn.models.family import parameter_names
from megagnn.models.potential import Potential, build_potential
from megagnn.models.precision import precision_of
from megagnn.models.statistics import Statistics, compute_statistics, with_pairs_of
from megagnn.objective.gradient_methods import GRADIENT_METHODS, accumulate
from megagnn.objective.loss import Loss, check_labels, step_counts, weights_are_final
from megagnn.optim.bucket_reducer import GradientReducer
from megagnn.optim.interface import RunOptimizer
from megagnn.optim.optimizer import (
    WeightAverage,
    is_sharded,
    make_optimizer,
    make_sharded_optimizer,
    set_learning_rate,
)
from megagnn.optim.parts import check_parts
from megagnn.optim.pieces import Piece
from megagnn.optim.schedule import learning_rate
from megagnn.optim.zero.optimizer import ShardedAverage
from megagnn.optim.zero.reducer import ShardedReducer
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.world import (
    broadcast_object,
    broadcast_parameters,
    sum_numbers,
    sum_over_dp,
)
from megagnn.pipeline_parallel.pipeline import Pipeline, schedule_for
from megagnn.pipeline_parallel.stage_costs import run_stages
from megagnn.train.bad_steps import advance, end_of_run, judge, save_bad_batches
from megagnn.train.evaluate import evaluate
from megagnn.train.fine_tune import Beginning
from megagnn.train.loader import BatchLoader, open_split
from megagnn.train.metrics import ParityPoints
from megagnn.train.monitor import Monitor
from megagnn.train.resume import check_same_run, fingerprint_of, judges_anew, known_pieces, position_of
from megagnn.train.signals import StopSignals
from megagnn.train.workers import deaths_explained


class Trainer:
    """A run: data, potential, optimizer, and where it stands. `run` trains to the end and leaves checkpoints
    in `out_dir`.

    Raises:
        ValueError: bad data or configuration, or a checkpoint that this run may not continue.
    """

    def __init__(self, config: RunConfig, context: ParallelContext, resume: bool = False) -> None:
        check_patience(config.train)
        self.config, self.context = config, context
        self.out_dir = Path(config.out_dir)
        self.precision = precision_of(config.train.dtype, config.train.geometry)
        self._is_sharded = is_sharded(config.optim, config.parallel, config.train.dtype)
        train_set = open_split(config.data, config.model, "train", context)
        check_labels(train_set.num_labelled(), config.loss, train_set.has_free_forces())
        self.checkpoints = CheckpointStore(
            self.out_dir / "checkpoints",
            context,
            config.train.keep_checkpoints,
            config.train.async_checkpoints,
        )
        checkpoint = self.checkpoints.newest() if resume else None
        self.told: list[str] = []  # what looks wrong in the data, on the main rank
        beginning = Beginning.open(config, context) if checkpoint is None else None
        if found := beginning.checkpoint if beginning is not None else checkpoint:
            train_set.number_levels(found.statistics.levels)
        self.statistics = self._fit_statistics(train_set, checkpoint, beginning)
        valid_set = open_split(config.data, config.model, "valid", context, self.statistics)
        for dataset in (train_set, valid_set):
            dataset.weigh(config.data.source_weights, config.data.config_type_weights)
        self.train = BatchLoader(
            train_set, config, context, shuffle=True, per_step=config.optim.accumulate_steps
        )
        self.valid = BatchLoader(valid_set, config, context, shuffle=False)
        self.told += [*self.train.told(), *self.valid.told()]
        self._make_potential([] if checkpoint is None else checkpoint.progress.stages)
        self._make_optimizer()
        self.loss = Loss(config.loss)
        self.gradient_method = GRADIENT_METHODS[config.train.gradient_method]
        self.progress = Progress(dp_size=context.dp_size, validated_on=fingerprint_of(valid_set))
        self.parity: ParityPoints | None = None  # of the last validation, for the plot at the end
        self.begun_with = ""
        if checkpoint is not None:
            self._take_over(checkpoint)
        elif beginning is not None:
            pieces = self._pieces()
            beginning.fill(pieces, self.statistics)
            self.optimizer.pieces_loaded(num_steps=0)
            self.begun_with = beginning.describe(self.statistics)
            self.told += beginning.warnings(self.statistics, config.optim)
        if config.train.num_epochs is not None:
            steps = self.progress.step + self._steps_left(config.train.num_epochs)
            config = self.config = with_num_steps(config, steps)
        self._timeline_step = min(self.progress.step + config.parallel.timeline_step, config.train.num_steps)

    def _steps_left(self, num_epochs: int) -> int:
        """Steps to the end of so many epochs from where the run stands; planned once, on the main rank."""
        p, left = self.progress, 0
        if self.context.is_main:
            left = self.train.steps_left(num_epochs, p.epoch, p.step_in_epoch, p.first_structure)
        return int(broadcast_object(left, self.context))

    @property
    def last_path(self) -> Path:
        """A link to the last checkpoint, from which a run resumes."""
        return self.out_dir / "checkpoints" / "last"

    @property
    def best_path(self) -> Path:
        """A link to the checkpoint with the lowest validation loss, see `_loss_to_beat`."""
        return self.out_dir / "checkpoints" / "best"

    def _make_potential(self, earlier: list[int]) -> None:
        """The potential, or this rank's stages of it; `earlier` are those of the run that goes on."""
        config, context = self.config, self.context
        settings: dict[str, Any] = {
            "seed": config.train.seed,
            "precision": self.precision,
            "context": context,
            "plan": config.parallel.plan,
            "deferred": self._is_sharded,
        }
        self.pipeline: Pipeline | None = None
        self.potential: Potential
        if context.pp_size > 1:
            num_batches, forces = config.optim.accumulate_steps, config.model.forces
            schedule = schedule_for(config.schedule, forces, context.pp_size, num_batches)
            stages = run_stages(
                config.model,
                config.parallel,
                self.statistics,
                schedule.num_stages,
                context,
                self.train.first_step,
                Loss(config.loss),
                self.precision,
                earlier,
            )
            self.pipeline = Pipeline(config.model, self.statistics, schedule, stages=stages, **settings)
            self.potential = self.pipeline.potential
        else:
            self.potential = build_potential(config.model, self.statistics, **settings)
        self.potential.to(context.device)
        self.train.planner = self.valid.planner = self.potential.model.planner()

    def _make_optimizer(self) -> None:
        """The optimizer, what sums its gradients over ranks, and the moving average."""
        config, model = self.config, self.potential.model
        if config.optim.rates or config.optim.freeze:
            check_parts(config.optim, parameter_names(config.model, self.statistics))
        self.optimizer: RunOptimizer
        self.reducer: GradientReducer | ShardedReducer
        self.average: WeightAverage | ShardedAverage
        if self._is_sharded:
            sharded = make_sharded_optimizer(
                model, config.optim, config.parallel, self.context, config.train.seed
            )
            self.optimizer, self.reducer = sharded, sharded.reducer
            self.average = ShardedAverage(sharded, config.optim.ema_decay)
            return
        broadcast_parameters(self.potential, self.context)
        self.optimizer = make_optimizer(self.potential, config.optim)
        self.reducer = GradientReducer(
            self.potential.parameters(),
            self.context,
            bucket_bytes=int(config.parallel.bucket_megabytes * 2**20),
            flat_buffers=self.optimizer.gradient_buffers(),
        )
        self.average = WeightAverage(model, config.optim.ema_decay)

    def _fit_statistics(
        self,
        train_set: StructureDataset,
        checkpoint: FolderCheckpoint | None,
        beginning: Beginning | None,
    ) -> Statistics:
        """The main rank's, so that machines that round differently agree; a resumed run keeps its own."""
        path = self.config.data.reference_energies
        given = for_sources(read_reference_energies(path), train_set.sources, path) if path else None
        fitted = None
        if beginning is not None:
            given = beginning.references(given, train_set)
        if self.context.is_main:
            baseline = train_set.baseline(given)
            self.told = [*train_set.warnings(), *baseline.told]
            model = self.config.model
            splines = model.pair_splines if beginning is None and checkpoint is None else 0
            fitted = compute_statistics(train_set, baseline, self.told, splines, model.level_embedding)
            if checkpoint is not None:
                fitted = with_pairs_of(checkpoint.statistics, fitted)
            if beginning is not None:
                fitted = beginning.statistics(fitted, given)
        statistics: Statistics = broadcast_object(fitted, self.context)
        if checkpoint is None:
            return statistics
        has_forces = train_set.num_labelled()[keys.FORCES] > 0
        check_same_run(checkpoint, self.config, statistics, self.context, has_forces)
        return checkpoint.statistics

    def run(self) -> str:
        """Train up to `train.num_steps`. Returns the signal that ended the run earlier; empty for none."""
        train = self.config.train
        if self.context.is_main:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            (self.out_dir / "config.json").write_text(
                json.dumps(config_to_dict(self.config), indent=2) + "\n"
            )
        self.checkpoints.clean()
        with (
            Monitor(self.out_dir, train.num_steps, self.progress.step, self.context) as monitor,
            StopSignals(speaks=self.context.is_main) as signals,
            self.checkpoints,
            closing(self.train),
            closing(self.valid),
            deaths_explained(),
        ):
            monitor.say(self._summary())
            if self.begun_with:
                monitor.say(self.begun_with)
            for line in self.told:
                monitor.say(f"warning: {line}")
            monitor.text("config", f"```json\n{json.dumps(config_to_dict(self.config), indent=2)}\n```")
            stop = self.progress.validation_due and self._after_step(False, monitor, signals)
            for batches in () if stop or self._is_done else self._batches():
                stop = self._step(batches, monitor, signals)
                self.checkpoints.check()
                stop = self._after_step(stop, monitor, signals)
                if stop or self._is_done:
                    break
            if stop:
                self.checkpoints.wait()
                return signals.received or "a signal to another rank"
        return ""

    def _after_step(self, stop: bool, monitor: Monitor, signals: StopSignals) -> bool:
        """Validation and checkpoint, where due; whether to stop, the validation left to a resumed run."""
        step, train, best = self.progress.step, self.config.train, False
        self.progress = dataclasses.replace(self.progress, validation_due=False)
        if step % train.validate_every == 0 or self._is_done:
            if not stop:
                best, stop = self._validate(monitor, signals)
            self.progress = dataclasses.replace(self.progress, validation_due=stop)
        done = self._is_done
        if step % train.checkpoint_every == 0 or best or done or stop:
            self._save()
            monitor.restart_clock()
        if done and not stop:
            if step < train.num_steps:
                monitor.say(
                    f"step {step}: the validation loss was lowest at step {self.progress.best_step}, "
                    f"{train.patience} validations ago; this ends the run (train.patience)"
                )
            self._finish(monitor)
        return stop

    @property
    def _is_done(self) -> bool:
        """Whether all steps are done, or so many validations brought nothing that the run ends early."""
        train, progress = self.config.train, self.progress
        unjudged = progress.best_step is None or math.isinf(progress.best_loss)
        if train.patience is None or unjudged or progress.validation_due:
            return progress.step >= train.num_steps
        waited = progress.step // train.validate_every - (progress.best_step or 0) // train.validate_every
        return progress.step >= train.num_steps or waited >= train.patience

    def _batches(self) -> Iterator[list[dict[str, Tensor]]]:
        """This rank's batches of each step from where the run stands, through as many epochs as needed."""
        if self.progress.step >= self.config.train.num_steps:
            return
        p = self.progress
        for epoch, batches in self.train.stream(p.epoch, p.step_in_epoch, p.first_structure):
            if epoch != self.progress.epoch:
                self.progress = dataclasses.replace(
                    self.progress, epoch=epoch, step_in_epoch=0, first_structure=0
                )
            yield batches

    def _step(self, batches: list[dict[str, Tensor]], monitor: Monitor, signals: StopSignals) -> bool:
        """One step; whether to stop after it, the same on every rank."""
        step, optim = self.progress.step, self.config.optim
        rate = learning_rate(step, self.config.train.num_steps, optim)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad()
        counts = step_counts(batches, self.context)
        loss_now = Loss(self.config.loss, step / self.config.train.num_steps)
        if self.pipeline is not None:
            self.pipeline.executor.synchronised = step + 1 == self._timeline_step
            loss, shares = self.pipeline.accumulate(batches, loss_now, counts, self.reducer)
        else:
            loss, shares = accumulate(
                self.gradient_method, self.potential, batches, loss_now, counts, self.reducer
            )
        self.optimizer.clear_frozen_gradients()
        norm = self.optimizer.gradient_norm(self.context)
        recent, stop = self.progress.recent_norms, bool(signals.received)
        found = judge(loss, norm, recent, optim.spike_factor, stop, self.context)
        if found.fault:
            self._leave_out(found.fault, batches, float(loss), float(norm), monitor)
        else:
            self.optimizer.clipped_step(norm, optim.clip_norm)
            self.average.update()
        self.progress = advance(self.progress, self.config, found.fault, norm)
        monitor.step(counts.atoms, counts.edges)
        if (step + 1) % self.config.train.log_every == 0 and not found.fault:
            self._log(loss, shares, norm, rate, monitor)
        if self.pipeline is not None and step + 1 == self._timeline_step:
            self._keep_timeline(self.pipeline, batches, monitor)
        return found.stop

    def _leave_out(
        self, fault: str, batches: list[dict[str, Tensor]], loss: float, norm: float, monitor: Monitor
    ) -> None:
        """Before the optimizer's step, so that no checkpoint holds a NaN; FloatingPointError ends the run."""
        step, train = self.progress.step, self.config.train
        where = save_bad_batches(
            self.out_dir, fault, batches, self.train.dataset, self.progress, loss, norm, self.context
        )
        if train.on_bad_step == "stop" or self.progress.bad_in_a_row >= train.max_bad_steps:
            self.checkpoints.wait()
            kept = f"{self.last_path} is from before" if self.last_path.exists() else "nothing was saved yet"
            raise FloatingPointError(end_of_run(fault, self.progress, train, where, kept))
        monitor.log(step + 1, {"optim/skipped_steps": self.progress.skipped_steps + 1})
        monitor.say(f"step {step} left out: {fault}; its batches are in {where}")

    def _log(
        self, loss: Tensor, shares: dict[str, Tensor], norm: Tensor, rate: float, monitor: Monitor
    ) -> None:
        names = ["loss", *shares]
        reduced = sum_over_dp(torch.stack([loss, *shares.values()]), self.context)
        values: dict[str, float] = dict(zip(names, reduced.tolist(), strict=True))
        scalars = {f"loss/train_{name}" if name != "loss" else "loss/train": v for name, v in values.items()}
        scalars |= {
            "optim/learning_rate": rate,
            "optim/gradient_norm": norm.item(),
            "optim/epoch": self.progress.epoch,
        }
        monitor.log(
            self.progress.step, scalars, {"loss": f"{values['loss']:.4f}", "epoch": str(self.progress.epoch)}
        )
        monitor.log_throughput(self.progress.step)

    def _keep_timeline(self, pipeline: Pipeline, batches: list[dict[str, Tensor]], monitor: Monitor) -> None:
        found, step = pipeline.record(batches), self.progress.step
        if found is not None:
            planned, measured = found.bubbles
            monitor.log(step, {"pipeline/bubble_planned": planned, "pipeline/bubble_measured": measured})
            monitor.figure("pipeline", step, found.figure())
            found.save_trace(self.out_dir / "timeline.json")
        monitor.restart_clock()

    def _validate(self, monitor: Monitor, signals: StopSignals) -> tuple[bool, bool]:
        """Whether the loss is the lowest so far, and whether a signal ended it first; on all ranks."""
        start = time.perf_counter()
        # of every validation where any may be the last
        keeps = self.config.train.patience is not None or self._is_done
        self.parity = ParityPoints(self.potential, self.context) if keeps else None
        with self.average.applied():
            result = evaluate(
                self.potential,
                self.valid,
                self.context,
                self.loss,
                parity=self.parity,
                stop=lambda: sum_numbers([bool(signals.received)], self.context, "world")[0] > 0,
            )
        if not result.complete:
            return False, True
        scalars = {"loss/valid": result.loss}
        for source, metrics in result.per_source.items():
            scalars |= {
                f"error/{name}/{source}": value
                for name, value in metrics.items()
                if name != "num_test" and "baseline" not in name
            }
        monitor.log(self.progress.step, scalars)
        errors = "  ".join(
            f"{source}: " + " ".join(f"{m[k]:.1f} {unit}" for k, unit in _SHORT.items() if k in m)
            for source, m in result.per_source.items()
        )
        seconds = time.perf_counter() - start
        monitor.say(
            f"step {self.progress.step}: validation loss {result.loss:.4f} in {seconds:.1f} s, "
            f"mean absolute errors {errors}"
        )
        monitor.restart_clock()
        # the main rank's verdict, for saving takes all ranks, and machines may round differently
        best: bool = broadcast_object(result.loss < self._loss_to_beat(), self.context)
        if best:
            self.progress = dataclasses.replace(
                self.progress, best_loss=result.loss, best_step=self.progress.step
            )
        return best, False

    def _loss_to_beat(self) -> float:
        """The lowest validation loss so far. Once a step was taken with the loss's final weights, the lowest
        since then: what was trained for other weights alone is no candidate."""
        step, best = self.progress.step, self.progress.best_step or 0
        # the last step before a checkpoint began with one step less
        final_now, final_then = (
            weights_are_final(self.config.loss, max(at - 1, 0) / self.config.train.num_steps)
            for at in (step, best)
        )
        return math.inf if final_now and not final_then else self.progress.best_loss

    def _finish(self, monitor: Monitor) -> None:
        """The best weights as one file; the parity plot of the last validation."""
        self.checkpoints.wait()
        if self.context.is_main and self.config.train.export_best and self.best_path.exists():
            out = self.best_path.with_suffix(".safetensors")
            try:
                export_checkpoint(self.best_path, out)
            except (ValueError, OSError) as error:  # the run is done and saved
                monitor.say(f"warning: {out} was not written: {error}")
        if self.parity is not None:
            monitor.figure("validation", self.progress.step, self.parity.figure())

    def _pieces(self) -> list[Piece]:
        return [*self.optimizer.pieces(self.potential.model), *self.average.pieces()]

    def _save(self) -> None:
        progress = dataclasses.replace(
            self.progress,
            average_updates=self.average.num_updates,
            optimizer_steps=self.optimizer.num_steps,
            stages=self._stage_sizes(),
        )
        self.checkpoints.save(self._pieces(), self.config, self.statistics, progress)

    def _take_over(self, checkpoint: FolderCheckpoint) -> None:
        pieces, begins_anew = known_pieces(checkpoint, self._pieces(), self.config)
        if begins_anew and self.context.is_main:
            print(f"warning: {begins_anew}", file=sys.stderr)
        checkpoint.load(pieces)
        self.optimizer.pieces_loaded(checkpoint.progress.optimizer_steps)
        self.average.num_updates = checkpoint.progress.average_updates
        checkpoint.restore_random_state(self.context)
        progress = position_of(checkpoint.progress, self.train.sampler)
        judged_by = fingerprint_of(self.valid.dataset)
        if why := judges_anew(checkpoint, self.config, judged_by):
            progress = dataclasses.replace(progress, best_loss=float("inf"))
            if self.context.is_main:
                print(f"warning: {why}", file=sys.stderr)
        self.progress = dataclasses.replace(progress, validated_on=judged_by)

    def _stage_sizes(self) -> list[int]:
        return [] if self.pipeline is None else [len(stage.layers) for stage in self.pipeline.stages]

    def _summary(self) -> str:
        own, threads = self.potential.model.num_parameters(), torch.get_num_threads()
        num = int(sum_numbers([own], self.context, "pp")[0])
        sizes = " + ".join(map(str, self._stage_sizes()))
        stages = f", stages of {sizes} layers" if sizes else ""
        return (
            f"{num:,} parameters on {self.context.grid}, {device_name(self.context.device)}, "
            f"{threads} thread(s) each{stages}; "
            f"{len(self.train.dataset):,} training and {len(self.valid.dataset):,} validation structures of "
            f"{', '.join(self.statistics.sources)}; "
            f"steps {self.progress.step} to {self.config.train.num_steps}"
        )


_SHORT = {
    "energy_mae_mev_per_atom": "meV/atom",
    "force_mae_mev_per_angstrom": "meV/Å",
    "stress_mae_mev_per_cubic_angstrom": "meV/Å^3",
}
