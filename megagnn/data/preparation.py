"""From files to a packed store: read, check, split, write, and remember where everything came from."""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from numpy.typing import NDArray
from tqdm import tqdm

from megagnn.data.copies import Copies
from megagnn.data.formats import ReadOptions, UnreadableError, detect_format, read_structures
from megagnn.data.formats.packed import store_header
from megagnn.data.plausibility import LabelCheck
from megagnn.data.record import (
    ISOLATED_DISTANCE,
    NEARLY_ISOLATED,
    Rules,
    Structure,
    StructureError,
    check_structure,
    is_isolated_atom,
    is_nearly_isolated,
    isolated_group,
)
from megagnn.data.reference_file import EVERY_SOURCE, References, for_sources
from megagnn.data.sides import Sides
from megagnn.data.split import DEFAULT_FRACTIONS, FIXED_PREFIXES, SPLITS, without_prefix
from megagnn.data.store import StoreHeader, write_store
from megagnn.data.store_format import GROUPS_FILE, sha256_of

NO_NAMES_WARNING = (
    "warning: {path} was made before names of groups were stored, so the new split cannot see that two of "
    "its sources hold the same molecule. Prepare it again from its files to be sure."
)

GIVEN = "the file of reference energies"

FEW_SINGLE_ATOMS = 0.1
"""Share of a source: single atoms that are more are its crystals."""


@dataclass(frozen=True)
class Input:
    """One file to read, and the side of the split it is made for: "valid" or "test", None for neither."""

    path: Path
    source: str | None = None
    side: str | None = None


