"""A torch data set over one or several stores: structures of one split, with their neighbour lists."""

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from megagnn.data import keys
from megagnn.data.arrays import Bools, Ints
from megagnn.data.baseline import Baseline, Part, elements_of, fit_baseline, given_references
from megagnn.data.batch import Graph, build_graph, collate
from megagnn.data.edge_cache import EdgeCache
from megagnn.data.record import ISOLATED_DISTANCE
from megagnn.data.reference_file import References
from megagnn.data.references import NUM_ELEMENTS
from megagnn.data.store import Store, cached_num_edges, check_together

# Bounds the memory of statistics over all atoms of a split.
ROWS_AT_ONCE = 65536


class Location(NamedTuple):
    """Where a structure lies, and what a data set knows of it beside its store."""

    store: int
    row: int
    structure: int
    """Its number in the data set."""
    weight: float | None = None


@dataclass(frozen=True)
class StructureReader:
    """Structures by their places: what a process that reads them needs of a data set, without its tables of
    all structures, which would be copied to each."""

    stores: Sequence[Store]
    source_maps: Sequence[Ints]
    level_maps: Sequence[Ints]
    cutoff: float
    self_edges: bool
    caches: Sequence[EdgeCache | None]

    def record(self, place: Location) -> dict[str, Any]:
        """See `StructureDataset.record`."""
        k = place.store
        record = self.stores[k].structure(place.row)
        record[keys.SOURCE] = int(self.source_maps[k][record[keys.SOURCE]])
        record[keys.LEVEL] = int(self.level_maps[k][record[keys.LEVEL]])
        record[keys.STRUCTURE] = place.structure
        if place.weight is not None:
            weight = np.float32(place.weight)
            record[keys.WEIGHTS] = weight * record.get(keys.WEIGHTS, np.ones(3, np.float32))
        return record

    def graph(self, place: Location) -> Graph:
        """See `StructureDataset.__getitem__`."""
        record = self.record(place)
        geometry = (keys.ATOMIC_NUMBERS, keys.POSITIONS, keys.CELL, keys.PBC)
        numbers, positions, cell, pbc = (record[key] for key in geometry)
        cache = self.caches[place.store]
        known = None if cache is None else cache.get(place.row)
        graph = build_graph(numbers, positions, cell, pbc, self.cutoff, self.self_edges, known)
        if cache is not None and known is None:
            cache.put(place.row, graph[keys.EDGE_INDEX], graph[keys.CELL_SHIFTS])
        return {**record, **graph}

    def __getitems__(self, places: Sequence[Location]) -> list[Graph]:
        """Graphs of a batch: the name by which a DataLoader asks for them."""
        return [self.graph(place) for place in places]


