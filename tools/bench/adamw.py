"""AdamW over flat buffers against torch's, fused and foreach, and against the machine's memory bandwidth.

    python -m tools.bench.adamw --json adamw.json

One flat parameter of so many elements, and the parameters of a network of that size, many matrices and
vectors. float32, and bfloat16 with float32 master copies, for which torch has no optimizer: its fused one on
the masters, with casts, stands beside ours. `step` is what a training loop calls, `kernel` the operation
alone. All work on the same memory in turn.

A step reads parameter, gradient and both moments and writes all but the gradient: 28 bytes per element, in
bfloat16 as well. The first ceiling is a loop that does the same without the arithmetic, compiled here where
there is a C++ compiler; the second is a copy. 1e8 elements need 7 GB.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megagnn.optim.adamw import FlatAdamW
from tools.bench import harness

Work = Callable[[], Any]
Make = Callable[[FlatAdamW], Work]
Shapes = list[tuple[int, ...]]
BETAS = (0.9, 0.99)
SETTINGS: dict[str, Any] = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.01}
TRAFFIC = """
extern "C" void traffic(float* __restrict__ p, const float* __restrict__ g, float* __restrict__ m,
                        float* __restrict__ v, long n) {
  for (long i = 0; i < n; ++i) { p[i] += g[i]; m[i] += g[i]; v[i] += g[i]; }
}
"""


def network(size: int) -> Shapes:
    """Shapes of about `size` elements in all: seven F x F matrices and as many vectors of F per layer."""
    width = 32 if size < 100_000 else 64 if size < 5_000_000 else 256
    layer: Shapes = [(width, width), (width,)] * 7
    return layer * max(1, round(size / (7 * width * (width + 1))))


def build_traffic() -> Any:
    """The loop of the first ceiling; None without a compiler."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        print("no C++ compiler: the copy is the only ceiling", file=sys.stderr)
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "traffic.cpp"), Path(folder, "traffic.so")
        source.write_text(TRAFFIC)
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).traffic
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long]
    return function


