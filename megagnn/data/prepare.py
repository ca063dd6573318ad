"""`megagnn prepare`: the command line of preparation.py."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from megagnn.data import keys
from megagnn.data.formats import FORMATS, ReadOptions, Units, detect_format, parse_species, parse_units
from megagnn.data.formats.options import USUAL_NAMES
from megagnn.data.formats.packed import is_store, unpack_store
from megagnn.data.inspect import describe
from megagnn.data.preparation import Input, Preparation
from megagnn.data.record import ISOLATED_DISTANCE, Rules
from megagnn.data.reference_file import read_reference_energies
from megagnn.data.split import DEFAULT_FRACTIONS
from megagnn.data.store import Store, StoreHeader

FRAME_WARNING = (
    "warning: --group-by frame takes every frame for unrelated to all others. If frames come from one "
    "trajectory or are conformations of one molecule, near copies of training frames land in the test set "
    "and its errors are too good."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megagnn prepare`."""
    parser.add_argument(
        "files",
        nargs="+",
        metavar="[NAME=]FILE",
        help="data; NAME is the name of its source. Files of one source share reference energies, so their "
        "labels must come from one method. Files without NAME= are one source together, named by the file if "
        "there is one and by --out if there are more; stores keep their own sources",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="directory of the store to be made"
    )
    parser.add_argument("--source", help="name of the source of every file without NAME=")
    parser.add_argument("--level", help="name of the level of theory of the labels")
    parser.add_argument("--format", choices=sorted(FORMATS), help="format of the files (default: detected)")
    _add_split_arguments(parser)
    _add_reading_arguments(parser)
    _add_reference_arguments(parser)
    parser.add_argument("--min-distance", type=float, default=Rules.min_distance, help="Å; 0 for no check")
    parser.add_argument("--max-force", type=float, default=Rules.max_force, help="eV/Å")
    parser.add_argument(
        "--on-bad",
        choices=("error", "skip"),
        default="error",
        help="stop at a structure that is bad or cannot be read, or skip and count it",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a store that is there already")


def _add_split_arguments(parser: argparse.ArgumentParser) -> None:
    """Which structures lie on which side."""
    fractions = ",".join(map(str, DEFAULT_FRACTIONS))
    parser.add_argument(
        "--split",
        help=f"train,valid,test fractions (default: {fractions}). Stores keep the split they have unless one "
        "of --split, --seed, --test, --valid and --group-by is given",
    )
    parser.add_argument(
        "--test",
        nargs="+",
        default=[],
        metavar="[NAME=]FILE",
        help="fixed test set; valid is then cut from the rest",
    )
    parser.add_argument(
        "--valid", nargs="+", default=[], metavar="[NAME=]FILE", help="fixed validation set, in the same way"
    )
    parser.add_argument(
        "--group-by",
        metavar="auto|formula|file|frame|info:KEY",
        help="what stays on one side of the split, in all sources (default: auto, the format's own groups, "
        "else empirical formula)",
    )
    parser.add_argument("--seed", type=int, help="of the split (default: 0)")


def _add_reference_arguments(parser: argparse.ArgumentParser) -> None:
    """What fixes reference energies, and labels that look wrong."""
    parser.add_argument(
        "--reference-energies",
        type=Path,
        metavar="FILE",
        help="energies of free atoms, eV, by element or source and element (TOML, JSON, or lines 'H -13.6'); "
        "isolated atoms among the data give theirs by themselves, others are fitted",
    )
    parser.add_argument(
        "--isolated-distance",
        type=float,
        default=ISOLATED_DISTANCE,
        metavar="Å",
        help=f"a single atom farther from its images is an isolated atom (default: {ISOLATED_DISTANCE:g})",
    )
    parser.add_argument(
        "--accept-labels", action="store_true", help="write labels whose units or signs are surely wrong"
    )


def _add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """What the files do not say of themselves."""
    for name in ("energy", "forces", "stress", *keys.OTHER_LABELS):
        parser.add_argument(
            f"--{name}-key", metavar="KEY", help=f"name of the {name} in the files, or none to leave it out"
        )
    parser.add_argument(
        "--virial-key",
        metavar="KEY",
        help="name of the virial in the files, read as stress = -virial/V, or none to leave it out",
    )
    parser.add_argument(
        "--units",
        metavar="QUANTITY=UNIT,...",
        help="units of the files where they are not eV, Å, eV/Å and eV/Å^3, as in "
        "energy=Ha,forces=Ha/bohr,stress=GPa,length=bohr; a minus sign turns gradients into forces "
        "(forces=-Ha/bohr) and compression into tension (stress=-kBar, as VASP prints it)",
    )
    parser.add_argument(
        "--species",
        "--type-map",
        metavar="NAME=ELEMENT,...",
        help="elements of species or types of the files, as in OW=O,HW=H or 1=Si,2=O (or Si,O for 1, 2)",
    )
    parser.add_argument(
        "--ase-format", metavar="NAME", help="ASE's name of the format of the files (`ase info --formats`)"
    )
    parser.add_argument(
        "--keep-unconverged",
        action="store_true",
        help="keep structures whose electronic steps did not converge",
    )


def run(args: argparse.Namespace) -> int:
    """Run `megagnn prepare`: write the store and print what it holds.

    Raises:
        ValueError: see `Preparation.write`, or arguments that make no sense.
    """
    inputs = parse_inputs(args.files, args.source, {"test": args.test, "valid": args.valid}, args.out.name)
    _check_flags_of_stores(inputs, args)
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
                group_by=args.group_by or "auto",
                **{f"{label}_key": getattr(args, f"{label}_key") for label in USUAL_NAMES},
                other_keys=_other_keys(args),
                units=Units() if args.units is None else parse_units(args.units),
                species={} if args.species is None else parse_species(args.species),
                ase_format=args.ase_format,
            ),
            format=args.format,
            rules=Rules(args.min_distance, args.max_force),
            fractions=DEFAULT_FRACTIONS if args.split is None else parse_fractions(args.split),
            seed=args.seed or 0,
            keep_splits=not (args.test or args.valid) and args.split is args.seed is args.group_by is None,
            references=read_reference_energies(args.reference_energies) if args.reference_energies else {},
            isolated_distance=args.isolated_distance,
            accept_labels=args.accept_labels,
            skip_bad=args.on_bad == "skip",
            keep_unconverged=args.keep_unconverged,
            progress=True,
        )
        preparation.write(args.out, args.overwrite)
        store = Store.open(args.out)
    print(describe(store, missing_labels(store.header)))
    return 0


