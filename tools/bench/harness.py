"""Harness of the benchmarks: several implementations of the same work, timed in turns in one process.

Machines drift and neighbours are noisy, so absolute times mean little. Here every round times each
implementation and each ceiling once, in random order, and what is reported is the median over the rounds of
ratios taken within a round. Results are checked before anything is timed. Use:

    args = harness.parse_args(__doc__)            # also sets threads and allocator, before any tensor
    case = harness.Case("segment_sum", {"E": E, "F": F}, "float32", {"megagnn": ours, "index_add": peer,
                          "torch_scatter": None}, num_bytes=..., ceilings=[harness.read_ceiling(values)])
    records = harness.compare(case, args)
    harness.report(records, args)

The first implementation is ours; None stands for a peer that is not installed, which is named as missing.
Neighbours that share the cores disturb parallel regions least with OMP_PROC_BIND=true in the environment.
Where there are more of them than cores, compare long with short work by --threads 1 --clock cpu only.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from megagnn import ops
from megagnn.ops.allocator import configure_allocator

Work = Callable[[], Any]
_SAMPLE_SECONDS = 2e-3  # shorter work is repeated within a sample until it takes about this long
_state = {"allocator": "default", "clock": "wall"}
_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Ceiling:
    """What the hardware can do, measured in the same rounds: `work` moves `num_bytes` or does `num_flops`."""

    name: str
    work: Work
    num_bytes: float = 0
    num_flops: float = 0

    def seconds_for(self, case: Case, seconds: float) -> float | None:
        """The shortest time the case could take, where `work` took `seconds`; None if it says nothing."""
        if self.num_bytes and case.num_bytes:
            return seconds * case.num_bytes / self.num_bytes
        if self.num_flops and case.num_flops:
            return seconds * case.num_flops / self.num_flops
        return None


@dataclass
class Case:
    """Work of one shape and type, by several implementations.

    op, shape, dtype: names it; shape as {"E": 600000, "F": 64}.
    implementations: name to function without arguments, ours first; None where a peer is not installed.
    expected: what each must return, a tensor or a nest of them; None where the caller has checked.
    comparable: makes of the result of some what `expected` has, outside what is timed.
    checked: a smaller case of the same, whose results are compared in place of this one's.
    portions: the part of the work that some do, where all of it does not fit; their times are divided by it.
    kept_bytes: what each keeps from its forward for its backward, where that is told.
    tolerance: largest max|got - expected| / max|expected| of ours; peers may be `peer_slack` times worse.
    num_bytes, num_flops: the least that any implementation must move (inputs once, outputs once) and compute.
    ceilings: the first that applies gives share_of_ceiling; all are reported.
    """

    op: str
    shape: dict[str, int]
    dtype: str
    implementations: dict[str, Work | None]
    expected: Any = None
    tolerance: float = 1e-4
    peer_slack: float = 100.0
    num_bytes: float = 0
    num_flops: float = 0
    ceilings: Sequence[Ceiling] = ()
    comparable: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    checked: Case | None = None
    portions: dict[str, float] = field(default_factory=dict)
    kept_bytes: dict[str, float] = field(default_factory=dict)


@dataclass
class Record:
    """One implementation (or ceiling) of one case. Ratios are medians over rounds of ratios within a round.

    seconds: median time; None where the implementation is missing.
    ratio_to_ours: its time over ours, above 1 where ours is faster; ratio_range: quartiles of the same.
    share_of_ceiling: the ceiling's time for this much work over its time.
    gb_per_s, gflop_per_s: the case's least bytes and operations over its median time.
    error: max|got - expected| / max|expected|, where results were checked.
    round_seconds: its time in every round; those of one case are from the same rounds.
    portion, kept_bytes: as in `Case`.
    """

    op: str
    shape: dict[str, int]
    dtype: str
    impl: str
    seconds: float | None = None
    share_of_ceiling: float | None = None
    ratio_to_ours: float | None = None
    ratio_range: tuple[float, float] | None = None
    gb_per_s: float | None = None
    gflop_per_s: float | None = None
    error: float | None = None
    rounds: int = 0
    round_seconds: tuple[float, ...] = ()
    portion: float = 1.0
    kept_bytes: float | None = None
    note: str = ""
    machine: dict[str, Any] = field(default_factory=dict)


def optional(module: str) -> ModuleType | None:
    """The module, or None where it is not installed."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError):
        return None


