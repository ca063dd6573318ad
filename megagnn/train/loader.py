"""This rank's batches of one split, ready on its device."""

import atexit
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from megagnn.config import RunConfig
from megagnn.data.batch import Graph, collate
from megagnn.data.config import DataConfig
from megagnn.data.dataset import Location, StructureDataset, StructureReader, nested_subset
from megagnn.data.parcel import Parcel, Slots
from megagnn.data.sampler import Batch, BudgetSampler, exceeds
from megagnn.models.config import ModelConfig
from megagnn.models.precision import precision_of
from megagnn.models.statistics import Statistics
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.world import barrier
from megagnn.train import workers
from megagnn.train.signals import outlive_the_signal

Planner = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def open_split(
    data: DataConfig,
    model: ModelConfig,
    split: str,
    context: ParallelContext,
    statistics: Statistics | None = None,
    as_source: str | None = None,
    as_level: str | None = None,
    leave_out_unknown: bool | None = None,
) -> StructureDataset:
    """The structures of one split, with their edge counts.

    The main rank counts edges first and leaves the counts beside the data, so that the others only read them.

    Args:
        split: "train", "valid", "test", or "all".
        statistics: of a trained model, whose numbering of sources and levels the data set takes over.
        as_source, as_level: see `StructureDataset`.
        leave_out_unknown: leave structures out that hold elements that the model does not know in their
            source; false where a flag of the command would do so, for the message.

    Raises:
        ValueError: no data, an empty split, more structures wanted than there are, or a source, level or
            element that the model does not know.
    """
    if not data.paths:
        raise ValueError(
            "data.paths is empty; name a packed store, as made by `megagnn prepare` or `megagnn label`"
        )
    if not context.is_main:
        barrier(context)
    sources = statistics.sources if statistics else None
    levels = statistics.levels if statistics else None
    dataset = StructureDataset(
        data.paths, split, model.cutoff, model.has_self_edges, sources, levels, as_source, as_level
    )
    where = f"the {split} split of {', '.join(map(str, data.paths))}".replace("the all split", "all")
    if len(dataset) == 0:
        hint = "prepare the data with one, as by --split 0.8,0.1,0.1, or add a store that has it"
        if leave_out_unknown is not None:
            hint = "name another with --split, or all"
        raise ValueError(f"{where} is empty; {hint}")
    if data.cache_edges and context.is_main:
        dataset.cache_edges(data.cache_edges, make=True)
    if context.is_main:
        barrier(context)
    elif data.cache_edges:
        dataset.cache_edges(data.cache_edges, make=False)
    if split == "train" and data.num_structures is not None:
        dataset.keep(nested_subset(dataset, data.num_structures, data.subset_seed))
    if data.oversized == "skip":
        _leave_out_oversized(dataset, data, where)
    if statistics:
        _check_elements(dataset, statistics, where, leave_out_unknown)
    return dataset


def _leave_out_oversized(dataset: StructureDataset, data: DataConfig, where: str) -> None:
    over = exceeds(dataset.num_atoms, dataset.num_edges, data.max_atoms, data.max_edges)
    if over.all():
        raise ValueError(
            f"{where} holds {len(over)} structures, all of them larger than the budget of a batch, "
            f"data.max_atoms = {data.max_atoms} and data.max_edges = {data.max_edges}; raise it"
        )
    if over.any():
        dataset.keep(np.flatnonzero(~over))
        dataset.num_oversized = int(over.sum())


def _check_elements(
    dataset: StructureDataset, statistics: Statistics, where: str, leave_out: bool | None
) -> None:
    others = dataset.with_other_elements(statistics.source_elements)
    if not others.any():
        return
    if leave_out and others.all():
        raise ValueError(f"{where} holds no structure whose elements the model knows, of {len(others)}")
    if leave_out:
        dataset.keep(np.flatnonzero(~others))
        dataset.num_left_out = int(others.sum())
        return
    where = f"{where}, in {others.sum()} of {len(others)} structures,"
    way_out = None if leave_out is None else "leave these structures out with --skip-unknown"
    for index, elements in enumerate(dataset.source_elements()):
        statistics.check_elements(elements, index, where, way_out)


