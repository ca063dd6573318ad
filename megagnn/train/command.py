"""The command `megagnn train`."""

import argparse
import shutil
import sys
from pathlib import Path

from megagnn.config import RunConfig, flat_config, load_config
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.launch import parallel_context
from megagnn.parallel.world import barrier, broadcast_object
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
    config = load_config(arguments.config, overrides)
    train, chosen = config.train, {"--resume": arguments.resume, "--overwrite": arguments.overwrite}
    fingerprint = {**flat_config(config), **chosen}
    with parallel_context(train.device, train.threads, config.parallel, fingerprint) as context:
        resume = _may_train(config, context, arguments.resume, arguments.overwrite)
        # checks data and settings before anything is removed
        trainer = Trainer(config, context, resume=resume)
        if arguments.overwrite:
            _remove_earlier_run(Path(config.out_dir), context)
        stopped_by = trainer.run()
        if context.is_main and stopped_by:
            print(
                f"stopped by {stopped_by} after step {trainer.progress.step} of {train.num_steps}; saved "
                f"{trainer.last_path}. The same command with --resume continues"
            )
        elif context.is_main:
            print(f"best checkpoint: {trainer.best_path}")
            print(f"curves:          tensorboard --logdir {config.out_dir}")
    return EXIT_INTERRUPTED if stopped_by == "SIGINT" else 0


def _may_train(config: RunConfig, context: ParallelContext, resume: bool, overwrite: bool) -> bool:
    """Whether to resume. With --resume a run without a checkpoint yet starts from the beginning: jobs can be
    chained.

    Raises:
        ValueError: there is an earlier run, and neither --resume nor --overwrite says what to do with it.
    """
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other; give one of them")
    checkpoints = Path(config.out_dir) / "checkpoints"
    has_last = (checkpoints / "last.safetensors").exists()
    exists = has_last or (checkpoints / "best.safetensors").exists()
    exists, has_last = broadcast_object((exists, has_last), context)  # one answer, should disks differ
    if exists and not (resume or overwrite):
        raise ValueError(
            f"{config.out_dir} holds an earlier run; add --resume to continue it, --overwrite to replace it, "
            "or choose another folder with --out_dir DIR"
        )
    if resume and not has_last and context.is_main:
        print(f"{config.out_dir} has no checkpoint yet: starting from the beginning", file=sys.stderr)
    return resume and has_last


def _remove_earlier_run(out_dir: Path, context: ParallelContext) -> None:
    """Remove what an earlier run wrote, and nothing else."""
    if context.is_main:
        for folder in (out_dir / "checkpoints", out_dir / "tensorboard"):
            if folder.exists():
                shutil.rmtree(folder)
        (out_dir / "metrics.json").unlink(missing_ok=True)
        (out_dir / "parity.png").unlink(missing_ok=True)
    barrier(context)
