"""The command `megagnn coordinate-check`: how much activations move in training, against width and depth.

In the maximal-update parametrisation (models/parts.py) node features, energies and forces move in each step
by an amount that depends neither on the width nor on the number of layers; else some grow or fade, and the
best learning rate moves with them. So the slope of log change in log width, or in log layers, should be near
zero. After Yang et al., "Tensor Programs V", arXiv:2203.03466, appendix D.1.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor
from tqdm import tqdm

from megagnn.config import RunConfig, load_config
from megagnn.data import keys
from megagnn.drawing.figures import Drawn, colours, make_axes, save_figures, write_tensorboard
from megagnn.models.potential import Potential, build_potential
from megagnn.models.statistics import Statistics, compute_statistics
from megagnn.objective.gradient_methods import GRADIENT_METHODS, accumulate
from megagnn.objective.loss import Loss, label_counts
from megagnn.optim.optimizer import make_sharded_optimizer, set_learning_rate
from megagnn.parallel.config import ParallelConfig
from megagnn.parallel.context import ParallelContext
from megagnn.scaling.records import geometric_mean
from megagnn.train.loader import BatchLoader, open_split

PARAMETRISATIONS = ("standard", "mup")
LABELS = {"width": "width", "num_layers": "layers"}

Along = Literal["width", "num_layers"]
"""The key of [model] in which models differ."""
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """Root mean square of one kind of activations, of a model after some steps."""

    parametrisation: str
    width: int
    num_layers: int
    seed: int
    step: int
    quantity: str
    """`layer 2` or `last layer` for its node features, `energy` of atoms in units of the output scale,
    `forces` in eV/Å."""
    value: float
    change: float
    """Size of the difference from step 0."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megagnn coordinate-check`."""
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="model, data and learning rate")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for figures and numbers")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256], metavar="F")
    parser.add_argument(
        "--depths", type=int, nargs="+", default=[1, 4, 16], metavar="L", help="layers, at the file's width"
    )
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="of training (default: 8)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of initial weights (default: 3)")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="also write the figures there")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """`megagnn coordinate-check CONFIG.toml --out DIR [--optim.rule muon ...]`."""
    for name in ("steps", "seeds"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    ways: dict[Along, list[int]] = {"width": arguments.widths, "num_layers": arguments.depths}
    for name, values in zip(("widths", "depths"), ways.values(), strict=True):
        if len(set(values)) < 2 or min(values) < 1:
            raise ValueError(f"--{name} must be two or more different {name}, got {values}")
    config = load_config(arguments.config, overrides)
    batch, statistics = first_batch(config)
    jobs = [
        (along, replace(config.model, **{along: value, "parametrisation": kind}), seed)  # type: ignore[arg-type]
        for along, values in ways.items()
        for kind in PARAMETRISATIONS
        for value in sorted(set(values))
        for seed in range(arguments.seeds)
    ]
    sizes: dict[Along, list[Size]] = {along: [] for along in ways}
    for along, model, seed in tqdm(jobs, desc="coordinate check", unit="model", disable=None):
        sizes[along] += follow(replace(config, model=model), batch, statistics, arguments.steps, seed)
    sizes["num_layers"] = last_layers(sizes["num_layers"])
    found = {along: slopes(of, along) for along, of in sizes.items()}
    drawn = [draw(of, along) for along, of in sizes.items()]
    paths = save_figures(drawn, arguments.out)
    path = arguments.out / "coordinates.json"
    listed = {along: [asdict(s) for s in of] for along, of in sizes.items()}
    path.write_text(json.dumps({"slopes": found, "sizes": listed}, indent=1) + "\n")
    for along, of_kinds in found.items():
        print("\n".join(describe(of_kinds, along)))
    for written in (*paths, path):
        print(f"wrote {written}")
    if arguments.tensorboard is not None:
        write_tensorboard(drawn, arguments.tensorboard)
    return 0


def first_batch(config: RunConfig) -> tuple[Batch, Statistics]:
    """The first batch of training, and the statistics of the training split."""
    context = ParallelContext()
    dataset = open_split(config.data, config.model, "train", context)
    splines, by_level = config.model.pair_splines, config.model.level_embedding
    statistics = compute_statistics(dataset, pair_splines=splines, by_level=by_level)
    return next(BatchLoader(dataset, config, context, shuffle=True).batches()), statistics


def follow(config: RunConfig, batch: Batch, statistics: Statistics, num_steps: int, seed: int) -> list[Size]:
    """Sizes over some steps on one batch, at the full learning rate from the first step on."""
    potential = build_potential(config.model, statistics, seed=seed)
    method, loss = GRADIENT_METHODS[config.train.gradient_method], Loss(config.loss)
    context = ParallelContext()
    optimizer = make_sharded_optimizer(potential.model, config.optim, ParallelConfig(), context)
    set_learning_rate(optimizer, config.optim.learning_rate)
    counts = label_counts(batch, context)
    start = activations(potential, batch)
    sizes: list[Size] = []
    for step in range(num_steps + 1):
        now = start if step == 0 else activations(potential, batch)
        for name, value in now.items():
            change = _rms(value - start[name])
            model = config.model
            shape = (model.parametrisation, model.width, model.num_layers)
            sizes.append(Size(*shape, seed, step, name, _rms(value), change))
        if step < num_steps:
            optimizer.zero_grad()
            accumulate(method, potential, [batch], loss, counts, optimizer.reducer)
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


def last_layers(sizes: Sequence[Size]) -> list[Size]:
    """Of models of several depths what all have: the features after the last layer, energies, forces."""
    named = [replace(s, quantity="last layer") if s.quantity == f"layer {s.num_layers}" else s for s in sizes]
    return [s for s in named if not s.quantity.startswith("layer ")]


def _means(
    sizes: Sequence[Size], parametrisation: str, quantity: str, step: int, along: Along
) -> Mapping[int, float]:
    """Geometric mean over seeds of the change (of the size at step 0), by width or layers."""
    found: dict[int, list[float]] = {}
    for s in sizes:
        if (s.parametrisation, s.quantity, s.step) == (parametrisation, quantity, step):
            found.setdefault(getattr(s, along), []).append(s.change if step else s.value)
    return {at: geometric_mean([max(x, 1e-30) for x in v]) for at, v in sorted(found.items())}


def slopes(sizes: Sequence[Size], along: Along = "width") -> dict[str, dict[str, float]]:
    """{parametrisation: {quantity: slope of log change in log width or layers after the last step}}."""
    last = max(s.step for s in sizes)
    found: dict[str, dict[str, float]] = {}
    for s in sizes:
        means = _means(sizes, s.parametrisation, s.quantity, last, along)
        of = found.setdefault(s.parametrisation, {})
        if s.quantity not in of:
            x, y = np.log(list(means)), np.log(list(means.values()))
            of[s.quantity] = float(np.polyfit(x, y, 1)[0])
    return found


def describe(found: Mapping[str, Mapping[str, float]], along: Along = "width") -> list[str]:
    """A table of slopes."""
    quantities = list(next(iter(found.values())))
    width, label = max(len(q) for q in quantities), LABELS[along]
    lines = [f"Slope of log change in log {label} after the last step; near zero where it does not matter:"]
    lines.append(" " * width + "".join(f"{p:>12}" for p in found))
    for quantity in quantities:
        lines.append(f"{quantity:<{width}}" + "".join(f"{of[quantity]:>12.2f}" for of in found.values()))
    return lines


def draw(sizes: Sequence[Size], along: Along = "width") -> Drawn:
    """Change against width or layers, a line for each step: one row for each parametrisation."""
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
            means = _means(sizes, kind, quantity, step, along)
            style = "--" if step == 0 else "-"
            ax.loglog(list(means), list(means.values()), style, color=colour, label=f"step {step}")
        ax.set_title(f"{quantity}, {kind}", fontsize=8)
        ax.set_xticks(list(means), [str(w) for w in means], fontsize=7)
        ax.minorticks_off()
        ax.tick_params(axis="y", labelsize=7)
        if index // len(quantities) == len(kinds) - 1:
            ax.set_xlabel(LABELS[along], fontsize=8)
    axes[0].set_ylabel("change, rms", fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7, frameon=False)
    name, title = ("coordinates", "width") if along == "width" else ("coordinates-depth", "depth")
    text = f"Change of activations since step 0, rms; dashed, their size then. Flat: {title} does not matter."
    return Drawn(name, f"Coordinate check, {title}", figure, text)
