"""megagnn itself, as `megagnn train` trains it; options are that command's, the configuration first."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megagnn.calculator import MegaGNNCalculator
from megagnn.launch.context import parallel_context
from megagnn.train.fine_tune import run_config
from megagnn.train.trainer import Trainer
from tools.peers.clock import StepClock
from tools.peers.contract import Result, parser, predict, versions


class TimedTrainer(Trainer):
    """Counts the processor seconds of each epoch's steps with their batches, but not of what follows a step:
    validation and checkpoints."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds: defaultdict[int, float] = defaultdict(float)
        self.steps = StepClock()
        self._step = self.steps.timed(self._step)  # type: ignore[method-assign]

    def _batches(self) -> Iterator[list[dict[str, Tensor]]]:
        self._since = time.process_time()
        yield from super()._batches()

    def _after_step(self, *args: Any) -> bool:
        self.seconds[self.progress.epoch] += time.process_time() - self._since
        stop = super()._after_step(*args)
        self._since = time.process_time()
        return stop


def calculator(folder: Path) -> MegaGNNCalculator:
    """That of a finished training, in float32 as the other programs' are."""
    return MegaGNNCalculator(folder / "run/checkpoints/best.safetensors", dtype="float32")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and predict with the checkpoint of the lowest validation loss."""
    arguments = parser(__doc__)
    arguments.add_argument("config", help="configuration of the run")
    known, options = arguments.parse_known_args(argv)
    options += [
        *("--train.num_epochs", str(known.epochs)),
        *("--train.seed", str(known.seed)),
        *("--train.threads", str(known.threads)),
        *("--out_dir", str(known.out / "run")),
    ]
    config = run_config(known.config, options)
    with parallel_context("cpu", config.train.threads, config.parallel) as context:
        trainer = TimedTrainer(config, context)
        trainer.steps.profiled = known.profile_step
        if stopped_by := trainer.run():
            raise ConnectionAbortedError(f"stopped by {stopped_by}")
    predict(MegaGNNCalculator(trainer.best_path), known.frames, known.out)
    parameters, used = trainer.potential.model.num_parameters(), trainer.seconds.values()
    Result.of(used, trainer.steps, parameters, versions("megagnn", "torch")).save(known.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
