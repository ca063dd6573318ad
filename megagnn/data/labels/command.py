"""`megagnn label`: make a data set labelled by real engines."""

import argparse
from pathlib import Path

from megagnn.data.labels.run import LabelJob, label
from megagnn.data.labels.sources import SOURCES, find_sources


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    listing = "; ".join(f"{source.name}: {source.summary}" for source in SOURCES.values())
    parser.add_argument("--source", required=True, metavar="NAME[,NAME]", help=listing)
    parser.add_argument(
        "--num", type=int, default=4000, help="structures of each source (default %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same data (default %(default)s)"
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes; does not change the data (default %(default)s)"
    )
    parser.add_argument(
        "--per-group",
        type=int,
        default=4,
        metavar="K",
        help="geometries drawn of each molecule or slab (default %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the packed store to write")
    parser.add_argument(
        "--keep-parts",
        action="store_true",
        help="keep DIR.parts, from which a later run with a larger --num continues",
    )


def run(args: argparse.Namespace) -> int:
    """Label, write the store, say what was made. Returns the exit status."""
    sources = find_sources([name.strip() for name in args.source.split(",")])
    job = LabelJob(sources, args.num, args.seed, args.workers, args.out, args.per_group, args.keep_parts)
    try:
        provenance = label(job)
    except KeyboardInterrupt:
        print(f"\nstopped; finished parts are kept in {job.parts}, the same command continues from them")
        return 130
    for name, made in provenance.items():
        reasons = ", ".join(f"{reason} {count}" for reason, count in made["rejected"].items()) or "none"
        print(
            f"{name}: {made['num_structures']} structures of {made['num_groups']} groups, "
            f"{made['method']} ({made['engine']} {made['version']}), "
            f"{made['rejection_rate']:.1%} of {made['num_labelled']} rejected ({reasons}), "
            f"{made['num_duplicates']} repeats of a molecule dropped"
        )
    print(f"wrote {job.out}")
    return 0
