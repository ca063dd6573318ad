"""Errors of a potential on a split, and the command `megagnn evaluate`."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from megagnn.checkpoint.single_file import load_potential, open_checkpoint
from megagnn.config import RunConfig, flat_config
from megagnn.data import keys
from megagnn.data.dataset import StructureDataset
from megagnn.launch.context import parallel_context
from megagnn.models.potential import Potential
from megagnn.models.statistics import Statistics
from megagnn.objective.loss import Loss, label_counts
from megagnn.objective.terms import TERMS
from megagnn.parallel.config import ParallelConfig
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.world import sum_over_dp
from megagnn.train.loader import BatchLoader, open_split
from megagnn.train.metrics import ErrorSums, Grouping, ParityPoints, format_table, grouping
from megagnn.train.workers import deaths_explained


@dataclass(frozen=True)
class Evaluation:
    """Result of a pass over a split."""

    per_source: dict[str, dict[str, float]]
    """{source: metrics}, see `ErrorSums.per_source`."""
    loss: float
    """The loss over the whole split, as one batch would give it (nan without a loss)."""
    per_group: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """{"files": {name: metrics}, ...}, of the groupings asked for."""
    complete: bool = True
    """False where it was stopped; then there are no numbers."""


def evaluate(
    potential: Potential,
    loader: BatchLoader,
    context: ParallelContext,
    loss: Loss | None = None,
    progress: bool = False,
    parity: ParityPoints | None = None,
    stop: Callable[[], bool] = lambda: False,
    groupings: Mapping[str, Grouping] | None = None,
) -> Evaluation:
    """Errors over all structures of a loader, summed over ranks; the same on every rank.

    Args:
        loss: also evaluate this loss.
        progress: show a progress bar.
        parity: also collect points for a parity plot.
        stop: asked before every batch whether to give up; the same on all ranks.
        groupings: errors of these groups of structures, too.
    """
    groupings = groupings or {}
    sums = ErrorSums(potential, context, groupings)
    # loss terms times their counts, and the counts, so that batches of unequal size add up exactly
    totals = torch.zeros(2, len(TERMS), dtype=torch.float64, device=context.device)
    batches = loader.batches()
    if progress and context.is_main:
        batches = tqdm(
            batches, total=loader.sampler.num_batches(0), desc="evaluate", unit="batch", file=sys.stderr
        )
    with torch.no_grad():
        for batch, outputs in potential.predictions(_until(stop, batches)):
            sums.add(outputs, batch)
            if parity is not None:
                parity.add(outputs, batch)
            if loss is not None:
                totals += _loss_totals(loss, outputs, batch, context)
    if stop():
        return Evaluation({}, float("nan"), complete=False)
    sums.reduce()
    value = float("nan")
    if loss is not None:
        sum_over_dp(totals, context)
        weights = torch.tensor(list(loss.weights.values()), dtype=torch.float64, device=context.device)
        value = float((weights * totals[0] / totals[1].clamp(min=1)).sum())
    return Evaluation(sums.per_source(), value, {kind: sums.per_group(kind) for kind in groupings})


def _until(
    stop: Callable[[], bool], batches: Iterable[dict[str, torch.Tensor]]
) -> Iterator[dict[str, torch.Tensor]]:
    for batch in batches:
        if stop():
            return
        yield batch


def _loss_totals(
    loss: Loss, outputs: dict[str, torch.Tensor], batch: dict[str, torch.Tensor], context: ParallelContext
) -> torch.Tensor:
    """[[sum of each term], [its count]] of this rank's batch, (2, T)."""
    counts = label_counts(batch, ParallelContext(device=context.device))
    _, shares = loss(outputs, batch, counts)
    num = [counts.labels[term] for term in loss.weights]
    sums = [
        float(shares[term]) * n if term in shares else 0.0 for term, n in zip(loss.weights, num, strict=True)
    ]
    return torch.tensor([sums, num], dtype=torch.float64, device=context.device)


