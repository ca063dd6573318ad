"""MACE, trained by its own command `mace_run_train`; for an environment that has mace-torch.

Options are those of that command, and --final-rate R: the rate then falls exponentially from its first value
to R times that in the last epoch, instead of MACE's default, which waits for a plateau.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import torch
from mace.calculators import MACECalculator
from mace.cli import run_train
from mace.tools import build_default_arg_parser

from tools.peers.clock import Clock, StepClock
from tools.peers.contract import Result, parser, predict, versions


def calculator(folder: Path) -> MACECalculator:
    """That of a finished training, in float32; of stage two where there is one."""
    files = [folder / f"mace{stage}.model" for stage in ("_stagetwo", "")]
    model = next(file for file in files if file.exists())
    return MACECalculator(model_paths=[str(model)], device="cpu", default_dtype="float32")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and predict with the model that MACE leaves behind: that of stage two where there is one."""
    arguments = parser(__doc__)
    arguments.add_argument("--final-rate", type=float, help="last learning rate by the first")
    known, options = arguments.parse_known_args(argv)
    torch.set_num_threads(known.threads)
    if known.final_rate is not None:
        gamma = known.final_rate ** (1 / max(known.epochs - 1, 1))
        options += ["--scheduler=ExponentialLR", f"--lr_scheduler_gamma={gamma}"]
    options += [
        "--name=mace",
        f"--train_file={known.frames / 'train.xyz'}",
        f"--valid_file={known.frames / 'valid.xyz'}",
        f"--work_dir={known.out}",
        f"--max_num_epochs={known.epochs}",
        f"--seed={known.seed}",
        "--plot=False",
    ]
    clock, steps, loop = Clock(), StepClock(), importlib.import_module("mace.tools.train")
    loop.train_one_epoch = clock.timed(loop.train_one_epoch)
    steps.profiled = known.profile_step
    loop.take_step = steps.timed(loop.take_step)
    run_train.run(build_default_arg_parser().parse_args(options))
    trained = calculator(known.out)
    predict(trained, known.frames, known.out)
    parameters = sum(p.numel() for p in trained.models[0].parameters())
    Result.of(clock.seconds, steps, parameters, versions("mace-torch", "e3nn", "torch")).save(known.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