def traffic_ceiling(traffic: Any, size: int, threads: int) -> harness.Ceiling:
    """Four reads and three writes per element, in as many threads as torch has."""
    buffers = [torch.zeros(size) for _ in range(4)]
    share = size if size < 32768 else -(-size // threads // 16) * 16
    parts: list[tuple[list[int], int]] = [
        ([b.data_ptr() + 4 * begin for b in buffers], min(share, size - begin))
        for begin in range(0, size, share)
    ]
    pool = ThreadPoolExecutor(max(len(parts) - 1, 1))

    def run_part(part: int) -> None:
        pointers, length = parts[part]
        traffic(*pointers, length)

    def work() -> None:
        others = [pool.submit(run_part, part) for part in range(1, len(parts))]
        run_part(0)
        for other in others:
            other.result()

    work.buffers = buffers  # type: ignore[attr-defined]  # the loop has only their addresses
    return harness.Ceiling("4 reads, 3 writes", work, num_bytes=28 * size)


def own_step(optimizer: FlatAdamW) -> Work:
    """What a training loop calls."""
    return lambda: optimizer.step()


def own_kernel(optimizer: FlatAdamW) -> Work:
    """The operation that it calls, on the whole buffer."""
    b, steps = optimizer.buffers[0][0], itertools.count(1)
    buffers = (b.param, b.grad, *b.moments.values(), b.master)
    lr, eps, decay = (SETTINGS[name] for name in ("lr", "eps", "weight_decay"))
    return lambda: torch.ops.megagnn.adamw_.default(*buffers, lr, *BETAS, eps, decay, next(steps), 1.0)


def torch_step(optimizer: FlatAdamW, **kind: Any) -> Work:
    """torch.optim.AdamW on the same memory, one tensor per parameter."""
    b = optimizer.buffers[0][0]
    views, params = b.state(), [nn.Parameter(p.data) for p in b.params]
    theirs = torch.optim.AdamW(params, betas=BETAS, **SETTINGS, **kind)
    for i, p in enumerate(params):
        p.grad = b.grads[i]
        theirs.state[p] = {
            "step": torch.zeros(()),
            "exp_avg": views["exp_avg"][i],
            "exp_avg_sq": views["exp_avg_sq"][i],
        }
    return lambda: theirs.step()


def torch_kernel(optimizer: FlatAdamW) -> Work:
    """The operation that torch.optim.AdamW(fused=True) calls; with casts, where there are master copies."""
    b, step = optimizer.buffers[0][0], torch.zeros(())
    weights = b.param if b.master is None else b.master
    grad = b.grad if b.master is None else torch.empty_like(b.master)

    def work() -> None:
        if b.master is not None:
            grad.copy_(b.grad)
        step.add_(1)
        torch._fused_adamw_(
            *([weights], [grad], *([m] for m in b.moments.values()), [], [step]),
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            maximize=False,
            **SETTINGS,
        )
        if b.master is not None:
            b.param.copy_(b.master)

    return work


STEPS: dict[str, Make] = {
    "megagnn step": own_step,
    "torch fused step": functools.partial(torch_step, fused=True),
    "torch foreach step": functools.partial(torch_step, foreach=True),
}
KERNELS: dict[str, Make] = {"megagnn kernel": own_kernel, "torch fused kernel": torch_kernel}


def make_optimizer(shapes: Shapes, dtype: torch.dtype) -> FlatAdamW:
    """Random weights and gradients."""
    torch.manual_seed(0)
    optimizer = FlatAdamW([nn.Parameter(torch.randn(s).to(dtype)) for s in shapes], betas=BETAS, **SETTINGS)
    for grad in optimizer.buffers[0][0].grads:
        grad.normal_()
    return optimizer


def check(name: str, make: Make, shapes: Shapes, dtype: torch.dtype) -> None:
    """Three steps against torch's plain optimizer in float64; raises ValueError where they differ."""
    optimizer = make_optimizer(shapes, dtype)
    b = optimizer.buffers[0][0]
    weights = b.param if b.master is None else b.master
    want = nn.Parameter(weights.double())
    want.grad = b.grad.double()
    plain = torch.optim.AdamW([want], betas=BETAS, **SETTINGS, foreach=False)
    work = make(optimizer)
    for _ in range(3):
        work()
        plain.step()
    error = float((weights - want.detach()).abs().max() / want.detach().abs().max())
    if not error < 1e-6:
        raise ValueError(f"{name} on {len(shapes)} tensors of {dtype} must be right to 1e-6, got {error:.2g}")


def run(
    op: str, shapes: Shapes, dtype: torch.dtype, works: dict[str, Make], traffic: Any, args: Any
) -> list[harness.Record]:
    """Checks and times one set of parameters."""
    small: Shapes = shapes if sum(math.prod(s) for s in shapes) < 2_000_000 else [(1_000_003,)]
    for name, make in works.items():
        check(name, make, small, dtype)
    optimizer = make_optimizer(shapes, dtype)
    size = sum(math.prod(s) for s in shapes)
    num_bytes = 28 * size  # in bfloat16 3 x 8 of the float32 buffers, 2 of the gradient, 2 of the parameter
    ceilings = [harness.copy_ceiling(num_bytes)]
    if traffic is not None:
        ceilings.insert(0, traffic_ceiling(traffic, size, args.threads))
    implementations: dict[str, Work | None] = {name: make(optimizer) for name, make in works.items()}
    case = harness.Case(
        *(op, {"elements": size, "tensors": len(shapes)}, str(dtype).removeprefix("torch.")),
        implementations=implementations,
        num_bytes=num_bytes,
        ceilings=ceilings,
    )
    records = harness.compare(case, args)
    print(harness.table(records), flush=True)
    return records


def main() -> None:
    """Runs every size."""
    sizes = ("--sizes", {"type": float, "nargs": "+", "default": [1e4, 1e5, 1e6, 1e7, 1e8], "metavar": "N"})
    args = harness.parse_args(__doc__, sizes)
    traffic, records = build_traffic(), []
    for size in map(int, args.sizes):
        records += run("adamw_step", [(size,)], torch.float32, STEPS, traffic, args)
        records += run("adamw_step", network(size), torch.float32, STEPS, traffic, args)
        for dtype in (torch.float32, torch.bfloat16):
            records += run("adamw_kernel", [(size,)], dtype, KERNELS, traffic, args)
    harness.report(records, args)


if __name__ == "__main__":
    main()