@dataclass
class Preparation:
    """Everything `prepare` does, apart from the command line.

    Attributes:
        inputs: files, in order.
        options: of every reader; an input's own source name comes before `options.source`.
        format: of every file, or None to detect it.
        rules: structures must meet.
        fractions: of train, valid and test; where a source has a test file, valid is carved out of the rest.
        seed: of the split.
        keep_splits: structures read from stores stay on the side they were on; only others are drawn.
        references: reference energies by source, eV, which the store will hold.
        isolated_distance: Å, from which a single atom is isolated of its images.
        accept_labels: write the store although its labels are surely wrong (see `Audit`).
        skip_bad: leave structures that break a rule or cannot be read out and count them, rather than stop.
        keep_unconverged: keep structures whose electronic steps did not converge, which are else left out and
            counted.
        progress: show a progress bar (only ever on a terminal).
    """

    inputs: Sequence[Input]
    options: ReadOptions = field(default_factory=ReadOptions)
    format: str | None = None
    rules: Rules = field(default_factory=Rules)
    fractions: tuple[float, ...] = DEFAULT_FRACTIONS
    seed: int = 0
    keep_splits: bool = True
    references: References = field(default_factory=dict)
    isolated_distance: float = ISOLATED_DISTANCE
    accept_labels: bool = False
    skip_bad: bool = False
    keep_unconverged: bool = False
    progress: bool = False
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)
    warnings: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not self.isolated_distance > 0:
            raise ValueError(
                f"isolated_distance must be a positive number of Å, got {self.isolated_distance:g}"
            )

    def write(self, out: str | Path, overwrite: bool = False) -> StoreHeader:
        """Read, check, split and write; on any error nothing remains.

        Raises:
            ValueError: see the readers, `check_structure`, `Audit.check`, `split_groups` and `write_store`.
        """
        for entry in self.inputs:
            detect_format(entry.path)  # a missing file is told before an hour of reading the others
        description = {
            "method": "whole groups in an order drawn by the seed, each to the split lacking most structures",
            "fractions": list(self.fractions),
            "seed": self.seed,
            "group_by": self.options.group_by,
            "test_files": [entry.path.name for entry in self.inputs if entry.side == "test"],
            "valid_files": [entry.path.name for entry in self.inputs if entry.side == "valid"],
        }
        stores = [entry.path for entry in self.inputs if self._is_store(entry)]
        if stores and self.keep_splits:
            description = {
                "kept": {path.name: store_header(path).split for path in stores},
                "others": description if len(stores) < len(self.inputs) else None,
            }
        self.provenance, self.warnings = {}, []
        self._num_named = Counter(entry.path.name for entry in self.inputs)
        self._sides = Sides(self.fractions, self.seed)
        self._audit = Audit(self.options.units.of)
        references: References = {}
        return write_store(
            out,
            self._structures(references),
            splits=self._split,
            provenance=self.provenance,
            split_description=description,
            warnings=self.warnings,
            references=references,
            isolated_distance=None if self.isolated_distance == ISOLATED_DISTANCE else self.isolated_distance,
            overwrite=overwrite,
        )

    def _structures(self, references: References) -> Iterator[Structure]:
        """Structures as they are read; then what is wrong with their labels, and their reference energies."""
        with tqdm(unit=" structures", disable=None if self.progress else True) as bar:
            for entry in self.inputs:
                bar.set_description(entry.path.name)
                for structure in self._checked(entry):
                    bar.update()
                    yield structure
        for record in self.provenance.values():
            record["rejection_rate"] = record["num_rejected"] / record["num_read"]
        self.warnings += self._audit.check(self.accept_labels)
        references.update(self._references())

    def _split(self, groups: Sequence[str], sources: Sequence[str]) -> NDArray[np.uint8]:
        sides = self._sides.split(groups, sources)
        self.warnings += [*self._sides.warnings, *self._audit.copies(sides)]
        return sides

    def _references(self) -> References:
        """Those given, and those that stores hold of what is read from them."""
        known = dict(self.references)
        every = known.pop(EVERY_SOURCE, {})
        found: References = {}
        for entry in self.inputs:
            held = store_header(entry.path).references if self._is_store(entry) else {}
            for source, row in held.items():
                name = entry.source or self.options.source or source
                if name in self.provenance:
                    found.setdefault(name, {}).update(row)
        for source, row in for_sources({EVERY_SOURCE: every, **known}, self.provenance, GIVEN).items():
            found.setdefault(source, {}).update(row)
        return found

    def _checked(self, entry: Input) -> Iterator[Structure]:
        options = replace(self.options, source=entry.source or self.options.source)
        unreadable: list[UnreadableError] = []
        if self.skip_bad:
            options = replace(options, on_unreadable=unreadable.append)
        num_kept = 0
        files_seen: set[str] = set()
        header = store_header(entry.path) if self._is_store(entry) else None
        origins = header.provenance if header else {}
        drawn_by_name = not self.keep_splits and self.options.group_by == "auto"
        if header and drawn_by_name and len(header.sources) > 1 and GROUPS_FILE not in header.sha256:
            print(NO_NAMES_WARNING.format(path=entry.path), file=sys.stderr)
        for number, structure in enumerate(read_structures(entry.path, options, self.format)):
            frame = number + len(unreadable)
            record = self._record(structure.source, structure.level)
            if structure.source not in files_seen:
                files_seen.add(structure.source)
                record["files"].append(_file_record(entry))
                if origins:
                    record["files"][-1]["origin"] = (
                        origins if entry.source else origins.get(structure.source, {})
                    )
            record["num_read"] += 1
            if not (structure.converged or self.keep_unconverged):
                _reject(record, "unconverged")
                continue
            try:
                check_structure(structure, self.rules, f"{entry.path}, frame {frame}")
            except StructureError as error:
                if not self.skip_bad:
                    raise
                _reject(record, error.rule)
                continue
            for label in ("energy", "forces"):
                record["num_without"][label] += getattr(structure, label) is None
            for note in structure.notes:
                record["notes"][note] = record["notes"].get(note, 0) + 1
            num_kept += 1
            yield self._placed(structure, entry, frame)
        if unreadable:
            record = self._record(options.source_name(entry.path), options.level or "unknown")
            for _ in unreadable:
                record["num_read"] += 1
                _reject(record, "unreadable")
            what = f"{len(unreadable)} frame(s) left out" if num_kept else "nothing could be read of it"
            last = unreadable[-1].last if num_kept else None
            rest = "" if last is None else f"; nothing after frame {last} was read"
            self.warnings.append(f"{entry.path}: {what}: {unreadable[0]}{rest}")
        elif not num_kept:
            self.warnings.append(f"{entry.path}: nothing is kept of it; every structure broke a rule")
        if not num_kept:  # told at once: if nothing is left the command ends without a store
            print(f"warning: {self.warnings[-1]}", file=sys.stderr)

    def _placed(self, structure: Structure, entry: Input, frame: int) -> Structure:
        """The structure, its group named apart in test and validation files; not in a store split anew."""
        kept = structure.split if self.keep_splits and entry.side is None else None
        isolated = is_isolated_atom(structure, self.isolated_distance)
        if entry.side is not None:
            group = FIXED_PREFIXES[SPLITS.index(entry.side)] + structure.group
        elif kept is not None:
            group = structure.group
        else:
            group = isolated_group(structure) if isolated else without_prefix(structure.group)
        placed = replace(structure, group=group, file=structure.file or self._file_name(entry))
        if isolated and not is_isolated_atom(structure) and not structure.config_type:
            placed = replace(placed, config_type="IsolatedAtom")  # when it is prepared again, too
        self._sides.add(placed, kept, isolated and entry.side is None)
        self._audit.add(placed, isolated, str(entry.path), frame)
        return placed

    def _file_name(self, entry: Input) -> str:
        """By what the store knows a file: its name, with its folders where another has the same name."""
        if len(self.inputs) == 1:
            return ""
        return entry.path.name if self._num_named[entry.path.name] == 1 else str(entry.path)

    def _is_store(self, entry: Input) -> bool:
        return (self.format or detect_format(entry.path)) == "store"

    def _record(self, source: str, level: str) -> dict[str, Any]:
        declared = {
            name: dict(value)
            for name, value in (("units", self.options.units.of), ("species", self.options.species))
            if value
        }
        record = self.provenance.setdefault(
            source,
            {
                "method": level,
                **declared,
                "files": [],
                "rules": asdict(self.rules),
                "num_read": 0,
                "num_rejected": 0,
                "rejected": {},
                "num_without": {"energy": 0, "forces": 0},
                "notes": {},
            },
        )
        if record["method"] == "unknown":  # a file that could not be read says no level
            record["method"] = level
        return record


