"""Peak memory of one training step, measured in a process of its own.

python -m tools.bench.memory.step '{"name": "megagnn save", "forces": "direct", "edges": 10000, "width": 64}'

prints JSON: `peak_bytes`, the most that tensors held above what was alive before the step, from the
allocator's own events, and `resident_bytes`, how far the process grew. Weights, gradients and optimizer state
exist before, so both count activations and temporaries.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def peak_memory(name: str, forces: str, num_edges: int, width: int, threads: int) -> dict[str, float]:
    """Both numbers for an implementation (a name of edge_workload), from a fresh process."""
    work = {"name": name, "forces": forces, "edges": num_edges, "width": width, "threads": threads}
    return _in_process(work)


def peak_memory_on(batch: Path, name: str, forces: str, width: int, num_layers: int, threads: int) -> float:
    """Peak bytes of a variant of ours on a saved batch (tools/bench/work/forces.py), from a fresh process."""
    work = {"name": name, "forces": forces, "width": width, "threads": threads}
    return _in_process({**work, "batch": str(batch), "layers": num_layers})["peak_bytes"]


def _in_process(work: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-m", "tools.bench.memory.step", json.dumps(work)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    if done.returncode != 0:
        raise RuntimeError(
            f"memory of {work}: the process ended with {done.returncode}: {done.stderr[-2000:]}"
        )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _measure(work: dict[str, Any]) -> dict[str, float]:
    from tools.bench import harness

    harness.prepare(work["threads"])
    step, batch, small = _saved_work(work) if "batch" in work else _dense_work(work)
    step.use(small)()  # makes gradients and optimizer state, loads libraries
    step.use(batch)
    before = status_bytes("VmRSS")
    reset_peak()
    step()
    resident = status_bytes("VmHWM") - before
    return {"peak_bytes": peak_of_events(step), "resident_bytes": resident}


def _dense_work(work: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Step, batch and a small batch."""
    from tools.bench.work import edge as edge_workload

    batch, cutoff = edge_workload.dense_batch(work["edges"])
    config = edge_workload.model_config(work["width"], work["forces"], cutoff)
    step = edge_workload.make_step(work["name"], batch, config)
    assert step is not None, f"{work['name']} is not installed"
    return step, batch, edge_workload.dense_batch(2000)[0]


def _saved_work(work: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The same of a saved batch."""
    from tools.bench.work.forces import ForcesBatch

    made = ForcesBatch.load(Path(work["batch"]))
    step = made.step(work["name"], work["forces"], work["width"], work["layers"])
    return step, made.batch, made.small


def held_of(run: Any) -> float:
    """Bytes that are still there when `run` has returned and what it returned lives."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = profiler.profiler.kineto_results.events()
    del result
    return float(sum(e.nbytes() for e in events if e.name() == "[memory]"))


def peak_of_events(run: Any) -> float:
    """The highest sum of the allocator's events during `run`."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    return peak_of(profiler)


def peak_of(profiler: Any) -> float:
    """The highest sum of the allocator's events that a torch profiler has seen."""
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return float(peak)


def status_bytes(field: str) -> float:
    """A field of /proc/self/status in bytes."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field + ":"):
                return 1024.0 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}: resident memory can be measured on Linux only")


def reset_peak() -> None:
    """VmHWM, the most that was resident, begins again from what is now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
