"""A new run that begins with the weights of a checkpoint: other data, other elements, other levels of theory.

The function is kept: weights, the output scale and the mean number of neighbours are the checkpoint's, rows
of embeddings are found by element and by level, and rows that the checkpoint lacks are added. On what the
checkpoint knows energies change by the reference energies alone, and forces not at all.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor

from megagnn.checkpoint.folder import FolderCheckpoint, follow
from megagnn.checkpoint.single_file import Checkpoint, open_checkpoint
from megagnn.config import InitConfig, RunConfig, config_from_dict, read_values
from megagnn.data.dataset import StructureDataset
from megagnn.data.reference_file import References
from megagnn.models.config import ModelConfig
from megagnn.models.pair_fit import pair_index
from megagnn.models.registry import presets_of
from megagnn.models.statistics import Statistics
from megagnn.optim.config import OptimConfig
from megagnn.optim.parts import share_of
from megagnn.optim.pieces import Piece
from megagnn.overrides import Change, change_of
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.world import broadcast_object

ELEMENTS, LEVELS = "element_embedding.weight", "level_embedding.weight"


def run_config(path: str | Path, overrides: Sequence[str] = (), resume: bool = False) -> RunConfig:
    """The configuration of a run from its file and overrides, see `complete_config`; raises as that and
    `config.load_config`."""
    return complete_config(read_values(path, overrides), resume)


def complete_config(values: dict[str, Any], resume: bool = False) -> RunConfig:
    """The configuration of nested values; with `init_from` what [model] leaves open is the checkpoint's.

    A run that goes on has written down its model and does not need the checkpoint that it began with.

    Raises:
        ValueError: see `config.config_from_dict`; a key of [model] that contradicts the checkpoint.
        FileNotFoundError: no checkpoint.
    """
    init_from = values.get("init_from")
    if not isinstance(init_from, str):
        return config_from_dict(values)
    given = values.get("model", {})
    preset = given.get("preset", "default") if isinstance(given, dict) else None
    if not isinstance(preset, str):
        return config_from_dict(values)  # which tells what is wrong with it
    values = {**values, "model": {**presets_of(given).get(preset, {}), **given}}
    own = Path(str(values.get("out_dir", RunConfig.out_dir))).expanduser() / "config.json"
    if resume and own.is_file():
        return _with_model(values, _model_of_run(own), str(own))
    try:
        return _with_model(values, open_checkpoint(Path(init_from).expanduser()).config.model, init_from)
    except FileNotFoundError:
        if not own.is_file():
            raise
        return _with_model(values, _model_of_run(own), str(own))  # torchrun starts a run again


def check_model(own: ModelConfig, other: ModelConfig, where: str) -> None:
    """Raises ValueError if a model is another function than that of a checkpoint."""
    if own.family != other.family:
        raise _differs("family", own.family, other.family, where)
    for field in dataclasses.fields(own):
        got, want = getattr(own, field.name), getattr(other, field.name)
        by_energy = field.name == "forces" and got != "direct"
        change = change_of(RunConfig, f"model.{field.name}")
        is_bound = Change.REFUSED in change and Change.FREE not in change
        if got != want and is_bound and not by_energy:
            raise _differs(field.name, got, want, where)


def _differs(key: str, got: Any, want: Any, where: str) -> ValueError:
    return ValueError(
        f"model.{key} is {got!r} in the configuration and {want!r} in {where}, with whose weights the run "
        "begins; leave it out, or give it that value"
    )


@dataclass(frozen=True)
class Beginning:
    """The checkpoint that a new run begins with."""

    checkpoint: Checkpoint | FolderCheckpoint
    settings: InitConfig

    @classmethod
    def open(cls, config: RunConfig, context: ParallelContext) -> Beginning | None:
        """The checkpoint of `init_from`; None without one. All ranks read the one that the main rank finds
        behind a link.

        Raises:
            ValueError: not a checkpoint, a damaged one, or one of another model.
            FileNotFoundError: no such file.
        """
        if config.init_from is None:
            return None
        path = Path(broadcast_object(str(follow(Path(config.init_from).expanduser())), context))
        checkpoint = open_checkpoint(path)
        check_model(config.model, checkpoint.config.model, str(checkpoint.path))
        return cls(checkpoint, config.init)

    def references(self, given: References | None, dataset: StructureDataset) -> References | None:
        """References that are known before a fit: a user's own, and before those what is kept.

        Raises:
            ValueError: a source that the checkpoint does not have.
        """
        self._check_names(dataset)
        kept = self._kept(dataset.sources)
        if not kept:
            return given
        own = given or {}
        return {**own, **{name: {**row, **own.get(name, {})} for name, row in kept.items()}}

    def _kept(self, sources: Sequence[str]) -> References:
        """References of the checkpoint that stay, by the new run's sources."""
        settings, where = self.settings, str(self.checkpoint.path)
        if settings.references == "fit":
            return {}
        return known_references(self.checkpoint.statistics, sources, settings.new_sources, where)

    def statistics(self, fitted: Statistics, given: References | None) -> Statistics:
        """Those of the new run, of those fitted on its training split and those of the checkpoint.

        Elements and levels of theory of the checkpoint stay, so that it can still be used there; sources are
        those of the data.

        given: what `references` gave for the fit.
        """
        old, settings = self.checkpoint.statistics, self.settings
        elements = tuple(sorted({*old.elements, *fitted.elements}))
        found = dataclasses.replace(
            fitted,
            elements=elements,
            references=tuple(spread(row, fitted.elements, elements) for row in fitted.references),
            unspanned=tuple(
                tuple(spread(row, fitted.elements, elements) for row in rows) for rows in fitted.unspanned
            ),
            mean_neighbours=old.mean_neighbours,
            output_scale=old.output_scale,
            **self._pairs(elements, fitted.levels, fitted.sources),
        )
        kept = self._kept(fitted.sources)
        known = {name: {**row, **(given or {}).get(name, {})} for name, row in kept.items()}
        return with_known(found, old, known, settings.new_sources) if known else found

    def _pairs(
        self, elements: Sequence[int], levels: Sequence[str], sources: Sequence[str]
    ) -> dict[str, Any]:
        """Pair potentials of the checkpoint for more elements, which have none, and for these levels of
        theory and sources: one that it lacks begins as another or as the mean of all."""
        old, settings = self.checkpoint.statistics, self.settings
        if not old.pair_weights:
            return {}
        first, second = np.tril_indices(len(old.elements))
        kind = np.searchsorted(elements, old.elements)
        weights = torch.tensor(old.pair_weights, dtype=torch.float64)
        constants = torch.tensor(old.pair_constants, dtype=torch.float64)
        num_pairs = len(elements) * (len(elements) + 1) // 2
        wide = weights.new_zeros(len(weights), num_pairs, weights.shape[-1])
        wide[:, pair_index(kind[first], kind[second])] = weights
        wide_constants = constants.new_zeros(len(constants), len(elements))
        wide_constants[:, kind] = constants
        if self.checkpoint.config.model.level_embedding:
            wide = _rows(wide, old.levels, levels, settings.new_levels)
        wide_constants = _rows(wide_constants, old.sources, sources, settings.new_sources)
        pair_weights = tuple(tuple(map(tuple, rows)) for rows in wide.tolist())
        return {"pair_weights": pair_weights, "pair_constants": tuple(map(tuple, wide_constants.tolist()))}

    def _check_names(self, dataset: StructureDataset) -> None:
        old, settings, where = self.checkpoint.statistics, self.settings, self.checkpoint.path
        symbols = [chemical_symbols[z] for z in old.elements]
        own = [
            chemical_symbols[z] for z in sorted({int(z) for row in dataset.source_elements() for z in row})
        ]
        tables: list[tuple[str, Mapping[str, str], Sequence[str], Sequence[str], str]] = [
            ("new_elements", settings.new_elements, own, symbols, "element"),
            ("new_levels", settings.new_levels, dataset.levels, old.levels, "level of theory"),
            ("new_sources", settings.new_sources, dataset.sources, old.sources, "source"),
        ]
        for key, pairs, ours, theirs, what in tables:
            for new, known in pairs.items():
                if new not in ours:
                    raise ValueError(
                        f"init.{key} names the {what} '{new}', which the training data do not hold; they "
                        f"hold {', '.join(ours)}"
                    )
                if known not in theirs:
                    raise ValueError(
                        f"init.{key} begins the {what} '{new}' as '{known}', which {where} does not know; it "
                        f"knows {', '.join(theirs)}"
                    )
                if new in theirs and key != "new_sources":
                    raise ValueError(
                        f"init.{key} names the {what} '{new}', whose row {where} holds already; leave it out"
                    )

    def fill(self, pieces: Sequence[Piece], statistics: Statistics) -> None:
        """Weights and their moving average, which begins with them, in a rank's pieces of any layout.

        Raises:
            ValueError: the checkpoint is of another model.
        """
        kind = self.settings.weights
        for wanted in ("model", "average"):
            mine = [piece for piece in pieces if piece.kind == wanted]
            rest = [piece for piece in mine if piece.name not in (ELEMENTS, LEVELS)]
            self._load([dataclasses.replace(piece, kind=kind) for piece in rest])
            for piece in mine:
                if piece.name == ELEMENTS:
                    _copy(piece, self._element_rows(statistics))
                elif piece.name == LEVELS:
                    _copy(piece, self._level_rows(statistics, piece.layout.full_shape[1]))

    def _load(self, pieces: Sequence[Piece]) -> None:
        if isinstance(self.checkpoint, FolderCheckpoint):
            self.checkpoint.load(pieces)
            return
        for piece in pieces:
            _copy(piece, self._whole(piece.name))

    def _whole(self, name: str) -> Tensor:
        key = f"{self.settings.weights}/{name}"
        if isinstance(self.checkpoint, FolderCheckpoint):
            return self.checkpoint.whole_tensor(key)
        if key not in self.checkpoint.tensors:
            raise ValueError(f"checkpoint {self.checkpoint.path} does not fit the model: missing {key}")
        return self.checkpoint.tensors[key]

    def _element_rows(self, statistics: Statistics) -> Tensor:
        """(elements, F): those of the checkpoint, and new ones as another element's or the mean of all."""
        alike = {atomic_numbers[a]: atomic_numbers[b] for a, b in self.settings.new_elements.items()}
        old = self.checkpoint.statistics.elements
        return _rows(self._whole(ELEMENTS), old, statistics.elements, alike)

    def _level_rows(self, statistics: Statistics, width: int) -> Tensor:
        """The same for levels of theory; a checkpoint with one level has no table, which is one of zeros."""
        old = self.checkpoint.statistics.levels
        has_table = self.checkpoint.config.model.level_embedding and len(old) > 1
        table = self._whole(LEVELS) if has_table else torch.zeros(len(old), width)
        return _rows(table, old, statistics.levels, self.settings.new_levels)

    def describe(self, statistics: Statistics) -> str:
        old, settings = self.checkpoint.statistics, self.settings
        new = [chemical_symbols[z] for z in statistics.elements if z not in old.elements]
        new_elements = [f"{s} (as {settings.new_elements.get(s, 'the mean of all')})" for s in new]
        levels = [name for name in statistics.levels if name not in old.levels]
        names = ", ".join(self._kept(statistics.sources))
        kept = f"kept for {names}, fitted for others" if names else "fitted anew"
        new_levels = [f"{n} (as {settings.new_levels.get(n, 'the mean of all')})" for n in levels]
        return (
            f"begins with the {'averaged ' if settings.weights == 'average' else ''}weights of "
            f"{self.checkpoint.path}, step {self.checkpoint.progress.step}; new elements: "
            f"{', '.join(new_elements) or 'none'}; new levels of theory: {', '.join(new_levels) or 'none'}; "
            f"references {kept}"
        )

    def warnings(self, statistics: Statistics, optim: OptimConfig) -> list[str]:
        old = self.checkpoint.statistics
        tables = [(old.elements, statistics.elements, ELEMENTS), (old.levels, statistics.levels, LEVELS)]
        return [
            line for known, now, name in tables for line in _stay(known, now, name, name.split(".")[0], optim)
        ]


