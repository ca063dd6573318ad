"""Memory of a rank and time of a step: ZeRO stages of ours beside PyTorch's sharding, on the same model.

    python -m tools.bench.sharded --ranks 2 4 --width 1024 --layers 8
    python -m tools.bench.sharded --rule muon --ranks 2 4 --tensor 2 --width 512 --layers 8 --dtypes float32

Starts the ranks on this machine over gloo, every implementation in fresh processes. All train the same EGNN
(direct forces) on the same small batches, and their losses after some steps are compared first. Per rank, the
largest of the ranks:

  tensors   bytes of all storages that tensors of the process hold between two steps, gradients included
  peak      the most that they held since the first step
  resident  how far the process has grown, after the allocator gave back what is free

beside what the arithmetic says (work/state.py): `floor`, where all ranks keep the same, and how much one
whole matrix is, by which a rank may lie above it. AdamW's peers are PyTorch's, and DeepSpeed where it is
installed, with its clipping of gradients, a default, switched off; Muon's are `torch.optim.Muon` for the same
matrices and AdamW for the rest. `--tensor` adds our rows of so many tensor-parallel ranks.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Collection
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from megagnn.models.potential import build_potential
from megagnn.objective.loss import Loss, LossCounts, label_counts
from megagnn.optim.config import OptimConfig
from megagnn.optim.optimizer import make_sharded_optimizer
from megagnn.parallel.config import ParallelConfig
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.spawn import spawn
from tools.bench.work import edge as edge_workload
from tools.bench.work.state import Weights, floor_bytes, one_matrix_bytes

RATE, BETAS, EPS, MOMENTUM = 1e-3, (0.9, 0.999), 1e-8, 0.95
DDP, ZERO_1, FSDP = "torch DDP", "torch DDP, ZeroRedundancyOptimizer", "torch FSDP2"
DEEPSPEED = {"DeepSpeed ZeRO 1": 1, "DeepSpeed ZeRO 3": 3}
OURS = [f"megagnn stage {stage}" for stage in range(4)]
DTYPES = ("float32", "bfloat16")
BUCKET = 25 * 2**20 // 4  # elements: the 25 MiB of torch's DDP, and of ours
STAGE_OF_PEER = {DDP: 0, ZERO_1: 1, FSDP: 3, **DEEPSPEED}


def peers_of(rule: str, dtype: str) -> list[str]:
    """Implementations of a rule beside ours."""
    if rule == "soap":
        return []
    if dtype == "bfloat16":
        return [FSDP]
    return [DDP, FSDP] if rule == "muon" else [DDP, ZERO_1, FSDP, *DEEPSPEED]


def stage_of(name: str) -> int:
    """The ZeRO stage that an implementation is."""
    return OURS.index(name) if name in OURS else STAGE_OF_PEER[name]


class Work:
    """A model, its optimizer, and a step."""

    def __init__(
        self, name: str, rule: str, dtype: str, width: int, layers: int, edges: int, context: ParallelContext
    ):
        self.context, self.name, self.rule = context, name, rule
        batch, cutoff = edge_workload.dense_batch(edges)
        config = edge_workload.model_config(width, "direct", cutoff, layers, update_coordinates=False)
        self.batch, self.loss = batch, Loss(edge_workload.LossConfig(energy="mse", forces="mse"))
        ours = name in OURS
        self.potential = build_potential(
            config,
            edge_workload.statistics(),
            precision=getattr(torch, dtype),
            context=context,
            deferred=ours,
        )
        self.weights = Weights.of(self.potential)
        make = self._ours if ours else self._peer
        self.step: Callable[[], Tensor] = make(dtype)

    def _ours(self, _: str) -> Callable[[], Tensor]:
        parallel = ParallelConfig(zero_stage=stage_of(self.name))
        config = OptimConfig(
            rule=self.rule, learning_rate=RATE, betas=BETAS, eps=EPS, momentum=MOMENTUM, clip_norm=None
        )
        optimizer = make_sharded_optimizer(self.potential.model, config, parallel, self.context)

        def step() -> Tensor:
            optimizer.zero_grad()
            optimizer.reducer.start()
            loss = self._forward(self.potential)
            loss.backward()
            optimizer.reducer.finish()
            optimizer.step()  # without a norm, which the peers do not compute, either
            return loss.detach()

        return step

    def _peer(self, dtype: str) -> Callable[[], Tensor]:
        if self.name in DEEPSPEED:
            return self._deepspeed()
        matrices = {n for n, p in self.potential.named_parameters() if p.matrix_rate is not None}
        model: nn.Module = self.potential
        if self.name == FSDP:
            _fsdp(model, dtype)
        else:
            model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        optimizers = self._optimizers(matrices)

        def step() -> Tensor:
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            # both average over ranks, our loss is a sum over global counts
            loss = self._forward(model)
            (loss * self.context.dp_size).backward()
            for optimizer in optimizers:
                optimizer.step()
            return loss.detach()

        return step

    def _optimizers(self, matrices: Collection[str]) -> list[torch.optim.Optimizer]:
        """PyTorch's, over the potential's parameters as they are by now."""
        named = dict(self.potential.named_parameters())
        if self.name == ZERO_1:
            return [ZeroRedundancyOptimizer(named.values(), torch.optim.AdamW, **ADAMW)]
        if self.rule == "adamw":
            return [torch.optim.AdamW(named.values(), **ADAMW)]
        settings = {"lr": RATE, "momentum": MOMENTUM, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
        return [
            torch.optim.Muon([p for n, p in named.items() if n in matrices], **settings),
            torch.optim.AdamW([p for n, p in named.items() if n not in matrices], **ADAMW),
        ]

    def _deepspeed(self) -> Callable[[], Tensor]:
        engine = _deepspeed(self.potential, DEEPSPEED[self.name], self.context)

        def step() -> Tensor:
            loss = self._forward(engine)
            engine.backward(loss * self.context.dp_size)
            engine.step()
            return loss.detach()

        return step

    def _forward(self, model: nn.Module) -> Tensor:
        counts: LossCounts = label_counts(self.batch, self.context)
        total, _ = self.loss(model(self.batch), self.batch, counts)
        return total


ADAMW: dict[str, Any] = {"lr": RATE, "betas": BETAS, "eps": EPS, "weight_decay": 0.0, "fused": True}


def _fsdp(model: nn.Module, dtype: str) -> None:
    for module in model.modules():  # it wants ordinary parameters, float32 ones, and casts them itself
        for key, value in list(module._parameters.items()):
            if value is not None:
                module._parameters[key] = nn.Parameter(value.data.float())
    policy = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def _deepspeed(model: nn.Module, stage: int, context: ParallelContext) -> Any:
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(context.rank))
    import deepspeed

    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    buckets = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
    zero = {"stage": stage, "overlap_comm": False, **dict.fromkeys(buckets, BUCKET)}
    if stage < 3:
        zero["compute_grad_norm"] = False
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # its default is 1
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


def measure(context: ParallelContext, name: str, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One rank's numbers."""
    from tools.bench.memory.step import peak_of_events

    size = (arguments.width, arguments.layers, arguments.edges)
    small = Work(
        name, arguments.rule, dtype, 64, 2, arguments.edges, context
    )  # libraries, threads, connections
    for _ in range(2):
        small.step()
    del small
    trim = ctypes.CDLL(None).malloc_trim
    trim(0)
    process = psutil.Process()
    before, losses = process.memory_info().rss, []
    work = Work(name, arguments.rule, dtype, *size, context)
    for _ in range(2):
        losses.append(float(work.step()))
    tensors = living_bytes()
    trim(0)
    resident = process.memory_info().rss - before
    peak = tensors + peak_of_events(lambda: losses.append(float(work.step())))
    seconds = []
    for _ in range(arguments.steps):
        dist.barrier()
        start = time.perf_counter()
        losses.append(float(work.step()))
        seconds.append(time.perf_counter() - start)
    total = torch.tensor(losses, dtype=torch.float64) / context.tp_size
    dist.all_reduce(total)
    rule, stage, ours = arguments.rule, stage_of(name), name in OURS
    kept = dtype if ours else "float32"  # FSDP2 keeps float32 shards and no bfloat16 ones
    layout = (context.dp_size, context.tp_size)
    return {
        "implementation": name,
        "dtype": dtype,
        "rule": rule,
        "ranks": context.world_size,
        "tensor": context.tp_size,
        "parameters": work.weights.numel,
        "floor_bytes": floor_bytes(work.weights, rule, stage, kept, *layout),
        "one_matrix_bytes": one_matrix_bytes(work.weights, rule, stage, kept, layout[1]) if ours else 0.0,
        "tensor_bytes": tensors,
        "peak_bytes": peak,
        "resident_bytes": resident,
        "seconds": statistics.median(seconds) if seconds else float("nan"),
        "loss": total.tolist(),
    }