SPLITS = ("train", "valid", "test", "all")
TITLES = {"files": "file", "config_types": "config_type"}
"""Divisions of the structures beside that by source, and the titles of their tables."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megagnn evaluate`."""
    parser.add_argument("checkpoint", type=Path, help="a run's checkpoints/best, or an exported file")
    parser.add_argument("data", type=Path, nargs="+", help="packed store(s)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test")
    parser.add_argument("--source", help="take all structures for ones of this source of the model")
    parser.add_argument("--level", help="and for ones of this level of theory")
    parser.add_argument(
        "--skip-unknown",
        action="store_true",
        help="leave structures out that hold elements which the model does not know in their source",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the metrics here")
    parser.add_argument("--max-atoms", type=int, metavar="N", help="of a batch (default: as in training)")
    parser.add_argument("--max-edges", type=int, metavar="N", help="of a batch (default: as in training)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of a rank")
    parser.add_argument(
        "--tensor", type=int, default=1, metavar="N", help="divide the model over N ranks each (default: 1)"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw predictions against labels")
    parser.add_argument(
        "--last-weights", action="store_true", help="use the last weights instead of their average"
    )


def run(arguments: argparse.Namespace) -> int:
    """`megagnn evaluate CHECKPOINT DATA... [--json OUT]`: a table of errors beside the baselines."""
    if arguments.tensor < 1:
        raise ValueError(f"--tensor must be at least 1, got {arguments.tensor}")
    checkpoint = open_checkpoint(arguments.checkpoint)
    config = _config(checkpoint.config, arguments)
    names = ("checkpoint", "split", "source", "level", "skip_unknown", "last_weights", "plot", "tensor")
    fingerprint = {**flat_config(config), **{name: str(getattr(arguments, name)) for name in names}}
    # The layout of the training does not matter: a rank reads its slices of whole parameters.
    layout = ParallelConfig(tensor=arguments.tensor)
    with parallel_context(arguments.device, arguments.threads, layout, fingerprint) as context:
        dataset = _dataset(config, checkpoint.statistics, context, arguments)
        average = not arguments.last_weights
        potential = load_potential(checkpoint, average=average, context=context).to(context.device)
        loader = BatchLoader(dataset, config, context, shuffle=False)
        parity = ParityPoints(potential, context) if arguments.plot is not None else None
        with closing(loader), deaths_explained():
            result = evaluate(
                potential, loader, context, progress=True, parity=parity, groupings=_groupings(dataset)
            )
        if parity is not None:
            parity.save(arguments.plot)
        if context.is_main:
            _report(arguments, result, dataset)
            for line in loader.told():
                print(f"\n{line}")
    return 0


def _config(trained: RunConfig, arguments: argparse.Namespace) -> RunConfig:
    """The configuration of the run, with the data and the budget of batches that are asked for."""
    paths = tuple(map(str, arguments.data))
    same = [Path(path).resolve() for path in paths] == [Path(path).resolve() for path in trained.data.paths]
    data = dataclasses.replace(
        trained.data,
        paths=paths,
        max_atoms=arguments.max_atoms or trained.data.max_atoms,
        max_edges=arguments.max_edges or trained.data.max_edges,
        num_structures=trained.data.num_structures if same else None,  # a subset of the run's own data
    )
    return dataclasses.replace(trained, data=data)


def _dataset(
    config: RunConfig, statistics: Statistics, context: ParallelContext, arguments: argparse.Namespace
) -> StructureDataset:
    source, level = arguments.source, arguments.level
    if source is not None:
        levels = statistics.source_levels[statistics.source_index(source)]
        level = statistics.levels[levels[0]] if level is None and len(levels) == 1 else level
    if level is not None and level not in statistics.levels:
        raise ValueError(
            f"--level must be one of the model's levels of theory {list(statistics.levels)}, got '{level}'"
        )
    skip: bool = arguments.skip_unknown
    return open_split(config.data, config.model, arguments.split, context, statistics, source, level, skip)


def _groupings(dataset: StructureDataset) -> dict[str, Grouping]:
    """Divisions in which the structures fall apart, by file and by config_type."""
    found = {"files": grouping(dataset.file_names()), "config_types": grouping(dataset.config_types())}
    return {kind: groups for kind, groups in found.items() if len(groups.names) > 1}


def _report(arguments: argparse.Namespace, result: Evaluation, dataset: StructureDataset) -> None:
    num_left_out = dataset.num_left_out
    print(format_table(result.per_source))
    for kind, groups in result.per_group.items():
        print(f"\n{format_table(groups, TITLES[kind])}")
    if (num_labelled := dataset.num_labelled()[keys.FORCES]) and not dataset.has_free_forces():
        print(
            f"\nno errors of forces: all atoms of the {num_labelled:,} structures with forces are held fixed"
        )
    if num_left_out:
        print(f"\nleft out: {num_left_out:,} structures with elements that the model does not know")
    if arguments.json is not None:
        _write_json(arguments.json, arguments, result, dataset)


def _write_json(
    path: Path, arguments: argparse.Namespace, result: Evaluation, dataset: StructureDataset
) -> None:
    content = {
        "checkpoint": str(arguments.checkpoint),
        "data": [str(data) for data in arguments.data],
        "split": arguments.split,
        "sources": result.per_source,
        **result.per_group,
        "num_left_out": dataset.num_left_out,
        "num_oversized": dataset.num_oversized,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)
    print(f"wrote {path}")
