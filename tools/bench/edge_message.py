"""Whole EGNN training steps, and one layer of it: megagnn against the same function written by others.

A step is forward, loss on energies and forces, backward and AdamW on a batch of liquid-like metal with 30
neighbours an atom; three layers, float32. Our models step by the AdamW that comes with them, the peers by
torch's fused one. The peers (`peers`) concatenate both atoms and the distance: in plain PyTorch with the
faster of index_add and torch_scatter, and as a `MessagePassing` of torch_geometric. They have the same
weights; every loss and gradient is compared before anything is timed. Conservative steps of ours take one
backward, and those named so `create_graph`, as the peers do.

    python -m tools.bench.edge_message --threads 2 --json edge_message.json --plot edge_message.png
    python -m tools.bench.edge_message --forces direct --edges 10000 --widths 64 128 --no-memory

The ceiling is the vendor's matrix product with (F, F), of (E, F) or of blocks that stay in the cache, the
faster one, timed in the same rounds; a share of it is the time in which it would do the products of the
formulation (concatenating, twice as many as ours) over the time of the step. The floor of a step with direct
forces adds to that the evaluations of SiLU that no formulation can leave out, at the rate of our own vector
code on data that stay in the first-level cache, and, where edges are kept (`save`), writing and reading them
once, all timed in the same rounds (docs/kernels.md, The floor). Peak memory is that of tensors above what
lives between steps, measured in a process of its own.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megagnn.data import keys
from megagnn.ops import extension
from tools.bench import harness
from tools.bench.memory.step import peak_memory
from tools.bench.work import edge as workload
from tools.bench.work import layer as layer_workload

EDGES = {"direct": (10_000, 30_000, 100_000), "conservative": (10_000, 40_000)}
WIDTHS = (64, 128, 256, 512)


@dataclass
class StepRecord(harness.Record):
    """A record with the memory of the step and the arithmetic of its formulation.

    flops: products of the step, multiply-adds counted as 2; share_of_ceiling and gflop_per_s refer to them.
    share_of_product: share_of_ceiling with the product of (E, F) alone as the ceiling.
    share_of_floor: the same with the time of the rest of the floor added to that of the products.
    speed_up: for each peer, its time over that of this implementation, the median over the rounds.
    peak_bytes, resident_bytes: see tools/bench/memory/step.py.
    """

    flops: float | None = None
    share_of_product: float | None = None
    share_of_floor: float | None = None
    speed_up: dict[str, float] = field(default_factory=dict)
    peak_bytes: float | None = None
    resident_bytes: float | None = None


@dataclass
class Floor:
    """What a step cannot leave out besides its products.

    evaluations: of SiLU in each of forward and backward.
    kept_bytes: for each implementation that keeps edges for its backward, the bytes written once, read once.
    """

    evaluations: float
    kept_bytes: dict[str, float] = field(default_factory=dict)


def main() -> None:
    """Runs the cases that the arguments ask for."""
    args = harness.parse_args(
        __doc__,
        ("--parts", {"nargs": "+", "choices": ("step", "layer"), "default": ("step", "layer")}),
        ("--forces", {"nargs": "+", "choices": tuple(EDGES), "default": tuple(EDGES)}),
        (
            "--edges",
            {"nargs": "+", "type": int, "help": "default: 10000 30000 100000, conservative 10000 40000"},
        ),
        ("--widths", {"nargs": "+", "type": int, "default": WIDTHS}),
        ("--no-memory", {"action": "store_true", "help": "leaves the memory of the steps out"}),
    )
    records: list[harness.Record] = []
    for forces in args.forces:
        for num_edges in args.edges or EDGES[forces]:
            for width in args.widths:
                if "step" in args.parts:
                    records += step_case(forces, num_edges, width, args)
    if "layer" in args.parts:
        for num_edges in args.edges or EDGES["direct"]:
            for width in args.widths:
                records += layer_case(num_edges, width, args)
    print(summary([record for record in records if isinstance(record, StepRecord)]))
    harness.report(records, args)


def step_case(forces: str, num_edges: int, width: int, args: Any) -> list[harness.Record]:
    """Checks and times one training step of every implementation."""
    batch, cutoff = workload.dense_batch(num_edges)
    config = workload.model_config(width, forces, cutoff)
    names = names_of_implementations(batch, width, forces)
    steps = {name: workload.make_step(name, batch, config) for name in names}
    error = workload.check_equal({name: step for name, step in steps.items() if step})
    num_atoms, exact_edges = len(batch[keys.POSITIONS]), batch[keys.EDGE_INDEX].shape[1]
    shape = {"E": exact_edges, "N": num_atoms, "F": width, "L": workload.DEPTH}
    case = harness.Case(f"{forces} step", shape, "float32", dict(steps))
    flops = {name: workload.step_flops(name, forces, width, num_atoms, exact_edges) for name in names}
    records = timed(case, width, flops, args, workload_floor(forces, width, exact_edges))
    print(f"  losses and gradients equal to {error:.1e} of the largest")
    del steps, case
    gc.collect()
    if not args.no_memory:
        for record in records:
            if record.flops and record.seconds:
                memory = peak_memory(record.impl, forces, num_edges, width, args.threads)
                record.peak_bytes, record.resident_bytes = memory["peak_bytes"], memory["resident_bytes"]
        print(memory_lines(records))
    return list(records)


def layer_case(num_edges: int, width: int, args: Any) -> list[harness.Record]:
    """Checks and times the first layer alone: forward, with backward, and the derivative of its forces."""
    batch, cutoff = workload.dense_batch(num_edges)
    config = workload.model_config(width, "conservative", cutoff)
    names = names_of_implementations(batch, width)
    layers = {name: layer_workload.make_layer(name, batch, config) for name in names}
    num_atoms, exact_edges = len(batch[keys.POSITIONS]), batch[keys.EDGE_INDEX].shape[1]
    shape = {"E": exact_edges, "N": num_atoms, "F": width}
    records: list[harness.Record] = []
    for part in layer_workload.PARTS:
        works = {name: layer.work(part) if layer else None for name, layer in layers.items()}
        expected = next(work for work in works.values() if work)()
        case = harness.Case(f"layer {part}", shape, "float32", works, expected, 1e-4, 1.0)
        flops = {name: layer_workload.flops(name, part, width, num_atoms, exact_edges) for name in names}
        records += timed(case, width, flops, args)
    return records


def summary(records: Sequence[StepRecord]) -> str:
    """The steps of megagnn by forces and width, the worst over the numbers of edges, as Markdown."""
    columns = ("step", "F", "implementation", "over usual", "over torch_geometric")
    columns += ("of products (E, F)", "of the faster product", "of the floor", "memory over least peer's")
    lines = ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    ours = [r for r in records if r.impl.startswith("megagnn") and r.op.endswith("step")]
    for op, width, impl in dict.fromkeys((r.op, r.shape["F"], r.impl) for r in ours):
        mine = [r for r in ours if (r.op, r.shape["F"], r.impl) == (op, width, impl)]
        cells = [op, str(width), impl]
        for peer in ("usual", "torch_geometric"):
            cells.append(worst([x for r in mine for name, x in r.speed_up.items() if name.startswith(peer)]))
        cells.append(worst([r.share_of_product for r in mine if r.share_of_product], ".0%"))
        cells.append(worst([r.share_of_ceiling for r in mine if r.share_of_ceiling], ".0%"))
        cells.append(worst([r.share_of_floor for r in mine if r.share_of_floor], ".0%"))
        cells.append(worst([-memory_share(r, records) for r in mine if r.peak_bytes]).removeprefix("-"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if ours else ""


def worst(numbers: Sequence[float], spec: str = ".2f") -> str:
    """The least of the numbers, or a dash."""
    return format(min(numbers), spec) if numbers else "-"


def memory_share(record: StepRecord, records: Sequence[StepRecord]) -> float:
    """Peak memory over the least that a peer needs for the same step; nan without peers."""
    same = [r for r in records if (r.op, r.shape) == (record.op, record.shape) and is_peer(r)]
    least = min((r.peak_bytes or 0.0 for r in same), default=0.0)
    return (record.peak_bytes or 0.0) / least if least else float("nan")


def names_of_implementations(batch: workload.Batch, width: int, forces: str = "direct") -> list[str]:
    """Ours first, then the peers, without the slower scatter of the usual way."""
    slower = workload.slower_scatter(batch, width)
    return [*workload.our_variants(forces), *(name for name in workload.peer_layers() if name != slower)]


def workload_floor(forces: str, width: int, num_edges: int) -> Floor | None:
    """Of a step with direct forces; the conservative ones differ in what they evaluate and keep."""
    evaluations = workload.step_evaluations(forces, width, num_edges)
    kept = 2.0 * workload.DEPTH * num_edges * width * 4  # c and g of each layer, in float32
    return Floor(evaluations, {"megagnn save": kept}) if evaluations else None


def timed(
    case: harness.Case, width: int, flops: dict[str, float], args: Any, floor: Floor | None = None
) -> list[StepRecord]:
    """Times the case beside the matrix product of its edges, prints it, and fills in the arithmetic.

    Without a floor, or without the compiled kernels, no share of it is given.
    """
    floor = floor if extension.has_cpu else None
    ceilings = [harness.product_ceiling(case.shape["E"], width), cached_ceiling(case.shape["E"], width)]
    others = floor_ceilings(floor) if floor else []
    case.ceilings = [*ceilings, *others]
    records = [StepRecord(**vars(record)) for record in harness.compare(case, args)]
    rounds = {record.impl: record.round_seconds for record in records if record.note == "ceiling"}
    large, cached = ([t / c.num_flops for t in rounds[c.name]] for c in ceilings)
    fastest = [min(both) for both in zip(large, cached, strict=True)]
    for record in records:
        if record.seconds is None or record.note == "ceiling":
            continue
        record.flops = flops[record.impl]
        record.share_of_ceiling = share(record.flops, fastest, record)
        record.share_of_product = share(record.flops, large, record)
        if floor:
            rest = rest_of_floor(floor, record.impl, others, rounds)
            floors = [record.flops * f + r for f, r in zip(fastest, rest, strict=True)]
            record.share_of_floor = share(1.0, floors, record)
        record.gflop_per_s = record.flops / record.seconds / 1e9
        record.speed_up = {other.impl: speed_up(record, other) for other in records if is_peer(other)}
    print(harness.table(records))
    print(floor_lines(records))
    print(speed_up_lines(records))
    return records


def share(flops: float, seconds_per_flop: Sequence[float], record: harness.Record) -> float:
    """The time of the products at the rates of the rounds over that of the record, the median."""
    pairs = zip(seconds_per_flop, record.round_seconds, strict=True)
    return statistics.median(flops * best / mine for best, mine in pairs)


def rest_of_floor(
    floor: Floor, impl: str, ceilings: Sequence[harness.Ceiling], rounds: dict[str, tuple[float, ...]]
) -> list[float]:
    """Seconds of an implementation's floor besides the products, in each round."""
    kept = floor.kept_bytes.get(impl, 0.0)
    times = [
        (kept / c.num_bytes if c.num_bytes else floor.evaluations / SILU_ELEMENTS, rounds[c.name])
        for c in ceilings
    ]
    return [sum(parts) for parts in zip(*([n * t for t in ts] for n, ts in times), strict=True)]


