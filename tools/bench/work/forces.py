"""The work of bench/forces.py: a batch of training structures or of dense matter, and the steps on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from megagnn.config import RunConfig
from megagnn.data import keys
from megagnn.data.config import DataConfig
from megagnn.data.formats.packed import unpack_store
from megagnn.models.statistics import Statistics, compute_statistics
from megagnn.parallel.context import ParallelContext
from megagnn.train.loader import BatchLoader, open_split
from tools.bench.work import edge as workload

ROOT = Path(__file__).resolve().parents[3]
ARCHIVE, STORE = ROOT / "examples/data/three-sources.tar.xz", ROOT / "runs/data/three-sources"
LOSSES = {"energies": "none", "direct": "direct", "conservative": "conservative"}
BASELINE = "unfused layers"


@dataclasses.dataclass
class ForcesBatch:
    """A batch, and what a model of it must know; `small` is another batch, to warm up with."""

    batch: workload.Batch
    small: workload.Batch
    cutoff: float
    statistics: Statistics | None = None

    def step(self, name: str, forces: str, width: int, num_layers: int) -> workload.TrainingStep:
        """The training step of a variant of ours; `forces` as in ModelConfig."""
        config = workload.model_config(width, forces, self.cutoff, num_layers)
        made = workload.make_step(name, self.batch, config, self.statistics)
        assert made is not None, f"{name} is no variant of megagnn"
        return made

    @property
    def sizes(self) -> tuple[int, int]:
        """Atoms and edges."""
        return len(self.batch[keys.POSITIONS]), self.batch[keys.EDGE_INDEX].shape[1]

    def save(self, path: Path) -> None:
        """For a process of its own."""
        values = None if self.statistics is None else self.statistics.to_dict()
        torch.save((self.batch, self.small, self.cutoff, values), path)

    @classmethod
    def load(cls, path: Path) -> ForcesBatch:
        """The inverse of `save`."""
        batch, small, cutoff, values = torch.load(path, weights_only=True)
        return cls(batch, small, cutoff, None if values is None else Statistics.from_dict(values))


def dense(num_edges: int) -> ForcesBatch:
    """Liquid-like metal, see edge_workload."""
    batch, cutoff = workload.dense_batch(num_edges)
    return ForcesBatch(batch, workload.dense_batch(2000)[0], cutoff)


def real(num_edges: int) -> ForcesBatch:
    """The first batch of training on the embedded data with a budget of so many edges.

    Molecules and slabs of three sources within 5 Å; unpacked where the quickstart unpacks them.
    """
    if not (STORE / "header.json").is_file():
        unpack_store(ARCHIVE, STORE)
    model = workload.model_config(64, "conservative", 5.0)
    context, batches = ParallelContext(), []
    for budget in (num_edges, 4000):
        data = DataConfig(paths=(str(STORE),), max_atoms=num_edges, max_edges=budget)
        dataset = open_split(data, model, "train", context)
        loader = BatchLoader(dataset, RunConfig(model=model, data=data), context, shuffle=True)
        batches.append(next(iter(loader.batches())))
    return ForcesBatch(*batches, model.cutoff, compute_statistics(dataset))


def variants(loss: str) -> list[str]:
    """Names of what is compared, the default method first, the baseline last."""
    methods = ("one_backward", "create_graph") if loss == "conservative" else ("one_backward",)
    return [workload.our_name(memory, method) for method in methods for memory in workload.MEMORY]


def baseline(loss: str) -> str:
    """The usual way to save memory: torch's checkpoint around layers of plain operations."""
    return variants(loss)[-1]
