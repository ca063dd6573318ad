"""The command `megagnn train`."""

import argparse
import shutil
import sys
from pathlib import Path

from megagnn.checkpoint.folder import checkpoint_steps
from megagnn.config import RunConfig, flat_config
from megagnn.launch.agreement import launch_identity
from megagnn.launch.context import parallel_context
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.world import barrier, broadcast_object
from megagnn.train.fine_tune import run_config
from megagnn.train.monitor import LINES
from megagnn.train.pretraining import parts_of
from megagnn.train.run_lock import locked
from megagnn.train.trainer import Trainer

# Of a run that a user's Ctrl-C stopped, so that a script does not go on. After SIGTERM and SIGUSR1 it is 0,
# for all is saved: torchrun starts ranks again that fail, and srun kills the ranks that still save.
EXIT_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megagnn train`; what argparse does not know is a configuration override."""
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="configuration of the run")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in out_dir")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run in out_dir, if there is one"
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """`megagnn train CONFIG.toml [--resume | --overwrite] [--section.field value ...]`."""
    config = run_config(arguments.config, overrides, arguments.resume)
    train, chosen = config.train, {"--resume": arguments.resume, "--overwrite": arguments.overwrite}
    fingerprint, out_dir = {**flat_config(config), **chosen}, Path(config.out_dir)
    with (
        parallel_context(train.device, train.threads, config.parallel, fingerprint) as context,
        locked(out_dir, context),
    ):
        launch = Launch(out_dir, context)
        resume, overwrite = (True, False) if launch.again else (arguments.resume, arguments.overwrite)
        parts = parts_of(config)
        begun = [_may_train(part, context, resume, overwrite) for part in parts]
        if resume and not any(begun) and context.is_main:
            print(f"{out_dir} has no checkpoint yet: starting from the beginning", file=sys.stderr)
        stopped_by = ""
        for part, goes_on in list(zip(parts, begun, strict=True))[-1 if begun[-1] else 0 :]:
            stopped_by = stopped_by or _train(part, context, launch, goes_on, overwrite)
    return EXIT_INTERRUPTED if stopped_by == "SIGINT" else 0


def _train(
    config: RunConfig, context: ParallelContext, launch: "Launch", resume: bool, overwrite: bool
) -> str:
    """A run to its end; the signal that ended it earlier, empty for none."""
    # checks data and settings before anything is removed
    trainer = Trainer(config, context, resume=resume)
    if overwrite:
        _remove_earlier_run(Path(config.out_dir), context)
    launch.claim()
    stopped_by = trainer.run()
    if context.is_main and stopped_by:
        print(
            f"stopped by {stopped_by} after step {trainer.progress.step} of "
            f"{trainer.config.train.num_steps}; saved "
            f"{trainer.last_path}. The same command with --resume continues"
        )
    elif context.is_main:
        print(f"best checkpoint: {trainer.best_path}")
        print(f"curves:          tensorboard --logdir {config.out_dir}")
    return stopped_by


class Launch:
    """Whether the command that runs now is the one that began the run in `out_dir`.

    `again` is true where torchrun has started its ranks again: they continue, whatever the arguments say. A
    command that was refused, or failed before it began, has no claim, however often torchrun repeats it.
    """

    def __init__(self, out_dir: Path, context: ParallelContext) -> None:
        self._path = out_dir / "launch.txt"
        self._identity = launch_identity() if context.is_main else ""
        known = self._path.read_text() if self._identity and self._path.is_file() else ""
        self.again = bool(broadcast_object(bool(known) and known == self._identity, context))
        if self.again and context.is_main:
            print("started again by torchrun: continuing", file=sys.stderr)

    def claim(self) -> None:
        if self._identity:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(self._identity)


def _may_train(config: RunConfig, context: ParallelContext, resume: bool, overwrite: bool) -> bool:
    """Whether to resume; ValueError where an earlier run is there that the flags do not provide for."""
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other; give one of them")
    checkpoints = Path(config.out_dir) / "checkpoints"
    has_last, old = bool(checkpoint_steps(checkpoints)), checkpoints / "last.safetensors"
    exists = has_last or old.exists() or (checkpoints / "best.safetensors").exists()
    is_old = old.exists() and not has_last
    exists, has_last, is_old = broadcast_object((exists, has_last, is_old), context)  # should disks differ
    if exists and not (resume or overwrite):
        raise ValueError(
            f"{config.out_dir} holds an earlier run; add --resume to continue it, --overwrite to replace it, "
            "or choose another folder with --out_dir DIR"
        )
    if resume and is_old:
        raise ValueError(
            f"{old} is a single file of an earlier megagnn, from which runs no longer resume; make a "
            f"checkpoint of it by `megagnn import {old} {config.out_dir}`"
        )
    return resume and has_last


def _remove_earlier_run(out_dir: Path, context: ParallelContext) -> None:
    if context.is_main:
        for folder in (out_dir / "checkpoints", out_dir / "tensorboard", out_dir / "bad_batches"):
            if folder.exists():
                shutil.rmtree(folder)
        (out_dir / LINES).unlink(missing_ok=True)
        (out_dir / "metrics.json").unlink(missing_ok=True)
        (out_dir / "parity.png").unlink(missing_ok=True)
    barrier(context)
