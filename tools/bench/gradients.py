"""How much of the data-parallel sum of gradients the backward hides.

python -m tools.bench.gradients --width 512 --layers 8 --edges 2000 --bucket_megabytes 4

Ranks over gloo on this machine, a thread each, take the gradients of one EGNN, in random order within a
round: `nothing sent`; `after`, all buckets in `finish`; `during`, buckets as they become ready. What is left
of `after` and `during` when `nothing sent` is taken off is communication that the step waits for; medians
over rounds, in which each ran once. Sums are compared with one plain message before anything is timed.

Ranks that fill all cores leave none to gloo: there messages slow the backward that should hide them. With
--link RATE (MB/s) messages also take as long as on a link of that rate that carries one after the other and
needs no core, as a network card's does; the waiting is emulated, the rest is real.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from megagnn.models.potential import Potential, build_potential
from megagnn.objective.config import LossConfig
from megagnn.objective.gradient_methods import GRADIENT_METHODS
from megagnn.objective.loss import Loss, label_counts
from megagnn.optim.bucket_reducer import GradientReducer
from megagnn.optim.config import OptimConfig
from megagnn.optim.optimizer import make_optimizer
from megagnn.parallel import messages
from megagnn.parallel.context import ParallelContext, grid_context
from tools.bench.work import edge as edge_workload


class Step:
    """The gradients of one model on one batch, and their sum over ranks."""

    def __init__(self, args: argparse.Namespace, context: ParallelContext) -> None:
        self.context = context
        self.batch, cutoff = edge_workload.dense_batch(args.edges, seed=context.dp_rank)
        config = edge_workload.model_config(args.width, args.forces, cutoff)
        config = dataclasses.replace(config, num_layers=args.layers)
        self.potential: Potential = build_potential(config, edge_workload.statistics(), 0, torch.float32)
        self.optimizer = make_optimizer(self.potential, OptimConfig())
        self.reducer = GradientReducer(
            self.potential.parameters(),
            context,
            int(args.bucket_megabytes * 2**20),
            self.optimizer.gradient_buffers(),
        )
        self.loss, self.counts = (
            Loss(LossConfig(energy="mse", forces="mse")),
            label_counts(self.batch, context),
        )

    def backward(self) -> None:
        """Nothing is sent."""
        self.optimizer.zero_grad()
        GRADIENT_METHODS["create_graph"](self.potential, self.batch, self.loss, self.counts)

    def after(self) -> None:
        """Everything is sent when the backward has ended."""
        self.backward()
        self.reducer.finish()

    def during(self) -> None:
        """Buckets are sent as they become ready."""
        self.optimizer.zero_grad()
        self.reducer.start()
        GRADIENT_METHODS["create_graph"](self.potential, self.batch, self.loss, self.counts)
        self.reducer.finish()

    def check(self) -> None:
        """Raises ValueError where buckets give another sum than one message."""
        self.backward()
        want = torch.cat(self.optimizer.gradient_buffers())
        dist.all_reduce(want)
        for work in (self.after, self.during):
            work()
            error = (torch.cat(self.optimizer.gradient_buffers()) - want).abs().max() / want.abs().max()
            if not error < 1e-4:
                raise ValueError(
                    f"{work.__name__}: the sum of gradients is off by {error:.2g} of the largest"
                )

    def timeline(self) -> str:
        """When buckets leave, in one step."""
        left: list[tuple[float, int]] = []
        for bucket in self.reducer.buckets:
            bucket.launch = _recorded(bucket.launch, left, bucket.num_bytes)  # type: ignore[method-assign]
        self.optimizer.zero_grad()
        begin = time.perf_counter()
        self.reducer.start()
        GRADIENT_METHODS["create_graph"](self.potential, self.batch, self.loss, self.counts)
        end = time.perf_counter()
        self.reducer.finish()
        total = sum(size for _, size in left)
        first, window = left[0][0] - begin, end - left[0][0]
        mean = sum(size * max(0.0, end - when) for when, size in left) / total
        return (
            f"{len(left)} buckets, {total / 2**20:.1f} MiB; forward and backward "
            f"{1e3 * (end - begin):.0f} ms; "
            f"the first bucket leaves after {1e3 * first:.0f} ms, {1e3 * window:.0f} ms before the end, "
            f"the average byte {1e3 * mean:.0f} ms before it"
        )


class Link:
    """Messages end no earlier than on a link that carries one after the other."""

    def __init__(self, bytes_per_second: float) -> None:
        self.rate, self.free = bytes_per_second, 0.0
        self.start_all_reduce = messages.start_all_reduce

    def start(self, tensor: Tensor, context: ParallelContext, axis: str) -> messages.Pending:
        """In the place of messages.start_all_reduce."""
        pending = self.start_all_reduce(tensor, context, axis)
        end = self.free = max(self.free, time.perf_counter()) + tensor.nbytes / self.rate

        def finish() -> Tensor:
            result = pending.wait()
            time.sleep(max(0.0, end - time.perf_counter()))
            return result

        return messages.Pending(None, finish)


def _recorded(
    launch: Callable[[ParallelContext], None], left: list[tuple[float, int]], size: int
) -> Callable[[ParallelContext], None]:
    def record(context: ParallelContext) -> None:
        left.append((time.perf_counter(), size))
        launch(context)

    return record


def run(rank: int, args: argparse.Namespace, store: str) -> None:
    """One rank; the first prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", world_size=args.ranks, rank=rank)
    step = Step(args, grid_context(args.ranks, 1, 1))
    step.check()
    if args.link:
        messages.start_all_reduce = Link(args.link * 1e6).start  # type: ignore[assignment]
    works = {"nothing sent": step.backward, "after": step.after, "during": step.during}
    times: dict[str, list[float]] = {name: [] for name in works}
    order = random.Random(0)  # the same on every rank
    for _ in range(args.rounds):
        for name in order.sample(list(works), len(works)):
            dist.barrier()
            begin = time.perf_counter()
            works[name]()
            slowest = torch.tensor(time.perf_counter() - begin)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            times[name].append(slowest.item())
    described = step.timeline()
    if rank == 0:
        report(times, described)
    dist.barrier()
    dist.destroy_process_group()


def report(times: dict[str, list[float]], described: str) -> None:
    """Prints times, and the share of communication that is hidden."""
    print(described)
    for name, seconds in times.items():
        exposed = [t - none for t, none in zip(seconds, times["nothing sent"], strict=True)]
        print(
            f"{name:>12}: {1e3 * statistics.median(seconds):7.1f} ms, "
            f"{1e3 * statistics.median(exposed):+7.1f} ms over nothing sent"
        )
    saved = [a - d for a, d in zip(times["after"], times["during"], strict=True)]
    low, middle, high = (1e3 * q for q in statistics.quantiles(saved, n=4))
    print(f"`during` is shorter than `after` by {middle:.1f} ms (quartiles {low:.1f} to {high:.1f})")


def main() -> None:
    """Parses, starts the ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--forces", choices=("conservative", "direct"), default="conservative")
    parser.add_argument("--edges", type=int, default=2000, help="per rank")
    parser.add_argument("--bucket_megabytes", type=float, default=4.0)
    parser.add_argument("--link", type=float, help="emulated, MB/s of gradients summed")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (args, f"{folder}/rendezvous"), nprocs=args.ranks)


if __name__ == "__main__":
    main()