def _other_keys(args: argparse.Namespace) -> dict[str, str]:
    """Labels of other kinds whose keys were given; `none` is for one that is not read."""
    given = {name: getattr(args, f"{name}_key") for name in keys.OTHER_LABELS}
    return {name: key for name, key in given.items() if key is not None}


def missing_labels(header: StoreHeader) -> list[str]:
    """What prepared structures lack, in words: a line for each source and label, rule broken, and note."""
    lines = []
    for source, record in header.provenance.items():
        num_read = record.get("num_read", 0)  # 0 where the structures were made here, by `megagnn label`
        num_kept = num_read - record.get("num_rejected", 0)
        for label, count in record.get("num_without", {}).items():
            if count:
                lines.append(f"{source}: {count:,} of {num_kept:,} structures have no {label}")
        for rule, count in record.get("rejected", {}).items() if num_read else ():
            hint = " (--keep-unconverged keeps them)" if rule == "unconverged" else ""
            lines.append(f"{source}: {count:,} of {num_read:,} structures left out: {rule}{hint}")
        lines += [
            f"{source}: {count:,} structures: {note}" for note, count in record.get("notes", {}).items()
        ]
    return lines


def parse_inputs(
    files: Sequence[str], source: str | None, fixed: Mapping[str, Sequence[str]], default: str
) -> list[Input]:
    """Inputs from [NAME=]FILE arguments.

    Files without a name, other than stores, are one source: mostly they are parts of one data set, and a
    source of its own would give each its own reference energies. A test or validation file without a name
    belongs to the one source there is.

    Args:
        source: name of the source of files without one, or None.
        fixed: files made for one side of the split, "test" or "valid".
        default: the same where there are several such files and no `source`.

    Raises:
        ValueError: such a file that could belong to several sources, or to none.
    """
    named = list(map(_named, files))
    unnamed = {path for name, path in named if name is None and not (path.exists() and is_store(path))}
    if source is None and len(unnamed) > 1:
        note = f"note: {len(unnamed)} files make one source, {default!r}"
        print(f"{note}; NAME=FILE keeps labels of several methods apart", file=sys.stderr)
        inputs = [Input(path, name or (default if path in unnamed else None)) for name, path in named]
    else:
        inputs = [Input(path, name or source) for name, path in named]
    names = [entry.source or ReadOptions().source_name(entry.path) for entry in inputs]
    for side, texts in fixed.items():
        for name, path in map(_named, texts):
            own = name or source or (names[0] if len(set(names)) == 1 else None)
            if own not in names:
                raise ValueError(
                    f"{side} file {path} needs the name of its source, one of "
                    f"{', '.join(dict.fromkeys(names))}: --{side} NAME={path}"
                )
            inputs.append(Input(path, own, side))
    repeated = [
        str(path) for path, count in Counter(entry.path.resolve() for entry in inputs).items() if count > 1
    ]
    if repeated:
        raise ValueError(
            f"file {repeated[0]} is given more than once; a structure must not be both trained and tested "
            "on. Give it once: without --test and --valid, --split holds out parts of it"
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
    whole = Path(os.path.expanduser(text))
    if not equals or whole.exists():
        return None, whole
    if not name or not path:
        raise ValueError(f"inputs are FILE or NAME=FILE, got {text!r}")
    return name, Path(os.path.expanduser(path))


def _check_flags_of_stores(inputs: Sequence[Input], args: argparse.Namespace) -> None:
    """Refuse flags that say what files mean where there are none but stores, which say it themselves."""
    flags = {"--units": args.units, "--species": args.species, "--ase-format": args.ase_format}
    given = [flag for flag, value in flags.items() if value is not None]
    if given and all(entry.path.exists() and is_store(entry.path) for entry in inputs):
        raise ValueError(
            f"{', '.join(given)} would do nothing: stores have units and elements of their own; leave it "
            "out, or prepare the store again from its files"
        )


def _is_one_archive(inputs: Sequence[Input], args: argparse.Namespace) -> bool:
    """One packed store and no wish to change or check it: it is unpacked as it is, its own split included."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    plain = vars(parser.parse_args([*args.files, "--out", str(args.out)]))
    changed = any(getattr(args, name) != value for name, value in plain.items() if name != "overwrite")
    return (
        len(inputs) == 1
        and inputs[0].source is None
        and detect_format(inputs[0].path) == "store"
        and inputs[0].path.is_file()
        and not changed
    )
