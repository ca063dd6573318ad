"""The command `megagnn coordinate-check`: how much activations move in training, against width.

In the maximal-update parametrisation (models/parts.py) node features, energies and forces move in
each step by an amount that does not depend on the width; else some grow or fade, and the best learning rate
moves with them. So the slope of log size in log width should be near zero. After Yang et al., "Tensor
Programs V", arXiv:2203.03466, appendix D.1.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from megagnn.config import RunConfig, load_config
from megagnn.data import keys
from megagnn.models.potential import Potential, build_potential
from megagnn.models.statistics import Statistics, compute_statistics
from megagnn.objective.gradient_methods import GRADIENT_METHODS
from megagnn.objective.loss import Loss, label_counts
from megagnn.optim.optimizer import make_optimizer, set_learning_rate
from megagnn.parallel.context import ParallelContext
from megagnn.scaling.drawing import Drawn, colours, make_axes, save_figures, write_tensorboard
from megagnn.scaling.records import geometric_mean
from megagnn.train.loader import BatchLoader, open_split

PARAMETRISATIONS = ("standard", "mup")

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """Root mean square of one kind of activations, of a model after some steps."""

    parametrisation: str
    width: int
    seed: int
    step: int
    quantity: str
    """`layer 2` for its node features, `energy` of atoms in units of the output scale, `forces` in eV/Å."""
    value: float
    change: float
    """Size of the difference from step 0."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megagnn coordinate-check`."""
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="model, data and learning rate")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for figures and numbers")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256], metavar="F")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="of training (default: 8)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of initial weights (default: 3)")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="also write the figures there")