def cached_ceiling(rows: int, width: int) -> harness.Ceiling:
    """The same arithmetic on rows that stay in the cache, 1 MiB of inputs and results at a time."""
    block = min(rows, max(64, 2**17 // width))
    a, b, out = torch.randn(block, width), torch.randn(width, width), torch.empty(block, width)
    repeats = max(1, rows // block)

    def work() -> None:
        for _ in range(repeats):
            torch.mm(a, b, out=out)

    return harness.Ceiling("mm in cache", work, num_flops=2.0 * repeats * block * width * width)


def floor_ceilings(floor: Floor) -> list[harness.Ceiling]:
    """What the floor is made of besides the products."""
    kept = max(floor.kept_bytes.values(), default=0.0)
    return [*silu_ceilings(), *(kept_ceilings(kept) if kept else ())]


SILU_COLUMNS = 1024  # four rows of 4 KiB fit any first-level cache
SILU_ELEMENTS = 2**20
KEPT_BLOCK = 2**17  # bytes, as much as a block of 512 edges has at F = 64


def silu_ceilings() -> list[harness.Ceiling]:
    """SILU_ELEMENTS evaluations alone: act(x), and with its slope times a cotangent; a row per thread."""
    threads = torch.get_num_threads()
    x, bar = torch.randn(threads, SILU_COLUMNS), torch.randn(threads, SILU_COLUMNS)
    value, x_bar, none = torch.empty_like(x), torch.empty_like(x), x.new_empty(0)
    repeats = SILU_ELEMENTS // (SILU_COLUMNS * threads)

    def forward() -> None:
        torch.ops.megagnn.silu_pass_(x, none, value, none, repeats)

    def backward() -> None:
        torch.ops.megagnn.silu_pass_(x, bar, value, x_bar, repeats)

    return [harness.Ceiling("silu forward", forward), harness.Ceiling("silu backward", backward)]


def kept_ceilings(num_bytes: float) -> list[harness.Ceiling]:
    """Edges written from a block that stays in the cache, and read into a sum: each once, by all threads."""
    block = torch.randn(1, KEPT_BLOCK // 4)
    kept = torch.empty(max(1, int(num_bytes // KEPT_BLOCK)), KEPT_BLOCK // 4)

    def write() -> None:
        kept.copy_(block.expand_as(kept))

    moved = kept.numel() * 4.0
    read = harness.read_ceiling(kept)
    return [
        harness.Ceiling("write kept", write, num_bytes=moved),
        dataclasses.replace(read, name="read kept"),
    ]


def floor_lines(records: Sequence[StepRecord]) -> str:
    """Share of the products and of the floor of each step."""
    lines = [
        f"  {r.impl:28} {r.share_of_ceiling or 0:.0%} of its products, {r.share_of_floor:.0%} of the floor"
        for r in records
        if r.share_of_floor is not None
    ]
    return "\n".join(lines)


def is_peer(record: harness.Record) -> bool:
    """Whether it is another's implementation, and was timed."""
    return record.seconds is not None and record.note != "ceiling" and not record.impl.startswith("megagnn")


def speed_up(record: harness.Record, other: harness.Record) -> float:
    """The other's time over this one's, the median over the rounds."""
    pairs = zip(other.round_seconds, record.round_seconds, strict=True)
    return statistics.median(theirs / mine for theirs, mine in pairs)


def speed_up_lines(records: Sequence[StepRecord]) -> str:
    """For each of ours, how many times faster than each peer it is, and than its own arithmetic allows."""
    lines = []
    for record in records:
        if not record.impl.startswith("megagnn") or not record.flops:
            continue
        parts = []
        for other in records:
            if is_peer(other) and other.flops:
                bound = other.flops / record.flops
                parts.append(f"{record.speed_up[other.impl]:.2f} of {bound:.2f} x {other.impl}")
        lines.append(f"  {record.impl}: speed-up of (by products alone): {', '.join(parts)}")
    return "\n".join(lines)


def memory_lines(records: Sequence[StepRecord]) -> str:
    """Peak memory of each implementation, and ours over the least that a peer needs."""
    lines = []
    for record in records:
        if record.peak_bytes is None or record.resident_bytes is None:
            continue
        share = "" if is_peer(record) else f", {memory_share(record, records):.2f} of the best peer's"
        megabytes = f"{record.peak_bytes / 1e6:9.1f} MB at peak, process {record.resident_bytes / 1e6:.1f} MB"
        lines.append(f"  {record.impl:28} {megabytes}{share}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