def _stay(known: Sequence[Any], now: Sequence[Any], name: str, part: str, optim: OptimConfig) -> list[str]:
    """A warning if rows of a table that the checkpoint lacks are not trained."""
    new = [chemical_symbols[row] if name == ELEMENTS else row for row in now if row not in known]
    if not new or share_of(name, optim) > 0:
        return []
    return [
        f"{part} is frozen, so its rows of {', '.join(new)}, which the checkpoint lacks, stay as they begin: "
        "copies of others, or their mean; leave it out of optim.freeze to train them"
    ]


def _with_model(values: dict[str, Any], model: ModelConfig, where: str) -> RunConfig:
    """The configuration of these values, with what [model] leaves open from another model."""
    family = values["model"].get("family", model.family)
    if family != model.family:
        raise _differs("family", family, model.family, where)
    config = config_from_dict({**values, "model": {**dataclasses.asdict(model), **values["model"]}})
    check_model(config.model, model, where)
    return config


def _model_of_run(path: Path) -> ModelConfig:
    try:
        return config_from_dict(json.loads(path.read_text())).model
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}, the configuration of the run, cannot be read: {error}") from None


def _rows(table: Tensor, old: Sequence[Any], new: Sequence[Any], alike: Mapping[Any, Any]) -> Tensor:
    """A table with the rows of `old` in the order of `new`; others as the row of `alike`, or their mean."""
    table = table.double()
    rows = {name: table[index] for index, name in enumerate(old)}
    mean = table.mean(0)
    return torch.stack([rows.get(name, rows[alike[name]] if name in alike else mean) for name in new])


