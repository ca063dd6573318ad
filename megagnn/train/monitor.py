"""Progress of a run, shown by its main rank: a progress bar, TensorBoard and lines of JSON."""

import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megagnn.parallel.context import ParallelContext

LINES = "metrics.jsonl"
"""One JSON object for each time that numbers are logged: the step, seconds since the run began or went on,
and the numbers by their names in TensorBoard; null for a number that is not finite."""


class Monitor:
    """Progress bar with rate and time left, TensorBoard scalars in `out_dir/tensorboard`, and the same
    numbers as lines of JSON in `out_dir/metrics.jsonl`. Use as a context manager.

    Args:
        out_dir: folder of the run.
        num_steps: steps of the whole run.
        start_step: steps done before; a resumed run purges what TensorBoard and the lines have of later
            steps.
    """

    def __init__(self, out_dir: Path, num_steps: int, start_step: int, context: ParallelContext) -> None:
        self.context = context
        self.writer: SummaryWriter | None = None
        self.bar: tqdm | None = None
        self._lines: IO[str] | None = None
        if context.is_main:
            self._lines = _open_lines(out_dir / LINES, start_step)
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
        self._atoms = self._edges = self._processor_seconds = self._processor_since = 0.0
        self._begin = time.perf_counter()
        self.restart_clock()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.writer is not None:
            self.writer.close()
        if self._lines is not None:
            self._lines.close()

    def step(self, atoms: float, edges: float) -> None:
        """Count one step over `atoms` and `edges` of all ranks."""
        self._atoms, self._edges = self._atoms + atoms, self._edges + edges
        now = time.process_time()
        self._processor_seconds += now - self._processor_since
        self._processor_since = now
        if self.bar is not None:
            self.bar.update()

    def log(self, step: int, scalars: Mapping[str, float], show: Mapping[str, str] | None = None) -> None:
        """Write scalars at a step; `show` goes behind the progress bar."""
        if self.writer is not None:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
        if self._lines is not None:
            finite = {k: v if math.isfinite(v) else None for k, v in scalars.items()}
            line = {"step": step, "seconds": round(time.perf_counter() - self._begin, 3), **finite}
            self._lines.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._lines.flush()
        if self.bar is not None and show:
            self.bar.set_postfix(show, refresh=False)

    def log_throughput(self, step: int) -> None:
        """Atoms and edges per second since the last call; this rank's peak memory, and the processor time of
        its training steps since the run began or went on."""
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        self.log(
            step,
            {
                "speed/atoms_per_second": self._atoms / seconds,
                "speed/edges_per_second": self._edges / seconds,
                "speed/processor_seconds": self._processor_seconds,
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
        self._since, self._processor_since = time.perf_counter(), time.process_time()

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)

    def figure(self, name: str, step: int, figure: Any) -> None:
        if self.writer is not None:
            self.writer.add_figure(name, figure, step)

    def text(self, name: str, text: str) -> None:
        if self.writer is not None:
            self.writer.add_text(name, text)


def _open_lines(path: Path, start_step: int) -> IO[str]:
    """The file of lines, to be written on: without those of later steps, and none in a run that begins."""
    kept = []
    if start_step and path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= start_step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # cut short when a run was killed
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text("".join(kept), encoding="utf-8")
    beside.replace(path)
    return path.open("a", encoding="utf-8")