def living_bytes() -> int:
    """Bytes of every storage of a tensor that Python can reach, each counted once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [o for o in gc.get_objects() if isinstance(o, Tensor)]
    storages = [t._local_tensor if hasattr(t, "_local_tensor") else t for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in storages)}.values())


def largest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all ranks."""
    return {k: max(row[k] for row in rows) if k in _LARGEST else v for k, v in rows[0].items()}


_LARGEST = ("tensor_bytes", "peak_bytes", "resident_bytes", "seconds")


def main() -> None:
    """Measure, check, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--edges", type=int, default=400)
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--rule", choices=("adamw", "muon", "soap"), default="adamw")
    parser.add_argument("--tensor", type=int, nargs="+", default=[], help="ours with so many, too")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--only", nargs="+", choices=[*OURS, *STAGE_OF_PEER], default=None)
    parser.add_argument("--json", type=Path, help="also write the records here")
    arguments = parser.parse_args()
    records: list[dict[str, Any]] = []
    for ranks, dtype in product(arguments.ranks, arguments.dtypes):
        peers = peers_of(arguments.rule, dtype)
        names = [name for name in arguments.only or [*OURS, *peers] if name in OURS or name in peers]
        layouts = [(name, 1) for name in names]
        layouts += [
            (name, tp) for tp in arguments.tensor if ranks % tp == 0 for name in names if name in OURS
        ]
        for name, tp in layouts:
            if name in DEEPSPEED and find_spec("deepspeed") is None:
                print(f"{name}: not installed (docs/results/sharding.md)", flush=True)
            else:
                records.append(
                    largest(spawn(ranks, measure, name, dtype, arguments, tp=tp, start_method="fork"))
                )
                print(row_of(records[-1], records), flush=True)
    check(records)
    print(table(records))
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=2) + "\n")


# PyTorch's Muon rounds its products to bfloat16, ours on a CPU does not.
TOLERANCE = {("float32", "adamw"): 1e-3, ("float32", "muon"): 0.02, ("float32", "soap"): 1e-3}
TOLERANCE |= {("bfloat16", rule): 0.1 for rule in ("adamw", "muon", "soap")}


def check(records: list[dict[str, Any]]) -> None:
    """All of a size, type and number of ranks must have trained alike."""
    for row in records:
        first = next(r for r in records if all(r[k] == row[k] for k in ("dtype", "ranks")))
        tolerance = TOLERANCE[row["dtype"], row["rule"]]
        for a, b in zip(row["loss"], first["loss"], strict=True):
            if not abs(a - b) <= tolerance * abs(b):
                raise ValueError(
                    f"{row['implementation']} and {first['implementation']} must train alike, got losses "
                    f"{row['loss']} and {first['loss']}"
                )


HEAD = (
    "| ranks | type | implementation | floor, MB | one matrix, MB | tensors, MB | over the floor | peak, MB "
    "| resident, MB | step, s | of the first |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def row_of(row: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """A line of the table."""
    first = next(r for r in records if all(r[k] == row[k] for k in ("dtype", "ranks")))
    floor, tensor = row["floor_bytes"], f", tp {row['tensor']}" if row["tensor"] > 1 else ""
    sizes = (row[k] / 1e6 for k in ("peak_bytes", "resident_bytes"))
    return (
        f"| {row['ranks']} | {row['dtype']} | {row['implementation']}{tensor} | {floor / 1e6:.0f} "
        f"| {row['one_matrix_bytes'] / 1e6:.1f} | {row['tensor_bytes'] / 1e6:.0f} "
        f"| {row['tensor_bytes'] / floor - 1:+.1%} | "
        + " | ".join(f"{size:.0f}" for size in sizes)
        + f" | {row['seconds']:.2f} | {row['seconds'] / first['seconds']:.2f} |"
    )


def table(records: list[dict[str, Any]]) -> str:
    """Markdown."""
    count = records[0]["parameters"]
    return f"{count:,} parameters, {records[0]['rule']}\n\n{HEAD}\n" + "\n".join(
        row_of(row, records) for row in records
    )


if __name__ == "__main__":
    main()