@torch.no_grad()
def _copy(piece: Piece, whole: Tensor) -> None:
    if tuple(whole.shape) != piece.layout.full_shape:
        raise ValueError(
            f"the checkpoint does not fit the model: {piece.name} is {tuple(whole.shape)}, the model has "
            f"{piece.layout.full_shape}"
        )
    piece.values.copy_(piece.layout.slice_of(whole).reshape(-1)[piece.begin : piece.end])


def known_references(
    old: Statistics, sources: Sequence[str], new_sources: Mapping[str, str], where: str
) -> References:
    """What another model adds for an atom of each element that its source knows, for those of these sources
    that it has.

    Args:
        old: of the checkpoint.
        sources: of the training data.
        new_sources: {new: old}; a source that is not named keeps those of the same name.
        where: name of the checkpoint.

    Raises:
        ValueError: the checkpoint has none of the sources.
    """
    found: References = {}
    for name in sources:
        old_name = new_sources.get(name, name)
        if old_name in old.sources:
            at = old.sources.index(old_name)
            energies = dict(zip(old.elements, old.baseline()[at], strict=True))
            found[name] = {chemical_symbols[z]: energies[z] for z in old.source_elements[at]}
    if not found:
        raise ValueError(
            f"init.references is 'keep', but {where} has no source '{sources[0]}', it has "
            f'{", ".join(old.sources)}; name one by init.new_sources = {{"{sources[0]}" = '
            f'"{old.sources[0]}"}}, or set init.references = "fit"'
        )
    return found


