"""Rates of this machine, measured, as a cluster file: `megagnn plan --calibrate machine.toml`.

Peaks are those of one large product and one large copy. What a training reaches of them is fitted to steps of
two widths: t = operations / R + moved bytes / B (plan/times.py) has two unknowns, which a narrow model, with
much to move for each product, and a wide one tell apart. Times are the shortest of several; on a machine with
other work all rates come out too low.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ase.build import bulk

from megagnn.config import config_from_dict
from megagnn.data import keys
from megagnn.data.batch import batch_from_atoms
from megagnn.models.potential import build_potential
from megagnn.parallel import messages
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.spawn import spawn
from megagnn.parallel.world import barrier
from megagnn.plan.layout import Layout, Sizes, make_layout
from megagnn.plan.times import forward_flops, moved_bytes, step_units

WIDTHS = (64, 256)
REPEATS = 5
CUTOFF, NUM_CELLS = 4.0, 3
"""Å, and cubic cells of copper along each side of the batch."""


class Point(NamedTuple):
    """A step: its operations, bytes moved and seconds."""

    operations: float
    moved: float
    seconds: float


@dataclass(frozen=True)
class Rates:
    """Of one device; operations and bytes a second."""

    products: Mapping[str, float]
    """Peaks, by type."""
    copy: float
    reached_products: float
    reached_memory: float
    disk: float
    link: float
    link_latency: float
    """s."""


def shortest(work: Callable[[], Any], device: torch.device, repeats: int = REPEATS) -> float:
    """Seconds of a piece of work, after one that does not count."""
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def product_rate(dtype: torch.dtype, device: torch.device, size: int = 1024) -> float:
    """Operations a second of a product of two square matrices."""
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / shortest(lambda: a @ b, device)


def copy_rate(device: torch.device, num_bytes: int = 2**26) -> float:
    """Bytes read and written a second by a copy."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / shortest(lambda: target.copy_(source), device)