class StructureDataset(Dataset[Graph]):
    """Structures of one split of one or several stores.

    The tables of sources and levels are merged by name over all structures of the stores, whatever the split,
    so that every split of the same stores has the same indices.

    Args:
        paths: directories of stores.
        split: "train", "valid", "test" or "all".
        cutoff: Å.
        self_edges: add the edge (i, i) to every atom.
        sources, levels: numbering to use instead, as of a trained model.
        as_source, as_level: take all structures for ones of this source and level, whatever the stores say.

    Attributes:
        sources, levels: names; batches hold indices into these.
        num_atoms, num_edges: (S,) int64 of each structure, for the sampler; edges include self edges.
        num_left_out: structures that were left out because the model does not know their elements.
        num_oversized: structures that were left out because they are larger than a batch may be.

    Raises:
        ValueError: no path, an unknown split, a source or level outside the given numbering, stores that must
            not be used together (see `check_together`), or see `Store.open`.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        split: str,
        cutoff: float,
        self_edges: bool = False,
        sources: Sequence[str] | None = None,
        levels: Sequence[str] | None = None,
        as_source: str | None = None,
        as_level: str | None = None,
    ) -> None:
        if not paths:
            raise ValueError("a data set needs at least one store")
        self.stores = [Store.open(path) for path in paths]
        check_together(self.stores)
        self.split, self.cutoff, self.self_edges = split, float(cutoff), self_edges
        source_tables = _tables([store.header.sources for store in self.stores], as_source)
        level_tables = _tables([store.header.levels for store in self.stores], as_level)
        self.sources = _merge(source_tables, sources, "source")
        self.levels = _merge(level_tables, levels, "level")
        self._source_maps = [_map(table, self.sources) for table in source_tables]
        self._level_maps = [_map(table, self.levels) for table in level_tables]
        chosen = [np.arange(len(s)) if split == "all" else s.indices(split) for s in self.stores]
        self._store_of = np.repeat(np.arange(len(self.stores)), [len(c) for c in chosen])
        self._index_in_store = np.concatenate(chosen)
        self.num_left_out = self.num_oversized = 0
        self._weights: NDArray[np.float32] | None = None
        self._caches: list[EdgeCache | None] = [None] * len(self.stores)
        self.num_atoms: Ints = self._of_stores([store.num_atoms for store in self.stores])
        self.num_edges: Ints = self._of_stores([cached_num_edges(s, self.cutoff) for s in self.stores])
        if self_edges:
            self.num_edges = self.num_edges + self.num_atoms

    def __len__(self) -> int:
        return len(self._index_in_store)

    def __getitem__(self, index: int) -> Graph:
        """The graph of one structure with its labels (see `build_graph`); its `structure` is `index`."""
        return self.reader().graph(self.place(int(index)))

    def record(self, index: int) -> dict[str, Any]:
        """One structure with its labels (see `Store.structure`), numbered as this data set; no neighbours."""
        return self.reader().record(self.place(index))

    def place(self, index: int) -> Location:
        """Where a structure lies."""
        if not 0 <= index < len(self):
            raise IndexError(f"structure {index} of a data set of {len(self)}")
        weight = None if self._weights is None else float(self._weights[index, 0])
        return Location(int(self._store_of[index]), int(self._index_in_store[index]), index, weight)

    def places(self, indices: Ints) -> list[Location]:
        """Where some structures lie."""
        chosen = (self._store_of[indices].tolist(), self._index_in_store[indices].tolist(), indices.tolist())
        if self._weights is None:
            return list(map(Location, *chosen))
        return list(map(Location, *chosen, self._weights[indices, 0].tolist()))

    def reader(self) -> StructureReader:
        """Reads structures as they are numbered now."""
        maps = (self._source_maps, self._level_maps)
        return StructureReader(self.stores, *maps, self.cutoff, self.self_edges, self._caches)

    def cache_edges(self, gigabytes: float, make: bool) -> None:
        """Keep neighbour lists beside the stores (`EdgeCache`).

        make: make the files, where they are not there: on one rank, before the others.
        """
        for k, store in enumerate(self.stores):
            counts = cached_num_edges(store, self.cutoff) + (store.num_atoms if self.self_edges else 0)
            self._caches[k] = EdgeCache.open(
                store, self.cutoff, self.self_edges, counts, int(gigabytes * 1e9), make
            )

    def without_cache(self) -> list[Path]:
        """Stores beside which no neighbour lists can be kept."""
        return [store.path for store, cache in zip(self.stores, self._caches, strict=True) if cache is None]

    def config_types(self) -> NDArray[np.str_]:
        """(S,) kind of each structure, as its file says (config_type); empty where it says none."""
        return self._of_stores([store.config_types() for store in self.stores])

    def files(self) -> NDArray[np.str_]:
        """(S,) name of the file that each structure was read from; empty where its store has but one."""
        return self._of_stores([store.files() for store in self.stores])

    def file_names(self) -> NDArray[np.str_]:
        """(S,) where each structure was read: its file, after its store where there are several."""
        if len(self.stores) == 1:
            return self.files()
        names = [store.path.name for store in self.stores]
        stores = names if len(set(names)) == len(names) else [str(store.path) for store in self.stores]
        pairs = zip(self._store_of, self.files(), strict=True)
        return np.array([f"{stores[k]}/{file}" if file else stores[k] for k, file in pairs])

    def source_names(self) -> NDArray[np.str_]:
        return self._of_stores([np.array(store.header.sources)[store.source] for store in self.stores])

    def _of_stores(self, columns: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """(S,) entries of this data set's structures, of (S_store,) columns of each store."""
        pairs = zip(columns, self._parts(), strict=True)
        return np.concatenate([column[rows] for column, (_, rows, _) in pairs])

    def weigh(self, sources: Mapping[str, float], config_types: Mapping[str, float]) -> None:
        """Multiply the weights of structures in the loss by those of their sources and kinds.

        Raises:
            ValueError: a name that no structure of the stores has, in any split.
        """
        known_types = {name for store in self.stores for name in (*store.header.config_types, "") if name}
        _check_names("data.source_weights", sources, self.sources)
        _check_names("data.config_type_weights", config_types, sorted(known_types))
        if not sources and not config_types:
            return
        weights = np.ones(len(self), dtype=np.float32)
        for names, given in ((self.source_names(), sources), (self.config_types(), config_types)):
            for name, weight in given.items():
                weights[names == name] *= weight
        self._weights = weights[:, None]

    def number_levels(self, first: Sequence[str]) -> None:
        """Number the levels of theory anew: these first, whether the data hold them or not."""
        self.levels = _merge([first, self.levels], None, "level")
        self._level_maps = [_map(store.header.levels, self.levels) for store in self.stores]

    def origin(self, index: int) -> tuple[Path, int]:
        """The store that holds a structure, and its number there."""
        return self.stores[int(self._store_of[index])].path, int(self._index_in_store[index])

    def origins(self) -> tuple[Ints, Ints]:
        """(S,) number of the store that holds each structure, and its number there."""
        return self._store_of, self._index_in_store

    def keep(self, indices: Ints) -> None:
        """Leave out all structures but these, which are numbered anew in the order of the data."""
        kept = np.sort(indices)
        self._store_of, self._index_in_store = self._store_of[kept], self._index_in_store[kept]
        self.num_atoms, self.num_edges = self.num_atoms[kept], self.num_edges[kept]
        self._weights = None if self._weights is None else self._weights[kept]

    def source_elements(self) -> tuple[Ints, ...]:
        """Atomic numbers of each source in this split, ascending; one array for each of `sources`."""
        return tuple(elements_of(self._parts(), len(self.sources)))

    def level_numbers(self) -> Ints:
        """(S,) index of each structure's level of theory in `levels`."""
        maps = zip(self._level_maps, self.stores, strict=True)
        return self._of_stores([numbers[store.level] for numbers, store in maps])

    def source_numbers(self) -> Ints:
        """(S,) index of each structure's source in `sources`."""
        maps = zip(self._source_maps, self.stores, strict=True)
        return self._of_stores([numbers[store.source] for numbers, store in maps])

    def first_with_elements(self, place: Ints, count: int) -> Ints:
        """Of each element in each source at each level of theory the first structures that hold it.

        Args:
            place: (S,) of each structure in the order in which they are taken.
            count: how many of each.
        """
        found, start = np.zeros((3, 0), dtype=np.int64), 0  # kind, place and number of structures
        for k, store, rows in self._row_blocks():
            holds = np.zeros((len(rows), NUM_ELEMENTS), dtype=np.bool_)
            numbers = store.of_atoms("atomic_numbers", rows)
            holds[np.repeat(np.arange(len(rows)), store.num_atoms[rows]), numbers] = True
            structure, element = np.nonzero(holds)
            level, source = self._level_maps[k][store.level[rows]], self._source_maps[k][store.source[rows]]
            kind = (level * len(self.sources) + source).astype(np.int64)[structure] * NUM_ELEMENTS + element
            more = np.stack([kind, place[start + structure], start + structure])
            found, start = np.concatenate([found, more], 1), start + len(rows)
            found = found[:, np.lexsort((found[1], found[0]))]
            found = found[:, np.arange(found.shape[1]) - np.searchsorted(found[0], found[0]) < count]
        return np.unique(found[2])

    def with_other_elements(self, known: Sequence[Collection[int]]) -> Bools:
        """(S,) whether a structure holds an atomic number that is not among those of its source."""
        table = np.ones((len(self.sources), NUM_ELEMENTS), dtype=np.bool_)
        for index, elements in enumerate(known):
            table[index, list(elements)] = False
        found = [np.zeros(0, dtype=np.bool_)]
        for k, store, rows in self._row_blocks():
            num_atoms, source = store.num_atoms[rows], self._source_maps[k][store.source[rows]]
            other = table[np.repeat(source, num_atoms), store.of_atoms("atomic_numbers", rows)]
            found.append(np.logical_or.reduceat(other, np.cumsum(num_atoms) - num_atoms))
        return np.concatenate(found)

    def force_squares(self) -> tuple[int, float]:
        """Number of labelled force components of this split and the sum of their squares, (eV/Å)^2."""
        count, total = 0, 0.0
        for _, store, rows in self._row_blocks():
            forces = store.of_atoms("forces", store.labelled(keys.FORCES, rows))
            count += forces.size
            total += float(np.square(forces, dtype=np.float64).sum())
        return count, total

    def has_free_forces(self) -> bool:
        """Whether some atom of this split has a force that counts: labelled, and not of an atom held fixed.

        It looks no further than the first such block of structures.
        """
        for _, store, rows in self._row_blocks():
            if not store.of_atoms("fixed", store.labelled(keys.FORCES, rows)).all():
                return True
        return False

    def _row_blocks(self) -> Iterator[tuple[int, Store, Ints]]:
        """Structures of this split as (number of the store, store, rows in it), ROWS_AT_ONCE at a time."""
        for k, (store, mine, _) in enumerate(self._parts()):
            for start in range(0, len(mine), ROWS_AT_ONCE):
                yield k, store, mine[start : start + ROWS_AT_ONCE]

    def num_labelled(self) -> dict[str, int]:
        """Structures of this split that have each label."""
        counts = dict.fromkeys(keys.LABELS, 0)
        for _, store, rows in self._row_blocks():
            for label in counts:
                counts[label] += len(store.labelled(label, rows))
        return counts

    def sources_with_energy(self) -> set[int]:
        """Sources of which some structure of this split has an energy."""
        found: set[int] = set()
        for k, store, rows in self._row_blocks():
            sources = store.source[store.labelled(keys.ENERGY, rows)]
            found |= set(self._source_maps[k][np.unique(sources)].tolist())
        return found

    def batch(
        self, indices: Sequence[int] | NDArray[np.integer], dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        return collate([self[int(i)] for i in indices], dtype)

    def baseline(self, given: References | None = None) -> Baseline:
        """References and shifts of this split (see `baseline.fit_baseline`).

        Args:
            given: reference energies by source, before those that the stores hold.
        """
        known = given_references(self.stores, given)
        return fit_baseline(self._parts(), self.sources, known, self._isolated_of_stores())

    def _parts(self) -> list[Part]:
        mine = [self._index_in_store[self._store_of == k] for k in range(len(self.stores))]
        return list(zip(self.stores, mine, self._source_maps, strict=True))

    def isolated_atoms(self) -> Bools:
        """(S,) bool, which structures of this split are isolated atoms."""
        return self._of_stores(self._isolated_of_stores())

    def _isolated_of_stores(self) -> list[Bools]:
        return [store.isolated_atoms(max(ISOLATED_DISTANCE, self.cutoff)) for store in self.stores]

    def warnings(self) -> list[str]:
        """What looked wrong in the stores when they were prepared, in words."""
        return list(dict.fromkeys(line for store in self.stores for line in store.header.warnings))


def _check_names(key: str, given: Mapping[str, float], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"nearest: '{near[0]}'" if near else f"the data have {', '.join(known) or 'none'}"
            raise ValueError(f"{key} names '{name}', which no structure of the data has; {hint}")


def _tables(tables: Sequence[Sequence[str]], name: str | None) -> Sequence[Sequence[str]]:
    """Tables of names in which every name is `name`, if there is one."""
    return tables if name is None else [[name] * len(table) for table in tables]


def _merge(tables: Sequence[Sequence[str]], given: Sequence[str] | None, what: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name for table in tables for name in table))
    if given is None:
        return names
    unknown = [name for name in names if name not in given]
    if unknown:
        raise ValueError(
            f"the data hold the {what}(s) {unknown}, the model knows {list(given)}; name the one that "
            f"applies with --{what}, where the data are prepared or to `megagnn evaluate`"
        )
    return tuple(given)


def _map(table: Sequence[str], merged: Sequence[str]) -> Ints:
    lookup: Mapping[str, int] = {name: i for i, name in enumerate(merged)}
    return np.array([lookup[name] for name in table], dtype=np.int64)


def nested_subset(dataset: StructureDataset, num_structures: int, seed: int) -> Ints:
    """Indices of `num_structures` structures: the head of one random order, which the seed gives.

    At its very head the order has isolated atoms, which fix references, and of each source the first labelled
    structures that show each element and each level of theory, with an energy where the source has any:
    without them a small subset would make a model that cannot be evaluated, for lack of an element or of a
    reference energy. They are a bias of the smallest subsets towards rare elements.

    Raises:
        ValueError: more structures than there are, or fewer than show every source and element.
    """
    if num_structures > len(dataset):
        raise ValueError(
            f"data.num_structures is {num_structures}, but the training split has {len(dataset)} structures; "
            "lower it, or leave it out to take them all"
        )
    order = np.random.default_rng((seed, 0x5CA1E)).permutation(len(dataset))
    first = _showing_all(dataset, order)
    if num_structures < len(first):
        raise ValueError(
            f"data.num_structures is {num_structures}, but it takes {len(first)} structures to show every "
            f"source, element and level of theory; use at least {len(first)}"
        )
    head = order[first]
    return np.concatenate([head, np.delete(order, first)])[:num_structures]


def _showing_all(dataset: StructureDataset, order: Ints) -> list[int]:
    """Positions in the order of the structures that show something new."""
    seen: set[tuple[int, str, int]] = set()
    first = []
    labelled, isolated = dataset.sources_with_energy(), dataset.isolated_atoms()
    for position, index in enumerate(order):
        record = dataset.record(int(index))
        source = record[keys.SOURCE]
        shown = {(source, "element", int(z)) for z in np.unique(record[keys.ATOMIC_NUMBERS])}
        shown.add((source, "level", record[keys.LEVEL]))
        if isolated[index]:
            first.append(position)
        elif (keys.ENERGY in record or source not in labelled) and not shown <= seen:
            first.append(position)
            seen |= shown
    return first
