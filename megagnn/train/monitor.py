"""What a run shows: a progress bar and TensorBoard on the main rank, nothing on the others."""

import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megagnn.parallel.context import ParallelContext


class Monitor:
    """Progress bar with rate and time left, and TensorBoard scalars in `out_dir/tensorboard`. Use as a
    context manager.

    Args:
        out_dir: folder of the run.
        num_steps: steps of the whole run.
        start_step: steps done before; a resumed run purges what TensorBoard has of later steps.
    """

    def __init__(self, out_dir: Path, num_steps: int, start_step: int, context: ParallelContext) -> None:
        self.context = context
        self.writer: SummaryWriter | None = None
        self.bar: tqdm | None = None
        if context.is_main:
            purge = start_step + 1 if start_step else None
            self.writer = SummaryWriter(str(out_dir / "tensorboard"), purge_step=purge)
            # a bar redraws on a terminal; in a log file one line every ten seconds is enough
            interval = 0.5 if sys.stderr.isatty() else 10.0
            self.bar = tqdm(
                total=num_steps,
                initial=start_step,
                desc="train",
                unit="step",
                mininterval=interval,
                maxinterval=interval,
                dynamic_ncols=True,
            )
        self._atoms = self._edges = 0.0
        self._since = time.perf_counter()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.writer is not None:
            self.writer.close()

    def step(self, atoms: float, edges: float) -> None:
        """Count one step over `atoms` and `edges` of all ranks."""
        self._atoms, self._edges = self._atoms + atoms, self._edges + edges
        if self.bar is not None:
            self.bar.update()

    def log(self, step: int, scalars: Mapping[str, float], show: Mapping[str, str] | None = None) -> None:
        """Write scalars at a step; `show` goes behind the progress bar."""
        if self.writer is not None:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
        if self.bar is not None and show:
            self.bar.set_postfix(show, refresh=False)

    def log_throughput(self, step: int) -> None:
        """Atoms and edges per second since the last call, and peak memory of this rank."""
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        self.log(
            step,
            {
                "speed/atoms_per_second": self._atoms / seconds,
                "speed/edges_per_second": self._edges / seconds,
                "memory/peak_resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                **(
                    {"memory/peak_gpu_gib": torch.cuda.max_memory_allocated() / 2**30}
                    if self.context.device.type == "cuda"
                    else {}
                ),
            },
        )
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave the time since the last call out of the throughput (validation, checkpoints)."""
        self._atoms = self._edges = 0.0
        self._since = time.perf_counter()

    def say(self, text: str) -> None:
        """Print a line above the bar, on the main rank."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)

    def figure(self, name: str, step: int, figure: Any) -> None:
        """A matplotlib figure in TensorBoard."""
        if self.writer is not None:
            self.writer.add_figure(name, figure, step)

    def text(self, name: str, text: str) -> None:
        """A text page in TensorBoard."""
        if self.writer is not None:
            self.writer.add_text(name, text)