def disk_rate(folder: str | Path, num_bytes: int = 2**28) -> float:
    """Bytes a second to a file of a folder, until they are there."""
    block = bytes(2**24)

    def write() -> None:
        with tempfile.TemporaryFile(dir=folder) as file:
            for _ in range(max(1, num_bytes // len(block))):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    return max(len(block), num_bytes) / shortest(write, torch.device("cpu"), repeats=1)


def step_point(width: int, device: torch.device) -> Point:
    """A step on conservative forces of an EGNN of three layers on a hundred atoms, without the update."""
    atoms = bulk("Cu", cubic=True) * (NUM_CELLS, NUM_CELLS, NUM_CELLS)
    atoms.rattle(0.05, seed=0)
    batch = {k: t.to(device) for k, t in batch_from_atoms([atoms], CUTOFF, torch.float32).items()}
    layout = step_layout(width, len(batch[keys.POSITIONS]), batch[keys.EDGE_INDEX].shape[1])
    elements = layout.sizes.statistics()
    potential = build_potential(layout.model, elements).to(device)
    bars = torch.ones_like(batch[keys.POSITIONS])

    def step() -> None:
        potential(batch)
        energy_B = potential.directional(batch, bars)[keys.ENERGY]
        (energy_B.value.sum() + energy_B.tangent.sum()).backward()

    numbers, units = layout.numbers_on(0), step_units(layout)
    operations = units * sum(forward_flops(layout, numbers))
    return Point(operations, units * moved_bytes(layout, numbers), shortest(step, device))


def step_layout(width: int, num_atoms: int, num_edges: int) -> Layout:
    """The layout of that step; the elements go up to copper."""
    model = {"width": width, "num_layers": 3, "cutoff": CUTOFF, "forces": "conservative"}
    return make_layout(config_from_dict({"model": model}), Sizes(num_atoms, num_edges, 1, num_elements=29))


def fitted(points: Sequence[Point], most_products: float, most_memory: float) -> tuple[float, float]:
    """(operations, bytes) a second with which two steps take their times, none above what is possible.

    Raises ValueError for other than two points.
    """
    if len(points) != 2:
        raise ValueError(f"two steps tell products from memory, got {len(points)}; measure two widths")
    (a, m, s), (b, n, t) = points
    per_byte = max((a * t - b * s) / (a * n - b * m), 1 / most_memory)
    per_operation = max((t - n * per_byte) / b, 1 / most_products)
    per_byte = max((t - b * per_operation) / n, 1 / most_memory)
    return 1 / per_operation, 1 / per_byte


def exchange(context: ParallelContext, num_bytes: int) -> tuple[float, float]:
    """(bytes a second, s of a short message) between ranks of this machine."""
    seconds = []
    for size in (num_bytes // 4, 16):
        values = torch.ones(size)

        def reduce(values: torch.Tensor = values) -> None:
            barrier(context)
            messages.all_reduce(values, context, "dp")

        seconds.append(shortest(reduce, context.device))
    share = 2 * (context.dp_size - 1) / context.dp_size
    return share * num_bytes / seconds[0], seconds[1]


def measure(folder: str | Path, device: torch.device) -> Rates:
    """All rates; of links between two ranks over gloo on CPUs, and assumed between GPUs."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        names = ("float64", "float32", "bfloat16")
        products = {name: product_rate(getattr(torch, name), device) for name in names}
        copy = copy_rate(device)
        reached = fitted([step_point(width, device) for width in WIDTHS], products["float32"], copy)
    finally:
        torch.set_num_threads(threads)
    link, latency = (50e9, 5e-6) if device.type == "cuda" else spawn(2, exchange, 2**24)[0]
    return Rates(products, copy, *reached, disk_rate(folder), link, latency)


def to_toml(
    rates: Rates,
    name: str,
    devices: int,
    memory_gb: float,
    kind: str,
    device_name: str,
    host_memory_gb: float,
) -> str:
    """Text of a cluster file; memory and the host's memory are of one device."""
    peak = {dtype: rate / 1e12 for dtype, rate in rates.products.items()}
    copied = rates.copy / 1e9
    links = "an assumption" if kind == "gpu" else "measured between two ranks over gloo"
    return f"""# {name}, by `megagnn plan --calibrate`: measured, but where it is said.
name = {json.dumps(name)}
num_nodes = 1              # what is beyond this machine is not known

[device]
name = {json.dumps(device_name)}
kind = "{kind}"
memory_gb = {memory_gb:.4g}
usable = {0.92 if kind == "gpu" else 0.85}              # an assumption
float64 = {peak["float64"]:.4g}
float32 = {peak["float32"]:.4g}
bfloat16 = {peak["bfloat16"]:.4g}
memory_gbps = {copied:.4g}
watts = {400 if kind == "gpu" else 10}                 # an assumption

[node]
devices = {devices}
host_memory_gb = {host_memory_gb:.4g}
host_gbps = {25 if kind == "gpu" else copied:.4g}              # of a GPU an assumption
disk_gbps = {rates.disk / 1e9:.4g}
watts = 10                 # an assumption

[node.link]                # {links}
gbps = {rates.link / 1e9:.4g}
latency_us = {1e6 * rates.link_latency:.4g}

[network]                  # an assumption: there is none
gbps = {min(0.125, rates.link / 1e9):.4g}
latency_us = 100

[efficiency]
products = {min(1.0, rates.reached_products / rates.products["float32"]):.3g}
memory = {min(1.0, rates.reached_memory / rates.copy):.3g}
links = 1.0
"""


def calibrate(path: Path) -> str:
    """Measures this machine and writes its cluster file; returns what it holds.

    Raises ValueError where there is such a file.
    """
    if path.exists():
        raise ValueError(f"{path} is there already; remove it, or give another name to --calibrate")
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    devices = torch.cuda.device_count() if gpu else os.cpu_count() or 1
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / devices
    memory, name = host, "a core"
    if gpu:
        properties = torch.cuda.get_device_properties(0)
        memory, name = float(properties.total_memory), properties.name
    rates = measure(path.absolute().parent, device)
    kind = device.type.replace("cuda", "gpu")
    text = to_toml(rates, path.stem, devices, memory / 1e9, kind, name, host / 1e9)
    path.write_text(text)
    return text