def with_known(
    found: Statistics, old: Statistics, known: References, new_sources: Mapping[str, str]
) -> Statistics:
    """Statistics of which some sources have these references, and know these elements, too.

    found: of the new run, fitted with `known` as given references; its elements are those of both models. The
    old shifts are in `known` already; what the old training data left open stays open.
    """
    references, elements = list(found.references), list(found.source_elements)
    shifts, unspanned = list(found.shifts), list(found.unspanned)
    for index, name in enumerate(found.sources):
        if name not in known:
            continue
        row = {atomic_numbers[symbol]: energy for symbol, energy in known[name].items()}
        fitted = dict(zip(found.elements, found.references[index], strict=True))
        references[index] = tuple(row.get(z, fitted[z]) for z in found.elements)
        elements[index] = tuple(sorted({*found.source_elements[index], *row}))
        shifts[index] = 0.0
        still_open = old.unspanned[old.sources.index(new_sources.get(name, name))] if old.unspanned else ()
        unspanned[index] += tuple(spread(values, old.elements, found.elements) for values in still_open)
    return dataclasses.replace(
        found,
        references=tuple(references),
        source_elements=tuple(elements),
        shifts=tuple(shifts),
        unspanned=tuple(unspanned),
    )


def spread(row: Sequence[float], old: Sequence[int], new: Sequence[int]) -> tuple[float, ...]:
    """Numbers of some elements as numbers of more, zero for the others."""
    found = dict(zip(old, row, strict=True))
    return tuple(found.get(z, 0.0) for z in new)
