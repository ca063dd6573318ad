"""The command `megagnn train`."""

import argparse
import shutil
from pathlib import Path

from megagnn.config import RunConfig, load_config
from megagnn.parallel.collectives import barrier
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.launch import parallel_context
from megagnn.train.trainer import Trainer


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
    with parallel_context(config.train.device, config.train.threads) as context:
        _prepare_out_dir(config, context, arguments.resume, arguments.overwrite)
        Trainer(config, context, resume=arguments.resume).run()
        if context.is_main:
            out_dir = Path(config.out_dir)
            print(f"best checkpoint: {out_dir / 'checkpoints' / 'best.safetensors'}")
            print(f"curves:          tensorboard --logdir {out_dir}")
    return 0


def _prepare_out_dir(config: RunConfig, context: ParallelContext, resume: bool, overwrite: bool) -> None:
    """Refuses to train over an earlier run; with `overwrite` removes what training wrote there, and nothing
    else.
    """
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other; give one of them")
    out_dir = Path(config.out_dir)
    exists = (out_dir / "checkpoints").exists() or (out_dir / "tensorboard").exists()
    barrier(context)  # every rank has looked before the first one changes anything
    if exists and not (resume or overwrite):
        raise ValueError(
            f"{out_dir} holds an earlier run; add --resume to continue it, --overwrite to replace it, or "
            "choose another folder with --out_dir DIR"
        )
    if exists and overwrite and context.is_main:
        shutil.rmtree(out_dir / "checkpoints", ignore_errors=True)
        shutil.rmtree(out_dir / "tensorboard", ignore_errors=True)
        (out_dir / "metrics.json").unlink(missing_ok=True)
    barrier(context)
