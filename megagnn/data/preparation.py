"""From files to a packed store: read, check, split, write, and remember where everything came from."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megagnn.data.formats import ReadOptions, UnreadableError, detect_format, read_structures
from megagnn.data.formats.packed import store_header
from megagnn.data.record import Structure
from megagnn.data.split import DEFAULT_FRACTIONS, SPLITS, TEST_PREFIX, check_fractions, split_groups
from megagnn.data.store import StoreHeader, write_store
from megagnn.data.store_format import GROUPS_FILE, sha256_of
from megagnn.data.validate import Rules, StructureError, check_structure

NO_NAMES_WARNING = (
    "warning: {path} was made before names of groups were stored, so the new split cannot see that two of "
    "its sources hold the same molecule. Prepare it again from its files to be sure."
)


@dataclass(frozen=True)
class Input:
    """One file to read, and whether it is a fixed test set."""

    path: Path
    source: str | None = None
    is_test: bool = False


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
    skip_bad: bool = False
    keep_unconverged: bool = False
    progress: bool = False
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)
    _kept: list[int | None] = field(default_factory=list, init=False)

    def write(self, out: str | Path, overwrite: bool = False) -> StoreHeader:
        """Read, check, split and write; on any error nothing remains.

        Raises:
            ValueError: see the readers, `check_structure`, `split_groups` and `write_store`.
        """
        for entry in self.inputs:
            detect_format(entry.path)  # a missing file is told before an hour of reading the others
        description = {
            "method": "whole groups in an order drawn by the seed, each to the split lacking most structures",
            "fractions": list(self.fractions),
            "seed": self.seed,
            "group_by": self.options.group_by,
            "test_files": [entry.path.name for entry in self.inputs if entry.is_test],
        }
        stores = [entry.path for entry in self.inputs if self._is_store(entry)]
        if stores and self.keep_splits:
            description = {
                "kept": {path.name: store_header(path).split for path in stores},
                "others": description if len(stores) < len(self.inputs) else None,
            }
        self.provenance, self._kept = {}, []
        return write_store(
            out,
            self._structures(),
            splits=self._split,
            provenance=self.provenance,
            split_description=description,
            overwrite=overwrite,
        )

    def _structures(self) -> Iterator[Structure]:
        with tqdm(unit=" structures", disable=None if self.progress else True) as bar:
            for entry in self.inputs:
                bar.set_description(entry.path.name)
                for structure in self._checked(entry):
                    bar.update()
                    yield structure
        for record in self.provenance.values():
            record["rejection_rate"] = record["num_rejected"] / record["num_read"]

    def _checked(self, entry: Input) -> Iterator[Structure]:
        options = replace(self.options, source=entry.source or self.options.source)
        unreadable: list[UnreadableError] = []
        if self.skip_bad:
            options = replace(options, on_unreadable=unreadable.append)
        num_structures = 0
        files_seen: set[str] = set()
        header = store_header(entry.path) if self._is_store(entry) else None
        origins = header.provenance if header else {}
        drawn_by_name = not self.keep_splits and self.options.group_by == "auto"
        if header and drawn_by_name and len(header.sources) > 1 and GROUPS_FILE not in header.sha256:
            print(NO_NAMES_WARNING.format(path=entry.path), file=sys.stderr)
        for frame, structure in enumerate(read_structures(entry.path, options, self.format)):
            num_structures += 1
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
            self._kept.append(structure.split if self.keep_splits and not entry.is_test else None)
            yield replace(structure, group=self._group(structure, entry))
        if unreadable:
            record = self._record(options.source_name(entry.path), options.level or "unknown")
            for _ in unreadable:
                record["num_read"] += 1
                _reject(record, "unreadable")
            what = f"{len(unreadable)} frame(s) left out" if num_structures else "nothing could be read of it"
            print(f"warning: {entry.path}: {what}: {unreadable[0]}", file=sys.stderr)

    def _group(self, structure: Structure, entry: Input) -> str:
        """Test files keep their groups apart; a store split anew no longer does."""
        if entry.is_test:
            return TEST_PREFIX + structure.group
        return structure.group if self.keep_splits else structure.group.removeprefix(TEST_PREFIX)

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

    def _split(self, groups: Sequence[str], sources: Sequence[str]) -> NDArray[np.uint8]:
        """What came with a side keeps it and test files go to test; the rest is drawn by groups.

        A source with a test file gets no other test part. A group of a test file is held out of other
        sources, too, unless its own source trains on it: that was its publisher's choice.
        """
        result = np.full(len(groups), SPLITS.index("test"), dtype=np.uint8)
        pinned: dict[str, int] = {}
        drawn, tested = [], set()
        for index, (group, kept) in enumerate(zip(groups, self._kept, strict=True)):
            if kept is not None:
                result[index] = pinned[group] = kept
            elif group.startswith(TEST_PREFIX):
                tested.add(index)
            else:
                drawn.append(index)
        trained_on = {(sources[index], groups[index]) for index in drawn}
        for index in sorted(tested):
            group = groups[index].removeprefix(TEST_PREFIX)
            if (sources[index], group) not in trained_on:
                pinned.setdefault(group, SPLITS.index("test"))
        train, valid, _ = check_fractions(self.fractions)
        rest = (train / (train + valid), valid / (train + valid), 0.0)
        result[drawn] = split_groups(
            [groups[index] for index in drawn],
            [sources[index] for index in drawn],
            self.fractions,
            self.seed,
            fractions_of={sources[index]: rest for index in tested},
            pinned=pinned,
        )
        return result


def _reject(record: dict[str, Any], rule: str) -> None:
    record["num_rejected"] += 1
    record["rejected"][rule] = record["rejected"].get(rule, 0) + 1


def _file_record(entry: Input) -> dict[str, Any]:
    record: dict[str, Any] = {"name": entry.path.name, "test": entry.is_test}
    if entry.path.is_file():
        record["sha256"] = sha256_of(entry.path)
    return record