class BatchLoader:
    """Batches of a data set within the budget of atoms and edges, balanced over ranks and over the `per_step`
    batches of a step (data/sampler.py).

    They are made here or by processes (`data.num_workers`), which live until `close`: the same bits.
    """

    def __init__(
        self,
        dataset: StructureDataset,
        config: RunConfig,
        context: ParallelContext,
        shuffle: bool,
        per_step: int = 1,
    ) -> None:
        data = config.data
        self.dataset, self.context, self.num_workers = dataset, context, data.num_workers
        self.sampler = BudgetSampler(
            dataset.num_atoms,
            dataset.num_edges,
            max_atoms=data.max_atoms,
            max_edges=data.max_edges,
            max_structures=data.max_structures,
            dp_size=context.dp_size,
            dp_rank=context.dp_rank,
            seed=config.train.seed,
            shuffle=shuffle,
            per_step=per_step,
            sources=dataset.source_numbers() if data.mixing_temperature != 1 and shuffle else None,
            temperature=data.mixing_temperature if shuffle else 1.0,
            oversized=data.oversized,
        )
        precision = precision_of(config.train.dtype, config.train.geometry)
        self.collate = partial(collate, dtype=precision.geometry)
        self._on_gpu = context.device.type == "cuda"
        self.planner: Planner | None = None
        """`Model.planner`, to be given before batches are asked for."""
        self._wants_cache = data.cache_edges > 0
        self._feed = _Feed()
        self._loader: DataLoader[Parcel] | None = None
        self._slots: Slots | None = None
        # of a batch within the budget, in double precision, with a third to spare
        self._most_bytes = 80 * data.max_edges + 400 * data.max_atoms
        self._turn = 0

    def batches(
        self, epoch: int = 0, first: int = 0, first_structure: int = 0
    ) -> Iterator[dict[str, Tensor]]:
        """Batches of an epoch from the `first` on; as many on every rank, possibly without structures.

        Args:
            first_structure: the plan leaves out as many structures of the epoch.

        Raises:
            ReaderLostError: a process that reads data died.
        """
        self.sampler.check_position(epoch, first, first_structure)
        return self._made(self.sampler.batches_from(epoch, first, first_structure))

    def stream(
        self, epoch: int, step: int, first_structure: int
    ) -> Iterator[tuple[int, list[dict[str, Tensor]]]]:
        """Each step's epoch and batches, from a step of an epoch on and without end; see `batches`.

        What makes batches ahead does so beyond the end of an epoch, too.
        """
        size, epochs = self.sampler.per_step, deque[int]()

        def planned() -> Iterator[Batch]:
            yield from counted(self.sampler.batches_from(epoch, step * size, first_structure), epoch)
            for later in itertools.count(epoch + 1):
                yield from counted(self.sampler.batches_from(later, 0), later)

        def counted(batches: Iterator[Batch], number: int) -> Iterator[Batch]:
            for batch in batches:
                epochs.append(number)
                yield batch

        made = self._made(planned())
        while batches := list(itertools.islice(made, size)):
            numbers = [epochs.popleft() for _ in batches]
            yield numbers[0], batches

    def first_step(self) -> list[dict[str, Tensor]]:
        """The batches of the first step of all, made here."""
        return [
            self._make(batch)
            for batch in itertools.islice(self.sampler.batches_from(0, 0), self.sampler.per_step)
        ]

    def close(self) -> None:
        """End the processes that read data; they begin anew where batches are asked for again."""
        self._turn += 1
        atexit.unregister(self.close)
        loader, self._loader, self._slots = self._loader, None, None
        if loader is not None and loader._iterator is not None:
            # its own end is when nobody holds it, as a traceback may
            loader._iterator._shutdown_workers()  # type: ignore[attr-defined]

    def _make(self, batch: Batch) -> dict[str, Tensor]:
        reader = self.dataset.reader()
        made = self.collate(reader.__getitems__(self.dataset.places(batch)))
        if not self._on_gpu:
            return made
        return Parcel.of(_planned(made, self.planner), narrow=True).pin_memory().batch(self.context.device)

    def _made(self, plan: Iterator[Batch]) -> Iterator[dict[str, Tensor]]:
        if self.num_workers == "auto":
            yield from self._tried(plan)
        if self.num_workers == "auto" or self.num_workers == 0:
            yield from map(self._make, plan)
        else:
            yield from self._by_processes(plan, self.num_workers)

    def _tried(self, plan: Iterator[Batch]) -> Iterator[dict[str, Tensor]]:
        """Batches made here, until it is known how many processes are worth while."""
        busy = 1 if self._on_gpu else torch.get_num_threads()
        spare, size, begun = self.context.cores - busy, self.sampler.per_step, time.monotonic()
        if spare < 1:
            self.num_workers = 0
            return
        making, using = list[float](), list[float]()
        for batch in plan:
            start = time.monotonic()
            made = self._make(batch)
            ready = time.monotonic()
            yield made
            now = time.monotonic()
            making.append(ready - start)
            using.append(now - ready)
            if now - begun > workers.TRIAL_SECONDS and len(making) >= 2 * size:
                made_in, used_in = (workers.of_a_step(seconds, size) for seconds in (making, using))
                self.num_workers = workers.processes_needed(made_in, used_in, spare)
                return

    def _by_processes(self, plan: Iterator[Batch], num: int) -> Iterator[dict[str, Tensor]]:
        self._turn += 1
        turn, self._feed.places = self._turn, map(self.dataset.places, plan)
        with workers.deaths_explained():
            if self._loader is None:
                # before multiprocessing's own end, which signals processes that outlive signals
                atexit.register(self.close)
                # what is under way: two batches of each process, one that arrives, one to spare
                self._slots = None if self._on_gpu else Slots(2 * num + 2, self._most_bytes)
                maker = _Maker(self.dataset.reader(), self.collate, self.planner, self._slots)
                self._loader = DataLoader(
                    maker,  # type: ignore[arg-type] # has what is asked of it
                    batch_sampler=self._feed,  # type: ignore[arg-type]
                    collate_fn=_as_it_is,  # type: ignore[arg-type]
                    num_workers=num,
                    persistent_workers=True,
                    pin_memory=self._on_gpu,
                    # its own, so that to begin in the middle of an epoch changes no random state of the run
                    generator=torch.Generator(),
                    worker_init_fn=outlive_the_signal,
                    multiprocessing_context="spawn",
                )
            with workers.beginning():
                parcels = iter(self._loader)
            for parcel in parcels:
                arrived = parcel if self._slots is None else self._slots.receive(parcel)
                yield arrived.batch(self.context.device)
                if turn != self._turn:
                    raise RuntimeError("batches were asked for anew: those of before are no longer made")

    def told(self) -> list[str]:
        """What becomes of structures larger than a batch, and of `data.cache_edges`, in words."""
        split, told = self.dataset.split, []
        if self._wants_cache and (paths := self.dataset.without_cache()):
            where = ", ".join(map(str, paths))
            told.append(
                f"data.cache_edges: no neighbour lists can be kept in {where}; they are found each time"
            )
        if left_out := self.dataset.num_oversized:
            of_all = len(self.dataset) + left_out
            told.append(
                f"{left_out:,} of {of_all:,} structures of the {split} split are larger than the budget "
                'of a batch and left out (data.oversized = "skip")'
            )
        if alone := self.sampler.num_oversized:
            told.append(
                f"{alone:,} of {len(self.dataset):,} structures of the {split} split are larger than the "
                'budget of a batch and have one each (data.oversized = "alone"): the largest has '
                f"{self.dataset.num_atoms.max():,} atoms, {self.dataset.num_edges.max():,} edges are most"
            )
        return told

    def steps_left(self, num_epochs: int, epoch: int, first: int, first_structure: int) -> int:
        """Steps to the end of the first `num_epochs` epochs, from step `first` of an epoch whose plan leaves
        out `first_structure` structures."""
        if epoch >= num_epochs:
            return 0
        lengths = [self.sampler.num_batches(epoch, first_structure)]
        lengths += [self.sampler.num_batches(later) for later in range(epoch + 1, num_epochs)]
        return sum(-(-length // self.sampler.per_step) for length in lengths) - first

    def steps(self, epoch: int, first: int, first_structure: int = 0) -> Iterator[list[dict[str, Tensor]]]:
        """The batches of each step of an epoch, from step `first` on."""
        size = self.sampler.per_step
        batches = self.batches(epoch, first * size, first_structure)
        while step := list(itertools.islice(batches, size)):
            yield step


class _Feed:
    """What a DataLoader reads numbered places of batches from: those of another plan each time it begins."""

    def __init__(self) -> None:
        self.places: Iterator[list[Location]] = iter(())
        self._numbers = itertools.count()

    def __iter__(self) -> Iterator[tuple[int, list[Location]]]:
        return zip(self._numbers, self.places, strict=False)


@dataclass(frozen=True)
class _Maker:
    """What a process that reads has: it makes parcels of places."""

    reader: StructureReader
    collate: Callable[[list[Graph]], dict[str, Tensor]]
    planner: Planner | None
    slots: Slots | None

    def __getitems__(self, request: tuple[int, list[Location]]) -> Parcel:
        """A batch: the name by which a DataLoader asks for it."""
        number, places = request
        batch = _planned(self.collate(self.reader.__getitems__(places)), self.planner)
        return Parcel.of(batch, narrow=True) if self.slots is None else self.slots.send(batch, number)


def _planned(batch: dict[str, Tensor], planner: Planner | None) -> dict[str, Tensor]:
    return batch if planner is None else batch | planner(batch)


def _as_it_is(parcel: Parcel) -> Parcel:
    return parcel
