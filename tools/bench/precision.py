"""Time, memory and error of a training step in bfloat16, beside float32: the numbers of docs/precision.md.

    python -m tools.bench.precision --threads 1 --clock cpu
    python -m tools.bench.precision --edges 10000 --widths 64 --losses conservative --rounds 3

Batches, model and steps are those of tools/bench/edge_message.py: liquid-like metal, initial weights.
The errors are distances from the float64 model with the same, rounded weights, relative in the norm of all
numbers of a kind: forces, the gradient of a loss on energies and forces. "weights rounded" is that float64
model against the one whose weights were not rounded. Peak memory is that of tensors above what lives between
steps. Times are of steps in turns, in one process, and over that of the first variant.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from megagnn.data import keys
from megagnn.models.potential import build_potential
from tools.bench import harness
from tools.bench.memory.step import peak_of_events
from tools.bench.work import edge as workload

WIDTHS, EDGES = (64, 256), (10_000, 30_000)
# Precision and memory (a key of edge_workload.MEMORY) of each variant, the one compared with first.
VARIANTS = {
    "float32 save": ("float32", "save"),
    "float32 recompute": ("float32", "recompute"),
    "bfloat16 save": ("bfloat16", "save"),
    "bfloat16 recompute": ("bfloat16", "recompute"),
    "bfloat16 unfused": ("bfloat16", "unfused"),
}


@dataclass
class Row:
    """A variant: milliseconds, its time over float32's, peak bytes, errors of forces and gradient, cosine."""

    loss: str
    edges: int
    width: int
    variant: str
    milliseconds: float | None = None
    ratio: float | None = None
    peak_bytes: float | None = None
    force_error: float = 0.0
    gradient_error: float = 0.0
    cosine: float = 1.0


def main() -> None:
    """Runs the cases that the arguments ask for."""
    args = harness.parse_args(
        __doc__,
        ("--losses", {"nargs": "+", "choices": ("direct", "conservative"), "default": ("conservative",)}),
        ("--edges", {"nargs": "+", "type": int, "default": EDGES}),
        ("--widths", {"nargs": "+", "type": int, "default": WIDTHS}),
        ("--layers", {"type": int, "default": workload.DEPTH, "help": "of the model (default 3)"}),
    )
    rows: list[Row] = []
    for loss in args.losses:
        for edges in args.edges:
            for width in args.widths:
                found = measured(loss, edges, width, args.layers, args)
                print(markdown(found), flush=True)
                rows += found
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def measured(loss: str, edges: int, width: int, num_layers: int, args: Any) -> list[Row]:
    """One batch and width: all variants, errors first, then time and memory."""
    batch, cutoff = workload.dense_batch(edges)
    config = workload.model_config(width, loss, cutoff, num_layers)
    exact = results(step(config, "float64", "recompute", batch))
    rounded = results(step(config, "float64", "recompute", batch, weights="bfloat16"))
    rows = [with_errors(Row(loss, edges, width, "weights rounded"), rounded, exact)]
    steps = {name: step(config, precision, memory, batch) for name, (precision, memory) in VARIANTS.items()}
    for name, made in steps.items():
        against = rounded if name.startswith("bfloat16") else exact
        rows.append(with_errors(Row(loss, edges, width, name), results(made), against))
        rows[-1].peak_bytes = peak_of_events(made)
    case = harness.Case(f"{loss} step", {"E": edges, "F": width}, "mixed", dict(steps))
    for row, record in zip(rows[1:], harness.compare(case, args), strict=True):
        assert record.seconds is not None
        row.milliseconds, row.ratio = record.seconds * 1e3, record.ratio_to_ours
    del steps, case
    gc.collect()
    return rows


def step(
    config: Any, precision: str, memory: str, batch: dict[str, Tensor], weights: str | None = None
) -> workload.TrainingStep:
    """A step of the default weights, rounded to another type first where one is given."""
    config = dataclasses.replace(config, **workload.MEMORY[memory])
    potential = build_potential(config, workload.statistics(), 0, getattr(torch, precision))
    if weights is not None:
        with torch.no_grad():
            for p in potential.parameters():
                p.copy_(p.to(getattr(torch, weights)))
    geometry = potential.model.precision.geometry
    typed = {key: value.to(geometry) if value.is_floating_point() else value for key, value in batch.items()}
    return workload.TrainingStep(potential, typed, "one_backward")


def results(made: workload.TrainingStep) -> dict[str, Tensor]:
    """Forces and the whole gradient of a step, float64, flat."""
    made.optimizer.zero_grad(set_to_none=False)
    made.gradients()
    gradients = [p.grad.double().flatten() for p in made.model.parameters() if p.grad is not None]
    forces = made.model(made.batch)[keys.FORCES].detach()
    return {"forces": forces.double().flatten(), "gradient": torch.cat(gradients)}


def with_errors(row: Row, got: dict[str, Tensor], wanted: dict[str, Tensor]) -> Row:
    """Fills in the distances."""
    forces, gradient = ((got[key] - wanted[key]).norm() / wanted[key].norm() for key in wanted)
    cosine = torch.nn.functional.cosine_similarity(got["gradient"], wanted["gradient"], dim=0)
    row.force_error, row.gradient_error, row.cosine = float(forces), float(gradient), float(cosine)
    return row


def markdown(rows: list[Row]) -> str:
    """The rows of one case as a table."""
    first = rows[0]
    lines = [f"\nloss on {first.loss} forces, E = {first.edges}, F = {first.width}", ""]
    lines += [
        "| variant | ms | / float32 save | peak, MB | forces | gradient | 1 - cosine |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        time = "-" if row.milliseconds is None else f"{row.milliseconds:.0f}"
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}"
        errors = f"{row.force_error:.1e} | {row.gradient_error:.1e} | {1 - row.cosine:.0e}"
        lines.append(f"| {row.variant} | {time} | {ratio} | {peak} | {errors} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
