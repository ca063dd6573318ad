"""Time of an optimizer's step by each rule, beside its matrix products alone and a training step.

    python -m tools.bench.rules                                   # one thread, processor time
    python -m tools.bench.rules --widths 64 --atoms 250 1000      # fewer

The parameters of an EGNN of three layers. `muon`, `soap` and `adamw` are whole steps of ours; SOAP's without
and with a refresh of its bases, which comes every `optim.refresh_every` steps. torch.optim.Muon has the same
matrices and nothing else. `products` are Muon's, 15 calls of torch.bmm for matrices of a shape. The training
step is conservative, 40 edges an atom, by one backward of the fused layers that keep what they need. Updates
are timed in turns, then training steps; of each the least of all rounds counts.

The share of Muon's update in a training step is measured, and derived: the operations of both over the rates
at which they ran beside 1,000 atoms (docs/training.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megagnn.models.potential import build_potential
from megagnn.optim.config import OptimConfig
from megagnn.optim.optimizer import make_sharded_optimizer
from megagnn.optim.rules.muon import NUM_ITERATIONS
from megagnn.optim.zero.optimizer import ShardedOptimizer
from megagnn.parallel.config import ParallelConfig
from megagnn.parallel.context import ParallelContext
from tools.bench import harness
from tools.bench.work import edge as workload

EDGES_PER_ATOM, BASE_ATOMS = 40, 1000
RATE = 1e-9  # so small that the weights stay what they were
SMALL_SHARE = 0.05
STEP = "megagnn save"  # the fastest one


def main() -> None:
    """Runs every width, and prints both tables."""
    args = harness.parse_args(
        __doc__,
        ("--widths", {"nargs": "+", "type": int, "default": (64, 128, 256, 512)}),
        ("--atoms", {"nargs": "+", "type": int, "default": (250, BASE_ATOMS)}),
        ("--step-rounds", {"type": int, "default": 5, "help": "rounds of training steps (default 5)"}),
        argv=["--threads", "1", "--clock", "cpu", "--rounds", "5", "--seconds", "20", *sys.argv[1:]],
    )
    records: list[harness.Record] = []
    for width in args.widths:
        found = harness.compare(update_case(width), args)
        few = argparse.Namespace(rounds=args.step_rounds, seconds=0.0)
        found += harness.compare(training_case(width, args.atoms), few)
        print(markdown(found), flush=True)
        records += found
    harness.report(records, args)


def update_case(width: int) -> harness.Case:
    """The updates of one width and Muon's products; its step is checked."""
    optimizers = {
        "muon": optimizer("muon", width),
        "soap": optimizer("soap", width, 10**9),
        "soap refresh": optimizer("soap", width, 1),
        "adamw": optimizer("adamw", width),
    }
    check(width)
    matrices = of_muon(optimizers["muon"])
    theirs, work = torch_muon(matrices), products(matrices)
    steps: dict[str, harness.Work | None] = {name: stepping(made) for name, made in optimizers.items()}
    steps["torch.optim.Muon"] = lambda: theirs.step()
    ceiling = harness.Ceiling("products", work, num_flops=update_flops(matrices))
    shape = {"F": width, "L": workload.DEPTH}
    return harness.Case("optimizer step", shape, "float32", steps, ceilings=[ceiling])


def training_case(width: int, atoms: Sequence[int]) -> harness.Case:
    """Training steps of one width, the first that of the most atoms."""
    steps: dict[str, harness.Work | None] = {}
    for num_atoms in sorted(atoms, reverse=True):
        steps[training_name(num_atoms)] = training_step(width, num_atoms)
    return harness.Case("training step", {"F": width, "L": workload.DEPTH}, "float32", steps)


def optimizer(rule: str, width: int, refresh_every: int = 10, rate: float = RATE) -> ShardedOptimizer:
    """Of a model of this width, with random gradients."""
    config = workload.model_config(width, "conservative", 5.0)
    model = build_potential(config, workload.statistics()).model
    optim = OptimConfig(rule=rule, learning_rate=rate, refresh_every=refresh_every)
    made = make_sharded_optimizer(model, optim, ParallelConfig(), ParallelContext())
    generator = torch.Generator().manual_seed(0)
    for unit in made.units:
        unit.grad_shard.normal_(generator=generator)
    made.step()  # SOAP's first finds its bases
    return made


def stepping(made: ShardedOptimizer) -> Callable[[], None]:
    """The step that a training loop calls."""
    return lambda: made.scaled_step(1.0)


def of_muon(made: ShardedOptimizer) -> list[tuple[Tensor, Tensor]]:
    """(weights, gradient) of each matrix."""
    return [(m.weight, m.of(unit.grad_shard)) for unit in made.units for m in unit.matrices]