def _reject(record: dict[str, Any], rule: str) -> None:
    record["num_rejected"] += 1
    record["rejected"][rule] = record["rejected"].get(rule, 0) + 1


def _file_record(entry: Input) -> dict[str, Any]:
    record: dict[str, Any] = {"name": entry.path.name, "test": entry.side == "test"}
    if entry.side == "valid":
        record["valid"] = True
    if entry.path.is_file():
        record["sha256"] = sha256_of(entry.path)
    return record


class Audit:
    """Collects while structures are read; then `check` their labels and, once they are split, `copies`.

    Args:
        declared: units that the user declared, quantity -> unit.
    """

    def __init__(self, declared: Mapping[str, str] | None = None) -> None:
        self._declared = declared or {}
        self._labels: dict[str, LabelCheck] = {}
        self._copies = Copies()
        self._isolated = bytearray()
        self._counts: Counter[str] = Counter()
        self._single: dict[str, Counter[str]] = {}

    def add(self, structure: Structure, isolated: bool, file: str, frame: int) -> None:
        """One structure in the order of the store: whether it is an isolated atom, and where it is from."""
        self._isolated.append(isolated)
        self._copies.add(structure, file, frame)
        self._counts[structure.source] += 1
        if not isolated and is_nearly_isolated(structure):
            symbol = chemical_symbols[int(structure.atomic_numbers[0])]
            self._single.setdefault(structure.source, Counter())[symbol] += 1
        if not isolated:
            if structure.source not in self._labels:
                self._labels[structure.source] = LabelCheck(structure.source, self._declared)
            self._labels[structure.source].add(structure, file, frame)

    def check(self, accept: bool) -> list[str]:
        """What is wrong with labels, in words.

        Args:
            accept: take sure faults for suspicions.

        Raises:
            ValueError: labels that are surely wrong.
        """
        faults = [fault for check in self._labels.values() for fault in check.faults()]
        sure = [fault.text for fault in faults if fault.sure]
        if sure and not accept:
            raise ValueError(
                "; ".join(sure)
                + ". Nothing was written; if the labels are right as they are, --accept-labels "
                "writes them"
            )
        return [
            *(fault.text for fault in faults),
            *self._copies.with_two_energies(),
            *self._nearly_isolated(),
        ]

    def _nearly_isolated(self) -> list[str]:
        """Few single atoms beside other structures, in a box that no crystal has, in words."""
        return [
            f"{source}: {symbols.total()} single atoms ({', '.join(symbols)}) are farther from "
            "their images than in any crystal, but nearer than --isolated-distance, so no isolated atoms; "
            f"if they are meant as such, give --isolated-distance {NEARLY_ISOLATED:g} or, in the file, "
            "config_type=IsolatedAtom"
            for source, symbols in self._single.items()
            if symbols.total() <= FEW_SINGLE_ATOMS * self._counts[source]
        ]

    def copies(self, sides: NDArray[np.integer]) -> Iterator[str]:
        """Test and validation structures that are copies of training structures, in words."""
        return self._copies.in_training(sides, np.frombuffer(bytes(self._isolated), dtype=np.bool_))