def parse_args(
    description: str | None, *extra: tuple[str, dict[str, Any]], argv: list[str] | None = None
) -> Any:
    """Arguments every benchmark takes, plus `extra` (name, keywords of add_argument); calls `prepare`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch's pool (default 2)")
    parser.add_argument("--seconds", type=float, default=3.0, help="time per case (default 3)")
    parser.add_argument("--rounds", type=int, default=9, help="least number of rounds (default 9)")
    clock_help = "cpu: processor time, for one thread, where other processes take turns on the cores"
    parser.add_argument("--clock", choices=tuple(_CLOCKS), default="wall", help=clock_help)
    parser.add_argument("--json", type=Path, metavar="PATH", help="writes the records there")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draws ratios and shares there (png, pdf)")
    for name, keywords in extra:
        parser.add_argument(name, **keywords)
    args = parser.parse_args(argv)
    if args.clock == "cpu" and args.threads > 1:
        parser.error(f"--clock cpu adds up the threads' waiting, got --threads {args.threads}; use 1")
    _state["clock"] = args.clock
    prepare(args.threads)
    return args


def prepare(threads: int) -> None:
    """Sets the threads and tunes the allocator, for ours and all peers. Call before anything is allocated."""
    torch.set_num_threads(threads)
    _state["allocator"] = "kept" if configure_allocator() else "default"


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    return {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "simd": ops.build_info().get("simd", "reference"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **_state,
    }


def read_ceiling(buffer: torch.Tensor) -> Ceiling:
    """Reads `buffer`, best the one the operation reads, in torch's fastest reduction, as float32."""
    halves = 4 // min(buffer.element_size(), 4)  # elements that make up a float32
    flat = buffer.detach().reshape(-1)[: buffer.numel() // halves * halves].view(torch.float32)
    return Ceiling("read", flat.sum, num_bytes=flat.numel() * 4)


def copy_ceiling(num_bytes: float) -> Ceiling:
    """Reads and writes `num_bytes` in all: a copy of half as many between two buffers that stay in use."""
    source = torch.ones(max(int(num_bytes // 8), 1))
    target = torch.empty_like(source)
    return Ceiling("copy", lambda: target.copy_(source), num_bytes=source.numel() * 8)


def product_ceiling(rows: int, width: int, dtype: torch.dtype = torch.float32) -> Ceiling:
    """The vendor's matrix product of (rows, width) with (width, width), into a result that stays in use."""
    a, b = torch.randn(rows, width).to(dtype), torch.randn(width, width).to(dtype)
    out = torch.empty(rows, width, dtype=dtype)
    return Ceiling("mm", lambda: torch.mm(a, b, out=out), num_flops=2.0 * rows * width * width)


def kept_bytes(forward: Work, given: Sequence[torch.Tensor]) -> int:
    """What autograd keeps from a forward for the backward, in memory other than that of tensors given."""
    known = {x.untyped_storage().data_ptr() for x in given}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        memory = x.untyped_storage()
        if memory.data_ptr() not in known:
            kept[memory.data_ptr()] = memory.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        results = forward()  # held until all is counted, so that no address comes twice
    del results
    return sum(kept.values())


def compare(case: Case, args: Any) -> list[Record]:
    """Checks the case, times it, and returns a record for each implementation and ceiling, ours first.

    Raises ValueError where a result is wrong: a wrong answer has no speed.
    """
    present = {name: work for name, work in case.implementations.items() if work}
    ours = next(iter(case.implementations))
    if ours not in present:
        raise ValueError(f"{case.op}: ours, {ours}, must be there, got None")
    errors = check(case.checked or case)
    works = {**present, **{ceiling.name: ceiling.work for ceiling in case.ceilings}}
    if len(works) < len(present) + len(case.ceilings):
        raise ValueError(f"{case.op}: implementations and ceilings need different names, got {list(works)}")
    times = _times(works, args.rounds, args.seconds)
    for name, portion in case.portions.items():
        times[name] = [seconds / portion for seconds in times[name]]
    records = [_record(case, name, times, ours, errors.get(name)) for name in works]
    for record in records[len(present) :]:
        record.note = "ceiling"
    missing = [name for name in case.implementations if name not in present]
    absent = [Record(case.op, case.shape, case.dtype, name, note="not installed") for name in missing]
    for record in [*records, *absent]:
        record.machine = machine()
    return [*records[: len(present)], *absent, *records[len(present) :]]


def _leaves(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result.detach()]
    return [leaf for part in result for leaf in _leaves(part)]


def check(case: Case) -> dict[str, float]:
    """Error of each implementation that is there, where the case says what to expect.

    Raises ValueError where one is too large.
    """
    errors: dict[str, float] = {}
    if case.expected is None:
        return errors
    wanted, ours = _leaves(case.expected), next(iter(case.implementations))
    for name, work in case.implementations.items():
        if work is None:
            continue
        got = _leaves(case.comparable.get(name, lambda result: result)(work()))
        allowed = case.tolerance * (1 if name == ours else case.peer_slack)
        if [leaf.shape for leaf in got] != [leaf.shape for leaf in wanted]:
            raise ValueError(f"{case.op}: {name} must return the expected shapes, got others")
        pairs = [(g.double(), w.double()) for g, w in zip(got, wanted, strict=True) if w.numel()]
        differences = [float((g - w).abs().max() / w.abs().max().clamp_min(1e-300)) for g, w in pairs]
        errors[name] = max(differences, default=0.0)
        if not errors[name] <= allowed:
            raise ValueError(
                f"{case.op} {case.shape} {case.dtype}: {name} must be right to {allowed:.2g}, "
                f"got an error of {errors[name]:.2g}"
            )
    return errors


def _sample(work: Work, repeats: int) -> float:
    clock = _CLOCKS[_state["clock"]]
    start = clock()
    for _ in range(repeats):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (clock() - start) / repeats


def _times(works: dict[str, Work], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Times of each in every round, at least `rounds` of them and then for as long as `seconds` allow."""
    repeats = {}
    for name, work in works.items():
        once = _sample(work, 1)
        if once < 0.2:  # what takes longer is as warm after one call as it will be
            once = min(_sample(work, 1) for _ in range(3))
        repeats[name] = max(1, round(_SAMPLE_SECONDS / max(once, 1e-7)))
    order = list(works)
    times: dict[str, list[float]] = {name: [] for name in works}
    shuffle = random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    while len(times[order[0]]) < rounds or time.perf_counter() - start < seconds:
        shuffle(order)
        for name in order:
            times[name].append(_sample(works[name], repeats[name]))
    if collecting:
        gc.enable()
    return times


def _record(case: Case, name: str, times: dict[str, list[float]], ours: str, error: float | None) -> Record:
    mine = times[name]
    seconds = statistics.median(mine)
    ratios = sorted(t / o for t, o in zip(mine, times[ours], strict=True))
    record = Record(case.op, case.shape, case.dtype, name, seconds, error=error, rounds=len(mine))
    record.round_seconds = tuple(mine)
    record.portion, record.kept_bytes = case.portions.get(name, 1.0), case.kept_bytes.get(name)
    record.ratio_to_ours = statistics.median(ratios)
    record.ratio_range = (ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4])
    num_bytes, num_flops = case.num_bytes, case.num_flops
    for ceiling in case.ceilings:
        best = [ceiling.seconds_for(case, t) for t in times[ceiling.name]]
        if ceiling.name == name:
            num_bytes, num_flops = ceiling.num_bytes, ceiling.num_flops
        if record.share_of_ceiling is None and best[0] is not None:
            record.share_of_ceiling = statistics.median(b / t for b, t in zip(best, mine, strict=True) if b)
    record.gb_per_s = num_bytes / seconds / 1e9 if num_bytes else None
    record.gflop_per_s = num_flops / seconds / 1e9 if num_flops else None
    return record


def table(records: Sequence[Record]) -> str:
    """The records as lines of text, a block for each case; missing peers are named."""
    lines, case = [], None
    for r in records:
        shape = " ".join(f"{name}={size}" for name, size in r.shape.items())
        if (r.op, shape, r.dtype) != case:
            case = (r.op, shape, r.dtype)
            lines.append(f"\n{r.op}  {shape}  {r.dtype}")
            lines.append(f"  {'':28} {'ms':>9} {'/ours':>6} {'ceiling':>7} {'GB/s':>6} {'GFLOP/s':>7}  error")
        if r.seconds is None:
            lines.append(f"  {r.impl:28} {'missing':>9}  ({r.note})")
            continue
        ratio, share = f"{r.ratio_to_ours:6.2f}", _optional(r.share_of_ceiling, "7.0%")
        rates = f"{_optional(r.gb_per_s, '6.1f')} {_optional(r.gflop_per_s, '7.1f')}"
        end = f"({r.note})" if r.note else _optional(r.error, ".1e")
        end += f"  keeps {r.kept_bytes / 1e6:.3g} MB" if r.kept_bytes is not None else ""
        end += f"  (times of {r.portion:.1%} of the work, divided by it)" if r.portion < 1 else ""
        lines.append(f"  {r.impl:28} {r.seconds * 1e3:9.3f} {ratio} {share} {rates}  {end}".rstrip())
    return "\n".join(lines)


def _optional(number: float | None, spec: str) -> str:
    return " " * int(spec.split(".")[0] or 0) if number is None else format(number, spec)


def report(records: Sequence[Record], args: Any) -> None:
    """Prints what missed ours and what is not installed; writes --json and --plot where asked."""
    absent = sorted({r.impl for r in records if r.seconds is None})
    print(f"\nnot installed: {', '.join(absent) or 'none of the peers'}")
    peers = [r for r in records if r.ratio_to_ours is not None and not r.note]
    slower = [r for r in peers if (r.ratio_to_ours or 0) < 0.95]
    print(f"ours is slower (ratio below 0.95) in {len(slower)} of {len(peers)} comparisons")
    for r in slower:
        print(f"  {r.op} {r.shape} {r.dtype}: {r.impl} {r.ratio_to_ours:.2f}")
    if args.json:
        args.json.write_text(json.dumps([asdict(record) for record in records], indent=1) + "\n")
    if args.plot:
        plot(records, args.plot)


def plot(records: Sequence[Record], path: Path) -> None:
    """One panel per operation and type: each peer's time over ours, by shape (logarithmic)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [r for r in records if r.seconds is not None and r.note != "ceiling"]
    panels = list(dict.fromkeys((r.op, r.dtype) for r in timed))
    figure, axes = plt.subplots(len(panels), figsize=(10, 3 * len(panels)), squeeze=False)
    for (op, dtype), ax in zip(panels, axes[:, 0], strict=True):
        mine = [r for r in timed if (r.op, r.dtype) == (op, dtype)]
        shapes = list(dict.fromkeys("\n".join(f"{k}={v}" for k, v in r.shape.items()) for r in mine))
        for impl in dict.fromkeys(r.impl for r in mine):
            points = [r for r in mine if r.impl == impl]
            x = [shapes.index("\n".join(f"{k}={v}" for k, v in r.shape.items())) for r in points]
            ax.plot(x, [r.ratio_to_ours or float("nan") for r in points], "o-", label=impl, markersize=4)
        ax.set(title=f"{op}, {dtype}", ylabel="time / ours", yscale="log")
        ax.set_xticks(range(len(shapes)), shapes, fontsize=7)
        ax.axhline(1, color="black", linewidth=0.5)
        ax.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