def torch_muon(matrices: Sequence[tuple[Tensor, Tensor]], rate: float = RATE) -> torch.optim.Optimizer:
    """torch.optim.Muon on copies of these weights, with these gradients."""
    params = [nn.Parameter(weight.clone()) for weight, _ in matrices]
    for param, (_, gradient) in zip(params, matrices, strict=True):
        param.grad = gradient
    return torch.optim.Muon(params, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


def check(width: int) -> None:
    """One step of Muon against torch's, whose products are bfloat16; raises ValueError where they differ."""
    ours = optimizer("muon", width, rate=0.01)
    matrices = of_muon(ours)
    before, theirs = [weight.clone() for weight, _ in matrices], torch_muon(matrices, 0.01)
    theirs.step()
    ours.step()
    for (weight, _), old, want in zip(matrices, before, theirs.param_groups[0]["params"], strict=True):
        moved, wanted = weight - old, want.detach() - old
        error = float(torch.linalg.norm(moved - wanted) / torch.linalg.norm(wanted))
        if not error < 0.05:
            raise ValueError(f"muon, F = {width}: must move as torch's to 0.05, got {error:.2g}")


def products(matrices: Sequence[tuple[Tensor, Tensor]]) -> harness.Work:
    """Muon's products of all matrices of a shape at once, and nothing between them."""
    shapes: dict[tuple[int, ...], list[Tensor]] = {}
    for _, gradient in matrices:
        shapes.setdefault(tuple(gradient.shape), []).append(gradient / torch.linalg.norm(gradient))
    batches = [torch.stack(of_shape) for of_shape in shapes.values()]

    def work() -> None:
        for batch in batches:
            x = batch
            for _ in range(NUM_ITERATIONS):
                square = torch.bmm(x, x.mT)
                x = torch.bmm(torch.bmm(square, square), x)

    return work


def update_flops(matrices: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Of Muon's iterations as they are written, multiply-adds counted as 2."""
    sides = [sorted(weight.shape) for weight, _ in matrices]
    return float(sum(NUM_ITERATIONS * (4 * short**2 * long + 2 * short**3) for short, long in sides))


def training_step(width: int, num_atoms: int) -> harness.Work:
    """A conservative step with AdamW."""
    batch, cutoff = workload.dense_batch(EDGES_PER_ATOM * num_atoms, neighbours=EDGES_PER_ATOM)
    step = workload.make_step(STEP, batch, workload.model_config(width, "conservative", cutoff))
    assert step is not None
    return step


def training_name(num_atoms: int) -> str:
    """What the training step is called in the records."""
    return f"training step, {num_atoms} atoms"


def training_flops(width: int, num_atoms: float) -> float:
    """The products of a conservative step."""
    edges = round(EDGES_PER_ATOM * num_atoms)
    return workload.step_flops(STEP, "conservative", width, round(num_atoms), edges)


def markdown(records: Sequence[harness.Record]) -> str:
    """The least times of a width, their ratios, and the shares measured and derived."""
    least = {r.impl: min(r.round_seconds) for r in records}
    width, flops = records[0].shape["F"], 7 * records[0].shape["L"] * 30.0 * records[0].shape["F"] ** 3
    steps = {name: seconds for name, seconds in least.items() if name.startswith("training")}
    lines = [f"\nF = {width}", "", "| | ms | / products | GFLOP/s |", "|---|---|---|---|"]
    for name, seconds in least.items():
        rate = ""
        if name in ("muon", "products", "torch.optim.Muon"):
            rate = f"{flops / seconds / 1e9:.0f}"
        if name in steps:
            rate = f"{training_flops(width, atoms_of(name)) / seconds / 1e9:.0f}"
        lines.append(f"| {name} | {seconds * 1e3:.2f} | {seconds / least['products']:.2f} | {rate} |")
    base = training_name(BASE_ATOMS)
    if base not in steps:
        return "\n".join(lines)
    rest = steps[base] - least["adamw"]
    lines += ["", "| atoms | share measured | derived |", "|---|---|---|"]
    for name, seconds in steps.items():
        measured = least["muon"] / (seconds - least["adamw"] + least["muon"])
        derived = share(least["muon"], rest, width, atoms_of(name))
        lines.append(f"| {atoms_of(name):,} | {measured:.1%} | {derived:.1%} |")
    lines.append(f"\nbelow {SMALL_SHARE:.0%} from {smallest_batch(least['muon'], rest, width):,.0f} atoms on")
    return "\n".join(lines)


def atoms_of(name: str) -> int:
    """The inverse of `training_name`."""
    return int(name.split()[-2])


def share(update: float, rest: float, width: int, num_atoms: float) -> float:
    """Of the update in a step, from its seconds and those of the rest of a step of BASE_ATOMS."""
    grown = rest * training_flops(width, num_atoms) / training_flops(width, BASE_ATOMS)
    return update / (update + grown)


def smallest_batch(update: float, rest: float, width: int) -> float:
    """Atoms from which on the update's share is small; the head's products are of no account."""
    at_base = share(update, rest, width, BASE_ATOMS)
    return BASE_ATOMS * (1 / SMALL_SHARE - 1) / (1 / at_base - 1)


if __name__ == "__main__":
    main()
