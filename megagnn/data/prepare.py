"""`megagnn prepare`: from files to a packed store, checked and split."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megagnn.data.formats import FORMATS, ReadOptions, detect_format, read_structures
from megagnn.data.formats.packed import store_provenance, unpack_store
from megagnn.data.inspect import describe
from megagnn.data.record import Structure
from megagnn.data.split import DEFAULT_FRACTIONS, SPLITS, split_groups
from megagnn.data.store import Store, StoreHeader, write_store
from megagnn.data.store_format import sha256_of
from megagnn.data.validate import Rules, StructureError, check_structure

TEST_PREFIX = "test file: "
"""Groups of fixed test files are named apart: whether they are kin to the training data is their publisher's
choice.
"""

FRAME_WARNING = (
    "warning: --group-by frame takes every frame for unrelated to all others. If frames come from one "
    "trajectory or are conformations of one molecule, near copies of training frames land in the test set "
    "and its errors are too good."
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
        skip_bad: leave structures that break a rule out and count them, rather than stop.
        progress: show a progress bar (only ever on a terminal).
    """

    inputs: Sequence[Input]
    options: ReadOptions = field(default_factory=ReadOptions)
    format: str | None = None
    rules: Rules = field(default_factory=Rules)
    fractions: tuple[float, ...] = DEFAULT_FRACTIONS
    seed: int = 0
    skip_bad: bool = False
    progress: bool = False
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)

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
        self.provenance = {}
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
        files_seen: set[str] = set()
        is_store = (self.format or detect_format(entry.path)) == "store"
        origins = store_provenance(entry.path) if is_store else {}
        for frame, structure in enumerate(read_structures(entry.path, options, self.format)):
            record = self._record(structure)
            if structure.source not in files_seen:
                files_seen.add(structure.source)
                record["files"].append(_file_record(entry))
                if origins:
                    record["files"][-1]["origin"] = (
                        origins if entry.source else origins.get(structure.source, {})
                    )
            record["num_read"] += 1
            try:
                check_structure(structure, self.rules, f"{entry.path}, frame {frame}")
            except StructureError as error:
                if not self.skip_bad:
                    raise
                record["num_rejected"] += 1
                record["rejected"][error.rule] = record["rejected"].get(error.rule, 0) + 1
                continue
            yield replace(structure, group=TEST_PREFIX + structure.group) if entry.is_test else structure

    def _record(self, structure: Structure) -> dict[str, Any]:
        return self.provenance.setdefault(
            structure.source,
            {
                "method": structure.level,
                "files": [],
                "rules": asdict(self.rules),
                "num_read": 0,
                "num_rejected": 0,
                "rejected": {},
            },
        )

    def _split(self, groups: Sequence[str], sources: Sequence[str]) -> NDArray[np.uint8]:
        """Fixed test files to test; the rest by groups, without a test part where the source has a test
        file.
        """
        names, source_of = np.array(groups, dtype=object), np.array(sources, dtype=object)
        fixed = np.array([g.startswith(TEST_PREFIX) for g in groups])
        result = np.full(len(groups), SPLITS.index("test"), dtype=np.uint8)
        for source in dict.fromkeys(sources):
            mine = (source_of == source) & ~fixed
            if not mine.any():
                continue
            train, valid, test = self.fractions
            if ((source_of == source) & fixed).any():
                train, valid, test = train / (train + valid), valid / (train + valid), 0.0
            result[mine] = split_groups(
                list(names[mine]), list(source_of[mine]), (train, valid, test), self.seed
            )
        return result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megagnn prepare`."""
    parser.add_argument(
        "files",
        nargs="+",
        metavar="[NAME=]FILE",
        help="data; NAME is the source's name (default: the file's name)",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="directory of the store to be made"
    )
    parser.add_argument("--source", help="name of the source of every file without NAME=")
    parser.add_argument("--level", help="name of the level of theory of the labels")
    parser.add_argument("--format", choices=sorted(FORMATS), help="format of the files (default: detected)")
    parser.add_argument(
        "--split", default=",".join(map(str, DEFAULT_FRACTIONS)), help="train,valid,test fractions"
    )
    parser.add_argument(
        "--test",
        nargs="+",
        default=[],
        metavar="[NAME=]FILE",
        help="fixed test set; valid is then cut from the rest",
    )
    parser.add_argument(
        "--group-by",
        default="auto",
        metavar="auto|formula|file|frame|info:KEY",
        help="what stays on one side of the split (auto: the format's own groups, else empirical formula)",
    )
    for name in ("energy", "forces", "stress"):
        parser.add_argument(f"--{name}-key", metavar="KEY", help=f"name of the {name} in the files")
    parser.add_argument("--seed", type=int, default=0, help="of the split")
    parser.add_argument("--min-distance", type=float, default=Rules.min_distance, help="Å; 0 for no check")
    parser.add_argument("--max-force", type=float, default=Rules.max_force, help="eV/Å")
    parser.add_argument(
        "--on-bad",
        choices=("error", "skip"),
        default="error",
        help="stop at a bad structure, or skip and count it",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a store that is there already")


def run(args: argparse.Namespace) -> int:
    """Run `megagnn prepare`: write the store and print what it holds.

    Raises:
        ValueError: see `Preparation.write`, or arguments that make no sense.
    """
    inputs = parse_inputs(args.files, args.source, args.test)
    if _is_one_archive(inputs, args):
        store = unpack_store(inputs[0].path, args.out, args.overwrite)
    else:
        if args.group_by == "frame":
            print(FRAME_WARNING, file=sys.stderr)
        preparation = Preparation(
            inputs=inputs,
            options=ReadOptions(
                source=None,
                level=args.level,
                group_by=args.group_by,
                energy_key=args.energy_key,
                forces_key=args.forces_key,
                stress_key=args.stress_key,
            ),
            format=args.format,
            rules=Rules(args.min_distance, args.max_force),
            fractions=parse_fractions(args.split),
            seed=args.seed,
            skip_bad=args.on_bad == "skip",
            progress=True,
        )
        preparation.write(args.out, args.overwrite)
        store = Store.open(args.out)
    print(describe(store))
    return 0


def parse_inputs(files: Sequence[str], source: str | None, test_files: Sequence[str]) -> list[Input]:
    """Inputs from [NAME=]FILE arguments.

    A test file without a name belongs to the one source there is.

    Raises:
        ValueError: a test file that could belong to several sources, or to none.
    """
    inputs = [Input(path, name or source) for name, path in map(_named, files)]
    names = [entry.source or ReadOptions().source_name(entry.path) for entry in inputs]
    for name, path in map(_named, test_files):
        own = name or source or (names[0] if len(set(names)) == 1 else None)
        if own not in names:
            raise ValueError(
                f"test file {path} needs the name of its source, one of {', '.join(dict.fromkeys(names))}: "
                f"--test NAME={path}"
            )
        inputs.append(Input(path, own, is_test=True))
    repeated = [
        str(path) for path, count in Counter(entry.path.resolve() for entry in inputs).items() if count > 1
    ]
    if repeated:
        raise ValueError(
            f"file {repeated[0]} is given more than once; a structure must not be both trained and tested on"
        )
    return inputs


def parse_fractions(text: str) -> tuple[float, ...]:
    """Fractions from "0.8,0.1,0.1"; whether they make sense is for `split_groups` to say.

    Raises:
        ValueError: not three numbers.
    """
    try:
        parts = tuple(float(part) for part in text.split(","))
    except ValueError:
        parts = ()
    if len(parts) != 3:
        raise ValueError(f"--split takes three numbers, train,valid,test, such as 0.8,0.1,0.1; got {text!r}")
    return parts


def _named(text: str) -> tuple[str | None, Path]:
    """NAME=FILE; a file whose own name holds an equals sign is taken as it is where it exists."""
    name, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        return None, Path(text)
    if not name or not path:
        raise ValueError(f"inputs are FILE or NAME=FILE, got {text!r}")
    return name, Path(path)


def _is_one_archive(inputs: Sequence[Input], args: argparse.Namespace) -> bool:
    """One packed store and no wish to change it: it is unpacked as it is, its own split included."""
    plain = {"level": None, "group_by": "auto", "split": ",".join(map(str, DEFAULT_FRACTIONS))}
    return (
        len(inputs) == 1
        and inputs[0].source is None
        and detect_format(inputs[0].path) == "store"
        and inputs[0].path.is_file()
        and all(getattr(args, name) == value for name, value in plain.items())
    )


def _file_record(entry: Input) -> dict[str, Any]:
    record: dict[str, Any] = {"name": entry.path.name, "test": entry.is_test}
    if entry.path.is_file():
        record["sha256"] = sha256_of(entry.path)
    return record
