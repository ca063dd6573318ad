"""What tensor parallelism divides: memory of a rank, and what it sends, for each plan and number of ranks.

    python -m tools.bench.parallel --ranks 1 2 4 --width 256 --edges 30000

Starts the ranks on this machine over gloo. Every layout takes one training step on the same batch; losses are
compared first. Reported per rank (the largest of the ranks): parameters, gradients and AdamW's moments in
bytes; the peak of what the step allocated on top, from the allocator's own events; bytes sent, counted, which
must equal the family's formulas (`Model.traffic`). Seconds are left out on purpose: ranks that share
cores, and gloo, say nothing of machines with an interconnect.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megagnn.data import keys
from megagnn.models.costs import Setting
from megagnn.models.egnn.edge.operation import partition_edges
from megagnn.models.family import pass_elements
from megagnn.models.potential import build_potential
from megagnn.objective.gradient_methods import GRADIENT_METHODS
from megagnn.objective.loss import Loss, label_counts
from megagnn.optim.config import OptimConfig
from megagnn.optim.optimizer import make_optimizer
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.spawn import spawn
from tools.bench.memory.step import peak_of_events
from tools.bench.work import edge as edge_workload


def work(context: ParallelContext, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per plan and recomputation."""
    batch, cutoff = edge_workload.dense_batch(arguments.edges)
    plans = ("channel", "edge") if context.tp_size > 1 else ("auto",)
    memories = {"save": ("save", False), "block": ("recompute", False), "both": ("recompute", True)}
    rows = []
    for plan in plans:
        for name in arguments.recompute:
            memory, layers = memories[name]
            config = edge_workload.model_config(
                arguments.width,
                arguments.forces,
                cutoff,
                edge_memory=memory,
                recompute_layers=layers,
            )
            rows.append({"recompute": name, **step(context, batch, config, plan)})
    return rows


def step(context: ParallelContext, batch: Any, config: Any, plan: Any) -> dict[str, Any]:
    """Memory and traffic of a training step."""
    potential = build_potential(config, edge_workload.statistics(), context=context, plan=plan)
    loss = Loss(edge_workload.LossConfig(energy="mse", forces="mse"))
    counts = label_counts(batch, ParallelContext())
    value: list[float] = []

    def run() -> None:
        total, _ = GRADIENT_METHODS["one_backward"](potential, batch, loss, counts)
        value.append(float(total))

    run()  # gradients exist, libraries are loaded
    with context.traffic.measured() as sent:
        peak = peak_of_events(run)
    optimizer = make_optimizer(potential, OptimConfig())
    optimizer.step()
    parameters = sum(p.numel() * p.element_size() for p in potential.parameters())
    gradients = sum(p.grad.numel() * p.element_size() for p in potential.parameters() if p.grad is not None)
    moments = sum(piece.values.nbytes for piece in optimizer.pieces(potential) if piece.kind != "model")
    return {
        "tp": context.tp_size,
        "plan": plan if context.tp_size > 1 else "-",
        "loss": value[-1],
        "parameter_bytes": parameters,
        "gradient_bytes": gradients,
        "moment_bytes": moments,
        "peak_bytes": peak,
        "sent_bytes": int(sum(sent.bytes.values())),
        "formula_bytes": int(4 * formula(context, batch, config, plan)),
    }


def formula(context: ParallelContext, batch: Any, config: Any, plan: Any) -> Any:
    """Elements of the step by the formulas."""
    if context.tp_size == 1:
        return 0
    own, total = partition_edges(batch, context, plan).own_rows, 0
    num_atoms, num_edges = len(batch[keys.POSITIONS]), batch[keys.EDGE_INDEX].shape[1]
    conservative = config.forces == "conservative"
    for planes in (1, 2) if conservative else (1,):
        last = planes == 2 or not conservative
        setting = Setting(
            context.tp_size,
            planes,
            num_atoms,
            own.stop - own.start,
            num_edges,
            config.edge_memory == "recompute",
            config.recompute_layers,
            weights_wanted=last,
        )
        total += sum(pass_elements(config, plan, setting, 0 if last else 3 * num_atoms))
    return total


def main() -> None:
    """Measure, check, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--edges", type=int, default=30_000)
    parser.add_argument("--forces", choices=("conservative", "direct"), default="conservative")
    parser.add_argument("--recompute", nargs="+", choices=("save", "block", "both"), default=["save", "both"])
    parser.add_argument("--json", type=Path, help="also write the records here")
    arguments = parser.parse_args()
    records = []
    for ranks in arguments.ranks:
        by_rank = spawn(ranks, work, arguments, tp=ranks)
        for rows in zip(*by_rank, strict=True):
            for row in rows:
                if row["sent_bytes"] != row["formula_bytes"]:
                    raise ValueError(f"counted and derived traffic must be equal, got {row}")
            largest = {
                k: max(row[k] for row in rows) if k.endswith("bytes") else v for k, v in rows[0].items()
            }
            records.append(largest)
    losses = [row["loss"] for row in records]
    if max(losses) - min(losses) > 1e-4 * max(map(abs, losses)):
        raise ValueError(f"all layouts must give one loss, got {losses}")
    print_table(records)
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=2) + "\n")


def held_bytes(row: dict[str, Any]) -> int:
    """What lives between steps."""
    return int(row["parameter_bytes"] + row["gradient_bytes"] + row["moment_bytes"])


def print_table(records: list[dict[str, Any]]) -> None:
    """Markdown, sizes in MB, and each as a share of one rank's."""
    first = {row["recompute"]: row for row in records}
    first |= {row["recompute"]: row for row in reversed(records) if row["tp"] == records[0]["tp"]}
    print("| tp | plan | recomputed | weights, gradients, moments, MB | peak of the step, MB | sent, MB |")
    print("|---|---|---|---|---|---|")
    for row in records:
        base = first[row["recompute"]]
        held = held_bytes(row)
        share = (
            f" ({held / held_bytes(base):.2f})",
            f" ({row['peak_bytes'] / base['peak_bytes']:.2f})",
        )
        print(
            f"| {row['tp']} | {row['plan']} | {row['recompute']} | {held / 1e6:.1f}{share[0]} "
            f"| {row['peak_bytes'] / 1e6:.1f}{share[1]} | {row['sent_bytes'] / 1e6:.1f} |"
        )


if __name__ == "__main__":
    main()
