"""The rows of the memory table, and what one rank measures of one row."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from torch.profiler import ProfilerActivity, profile

from megagnn.data.batch import collate
from megagnn.models.potential import build_potential
from megagnn.objective.config import LossConfig
from megagnn.objective.gradient_methods import GRADIENT_METHODS
from megagnn.objective.loss import Loss, label_counts
from megagnn.optim.bucket_reducer import GradientReducer
from megagnn.optim.config import OptimConfig
from megagnn.optim.optimizer import (
    make_optimizer,
    make_sharded_optimizer,
)
from megagnn.optim.zero.optimizer import ShardedOptimizer
from megagnn.parallel.config import ParallelConfig
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import num_parameters
from megagnn.parallel.world import barrier, sum_over_dp
from tools.bench.memory import events as memory
from tools.bench.memory.step import reset_peak, status_bytes
from tools.bench.work import edge as edge_workload

POINTS = 400  # of a timeline, enough for a picture
# AdamW's first steps make rounding large: at so small a rate it does not move the losses that are compared.
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Row:
    """How a model is trained; every other row of a table has the same model, batch and number of ranks."""

    name: str
    unfused: bool = True
    """Every intermediate of the edges is a tensor, as the usual code has it."""
    blocks_again: bool = False
    """The blocks of edges are recomputed in the backward."""
    layers_again: bool = False
    """Of a layer its inputs are kept, and it runs again in the backward."""
    method: str = "create_graph"
    stage: int | None = None
    """Of ZeRO; None is data parallelism with the unsharded optimizer."""
    tp: int = 1
    offload: str = "none"

    @property
    def model(self) -> dict[str, Any]:
        """Settings of the model."""
        return {
            "edge_operation": "unfused" if self.unfused else "fused",
            "edge_memory": "recompute" if self.blocks_again else "save",
            "recompute_layers": self.layers_again,
        }


def table_rows(forces: str) -> list[Row]:
    """The study's three, then what each of ours adds to the one before it, from plain on.

    Direct forces need one derivative, so every method of taking gradients is the same there. Gradients
    through a graph of gradients end at stage 2.
    """
    plain = Row("plain")
    layers = replace(plain, name="plain, layers recomputed", layers_again=True)
    rows = [plain, layers, replace(layers, name="plain, layers recomputed, ZeRO 1", stage=1)]
    last = plain
    steps: list[tuple[str, dict[str, Any]]] = [
        ("+ edges in blocks", {"unfused": False}),
        ("+ blocks recomputed", {"blocks_again": True}),
        ("+ layers recomputed", {"layers_again": True}),
    ]
    one_backward = ("+ one backward", {"method": "one_backward"})
    zero = [(f"+ ZeRO {stage}", {"stage": stage}) for stage in (1, 2, 3)]
    steps += zero if forces == "direct" else [zero[1], one_backward, zero[2]]
    for name, values in [
        *steps,
        ("+ tensor parallel 2", {"tp": 2}),
        ("+ offload to disk", {"offload": "disk"}),
    ]:
        last = replace(last, name=name, **values)
        rows.append(last)
    return rows


@dataclass(frozen=True)
class Size:
    """Of the model and of the batch of all ranks together."""

    width: int
    layers: int
    edges: int
    forces: str
    ranks: int
    """The batch has two structures for each."""
    steps: int
    """That are timed."""
    folder: str = ""
    """For files of state."""
    bucket_megabytes: float = field(default_factory=lambda: ParallelConfig().bucket_megabytes)


class Work:
    """A model, its optimizer, this rank's share of the batch, and a step."""

    def __init__(self, row: Row, size: Size, context: ParallelContext) -> None:
        self.row, self.context = row, context
        graphs, cutoff = edge_workload.dense_graphs(size.edges, num_structures=2 * size.ranks)
        share = len(graphs) // context.dp_size
        self.batch = collate(graphs[share * context.dp_rank : share * (context.dp_rank + 1)])
        self.loss = Loss(LossConfig(energy="mse", forces="mse"))
        sharded = row.stage is not None
        self.potential = build_potential(
            edge_workload.model_config(size.width, size.forces, cutoff, size.layers, **row.model),
            edge_workload.statistics(),
            context=context,
            deferred=sharded,
        )
        self.num_parameters = num_parameters(self.potential)
        self.optimizer: Any
        if sharded:
            self.optimizer = self._sharded(size)
            self.reducer: Any = self.optimizer.reducer
        else:
            self.optimizer = make_optimizer(self.potential, OptimConfig(learning_rate=LEARNING_RATE))
            bucket_bytes = int(size.bucket_megabytes * 2**20)
            self.reducer = GradientReducer(
                self.potential.parameters(), context, bucket_bytes, self.optimizer.gradient_buffers()
            )

    def _sharded(self, size: Size) -> ShardedOptimizer:
        folder = size.folder if self.row.offload == "disk" else None
        optim = OptimConfig(
            learning_rate=LEARNING_RATE,
            offload=self.row.offload,  # type: ignore[arg-type] # checked by pydantic
            offload_dir=folder,
        )
        parallel = ParallelConfig(
            zero_stage=self.row.stage or 0, tensor=self.row.tp, bucket_megabytes=size.bucket_megabytes
        )
        return make_sharded_optimizer(self.potential.model, optim, parallel, self.context)

    def step(self) -> float:
        """One step; returns the loss of the whole batch before it."""
        self.optimizer.zero_grad()
        counts = label_counts(self.batch, self.context)
        self.reducer.start()
        total, _ = GRADIENT_METHODS[self.row.method](self.potential, self.batch, self.loss, counts)
        with memory.phase("messages"):
            self.reducer.finish()
        with memory.phase("optimizer"):
            self.optimizer.clipped_step(self.optimizer.gradient_norm(self.context), None)
        return float(sum_over_dp(total, self.context))

    def kept(self) -> dict[int, str]:
        """{address: category} of the buffers that stay between steps."""
        kinds = {"param": memory.PARAMETERS, "grad": memory.GRADIENTS, "state": memory.STATE}
        return {b.untyped_storage().data_ptr(): kinds[name] for name, b in self.optimizer.kept()}

    @property
    def in_files(self) -> bool:
        """Whether buffers lie in files."""
        return self.row.offload == "disk"