def run(arguments: argparse.Namespace) -> int:
    """`megagnn coordinate-check CONFIG.toml --out DIR [--widths F ...] [--steps N] [--seeds N]`."""
    for name in ("steps", "seeds"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    widths = sorted(set(arguments.widths))
    if len(widths) < 2 or widths[0] < 1:
        raise ValueError(f"--widths must be two or more different widths, got {arguments.widths}")
    config = load_config(arguments.config, [])
    batch, statistics = first_batch(config)
    jobs = [(p, w, s) for p in PARAMETRISATIONS for w in widths for s in range(arguments.seeds)]
    sizes: list[Size] = []
    for parametrisation, width, seed in tqdm(jobs, desc="coordinate check", unit="model", disable=None):
        model = replace(config.model, width=width, parametrisation=parametrisation)
        sizes += follow(replace(config, model=model), batch, statistics, arguments.steps, seed)
    found = slopes(sizes)
    drawn = draw(sizes)
    paths = save_figures([drawn], arguments.out)
    path = arguments.out / "coordinates.json"
    path.write_text(json.dumps({"slopes": found, "sizes": [asdict(s) for s in sizes]}, indent=1) + "\n")
    print("\n".join(describe(found)))
    for written in (*paths, path):
        print(f"wrote {written}")
    if arguments.tensorboard is not None:
        write_tensorboard([drawn], arguments.tensorboard)
    return 0


def first_batch(config: RunConfig) -> tuple[Batch, Statistics]:
    """The first batch of training, and the statistics of the training split."""
    context = ParallelContext()
    dataset = open_split(config.data, config.model, "train", context)
    statistics = compute_statistics(dataset)
    return next(BatchLoader(dataset, config, context, shuffle=True).batches()), statistics


def follow(config: RunConfig, batch: Batch, statistics: Statistics, num_steps: int, seed: int) -> list[Size]:
    """Sizes over some steps on one batch, at the full learning rate from the first step on."""
    potential = build_potential(config.model, statistics, seed=seed)
    optimizer, loss = make_optimizer(potential, config.optim), Loss(config.loss)
    method, context = GRADIENT_METHODS[config.train.gradient_method], ParallelContext()
    set_learning_rate(optimizer, config.optim.learning_rate)
    counts = label_counts(batch, context)
    start = activations(potential, batch)
    sizes: list[Size] = []
    for step in range(num_steps + 1):
        now = start if step == 0 else activations(potential, batch)
        for name, value in now.items():
            change = _rms(value - start[name])
            model = config.model
            sizes.append(Size(model.parametrisation, model.width, seed, step, name, _rms(value), change))
        if step < num_steps:
            optimizer.zero_grad()
            method(potential, batch, loss, counts)
            optimizer.clipped_step(optimizer.gradient_norm(context), config.optim.clip_norm)
    return sizes


def activations(potential: Potential, batch: Batch) -> dict[str, Tensor]:
    """Node features after each layer, energies of atoms, forces."""
    with _watched(potential) as seen:
        outputs = potential(batch)
    found = {name: value.detach().double() for name, value in seen.items()}
    if keys.FORCES in outputs:
        found["forces"] = outputs[keys.FORCES].detach().double()
    return found


@contextmanager
def _watched(potential: Potential) -> Iterator[dict[str, Tensor]]:
    """Fills the dict while the potential runs."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            if isinstance(output, dict | tuple):  # a state: its features come first
                output = next(iter(output.values() if isinstance(output, dict) else output))
            seen[name] = output

        return hook

    model = potential.model
    handles = [layer.register_forward_hook(keep(f"layer {k + 1}")) for k, layer in enumerate(model.layers)]
    assert model.energy_head is not None
    handles.append(model.energy_head.register_forward_hook(keep("energy")))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _rms(value: Tensor) -> float:
    return float(value.square().mean().sqrt())


def _means(sizes: Sequence[Size], parametrisation: str, quantity: str, step: int) -> Mapping[int, float]:
    """Geometric mean over seeds of the change (of the size at step 0), by width."""
    found: dict[int, list[float]] = {}
    for s in sizes:
        if (s.parametrisation, s.quantity, s.step) == (parametrisation, quantity, step):
            found.setdefault(s.width, []).append(s.change if step else s.value)
    return {w: geometric_mean([max(x, 1e-30) for x in v]) for w, v in sorted(found.items())}


def slopes(sizes: Sequence[Size]) -> dict[str, dict[str, float]]:
    """{parametrisation: {quantity: slope of log change in log width after the last step}}."""
    last = max(s.step for s in sizes)
    found: dict[str, dict[str, float]] = {}
    for s in sizes:
        by_width = _means(sizes, s.parametrisation, s.quantity, last)
        of = found.setdefault(s.parametrisation, {})
        if s.quantity not in of:
            x, y = np.log(list(by_width)), np.log(list(by_width.values()))
            of[s.quantity] = float(np.polyfit(x, y, 1)[0])
    return found


def describe(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A table of slopes."""
    quantities = list(next(iter(found.values())))
    width = max(len(q) for q in quantities)
    lines = [
        "Slope of log change in log width after the last step; near zero where the width does not matter:"
    ]
    lines.append(" " * width + "".join(f"{p:>12}" for p in found))
    for quantity in quantities:
        lines.append(f"{quantity:<{width}}" + "".join(f"{of[quantity]:>12.2f}" for of in found.values()))
    return lines


def draw(sizes: Sequence[Size]) -> Drawn:
    """Change against width, a line for each step: one row for each parametrisation."""
    quantities = list(dict.fromkeys(s.quantity for s in sizes))
    kinds = list(dict.fromkeys(s.parametrisation for s in sizes))
    steps = sorted({s.step for s in sizes})
    figure, axes = make_axes(len(quantities), len(kinds))
    figure.set_size_inches(2.5 * len(quantities) + 1.0, 2.5 * len(kinds) + 0.4)
    for index, ax in enumerate(axes):
        kind, quantity = kinds[index // len(quantities)], quantities[index % len(quantities)]
        if index >= len(quantities):  # one scale for both parametrisations
            ax.sharey(axes[index % len(quantities)])
        for colour, step in zip(colours(len(steps)), steps, strict=True):
            means = _means(sizes, kind, quantity, step)
            style = "--" if step == 0 else "-"
            ax.loglog(list(means), list(means.values()), style, color=colour, label=f"step {step}")
        ax.set_title(f"{quantity}, {kind}", fontsize=8)
        ax.set_xticks(list(means), [str(w) for w in means], fontsize=7)
        ax.minorticks_off()
        ax.tick_params(axis="y", labelsize=7)
        if index // len(quantities) == len(kinds) - 1:
            ax.set_xlabel("width", fontsize=8)
    axes[0].set_ylabel("change, rms", fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7, frameon=False)
    text = "Change of activations since step 0, rms; dashed, their size then. Flat: width does not matter."
    return Drawn("coordinates", "Coordinate check", figure, text)