def measure(context: ParallelContext, row: Row, size: Size) -> dict[str, Any]:
    """One rank's numbers of a row: time and resident memory first, then, of a new model, the events."""
    own = replace(size, folder=str(Path(size.folder) / f"rank{context.rank}"))
    small = Work(row, replace(own, width=32, layers=2), context)  # libraries, threads, connections
    for _ in range(2):
        small.step()
    del small
    _trim()
    before = psutil.Process().memory_info().rss
    work = Work(row, own, context)
    losses = [work.step(), work.step()]
    _trim()
    reset_peak()
    losses.append(work.step())
    resident = status_bytes("VmHWM") - before
    seconds, processor = [], []
    for _ in range(size.steps):
        barrier(context)
        start, start_processor = time.perf_counter(), time.process_time()
        losses.append(work.step())
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - start_processor)
    count = work.num_parameters
    del work
    _trim()
    course, again = events_of_step(row, own, context)
    if any(abs(a - b) > 1e-6 * abs(b) for a, b in zip(again, losses, strict=False)):
        raise ValueError(f"{row.name}: the profiled steps must be the first ones, got {again} and {losses}")
    return {
        "row": row.name,
        "parameters": count,
        "peak_bytes": float(course.total.max()),
        "at_peak": course.at_peak(),
        "resident_bytes": resident,
        "seconds": statistics.median(seconds),
        "processor": statistics.median(processor),
        "losses": losses,
        "timeline": course.thinned(POINTS),
    }


def events_of_step(row: Row, size: Size, context: ParallelContext) -> tuple[memory.Timeline, list[float]]:
    """The second step of a new model by the allocator's events, and the losses.

    Raises ValueError where the categories do not add up to what the allocator counts.
    """
    with memory.labelled(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with memory.phase(memory.MADE):
            work = Work(row, size, context)
        with memory.phase(memory.STEP):
            losses = [work.step()]
        pages = memory.FilePages(size.folder) if work.in_files else contextlib.nullcontext()
        barrier(context)
        with pages, memory.phase(memory.STEP):
            losses.append(work.step())
    found, phases = memory.events(profiler)
    course = memory.timeline(found, phases, work.kept())
    _, begin, end = [p for p in phases if p[0] == memory.STEP][-1]
    counted, classified = memory.allocator_bytes(profiler, end), course.total[-1] + course.unseen
    if counted != classified:
        raise ValueError(f"{row.name}: the allocator holds {counted} bytes, the categories {classified}")
    if isinstance(pages, memory.FilePages):
        course = course.with_files([(t - 1e-9 * begin, held) for t, held in pages.samples])
    return course, losses


def _trim() -> None:
    """Gives back what nobody uses, so that what is resident is what is held."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
