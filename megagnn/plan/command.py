"""The command `megagnn plan`: what a run would need and take on a cluster, or which layout is the best."""

import argparse
import json
from pathlib import Path

from megagnn.config import RunConfig, load_config
from megagnn.plan.cluster import Cluster, load_cluster
from megagnn.plan.layout import Sizes, make_layout
from megagnn.plan.report import search_text, to_json, to_text
from megagnn.plan.search import make_plan, search


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `megagnn plan`; what argparse does not know is a configuration override."""
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG.toml", help="of the run")
    parser.add_argument("--cluster", metavar="NAME|FILE", help="8xh100, ..., or a TOML file")
    parser.add_argument("--calibrate", type=Path, metavar="FILE", help="measure this machine")
    parser.add_argument("--ranks", type=int, metavar="N", help="devices (default: the configuration's grid)")
    parser.add_argument("--search", action="store_true", help="find the best layout of so many ranks")
    parser.add_argument("--show", type=int, default=10, metavar="N", help="layouts of a search to print")
    parser.add_argument("--atoms", type=int, metavar="N", help="of a rank's batch (default: data.max_atoms)")
    parser.add_argument("--edges", type=int, metavar="N", help="of a rank's batch (default: data.max_edges)")
    parser.add_argument(
        "--structures", type=int, metavar="N", help="of a rank's batch (default: by 64 atoms)"
    )
    parser.add_argument("--elements", type=int, default=10, metavar="N", help="that the data hold")
    parser.add_argument("--levels", type=int, default=1, metavar="N", help="levels of theory of the data")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """`megagnn plan CONFIG.toml --cluster NAME [--search] [--section.field value ...]`.

    Or `megagnn plan --calibrate FILE`. Returns 1 where nothing fits.
    """
    if arguments.calibrate is not None:
        if arguments.config is not None or arguments.cluster is not None or overrides:
            raise ValueError(
                "--calibrate FILE measures this machine and plans no run, so it takes neither CONFIG.toml "
                "nor --cluster nor keys of a configuration; give it alone, then plan with --cluster FILE"
            )
        from megagnn.plan.calibrate import calibrate

        print(f"{calibrate(arguments.calibrate)}\nwrote {arguments.calibrate}")
        return 0
    if arguments.config is None or arguments.cluster is None:
        raise ValueError(
            "megagnn plan needs CONFIG.toml and --cluster NAME, such as 8xh100, or --calibrate FILE alone"
        )
    config, cluster = load_config(arguments.config, overrides), load_cluster(arguments.cluster)
    sizes = sizes_of(arguments, config)
    if arguments.search:
        return _search(arguments, config, sizes, cluster)
    layout = make_layout(config, sizes, arguments.ranks)
    check_ranks(layout.num_ranks, cluster)
    plan = make_plan(layout, cluster)
    record = to_json(plan, cluster)
    print(json.dumps(record, indent=2) if arguments.json else to_text(plan, cluster))
    return 1 if record["fault"] else 0


def sizes_of(arguments: argparse.Namespace, config: RunConfig) -> Sizes:
    """Of the command, and else of the configuration's budgets."""
    atoms = config.data.max_atoms if arguments.atoms is None else arguments.atoms
    edges = config.data.max_edges if arguments.edges is None else arguments.edges
    structures = config.data.max_structures or max(1, atoms // 64)
    if arguments.structures is not None:
        structures = arguments.structures
    return Sizes(atoms, edges, structures, arguments.elements, arguments.levels)


def check_ranks(num_ranks: int, cluster: Cluster) -> None:
    """Raises ValueError for more ranks than the cluster has devices."""
    if num_ranks < 1 or num_ranks > cluster.num_devices:
        raise ValueError(
            f"{num_ranks} ranks are not between 1 and the {cluster.num_devices} devices of {cluster.name}; "
            "plan fewer, or write a cluster file with more nodes"
        )


def _search(arguments: argparse.Namespace, config: RunConfig, sizes: Sizes, cluster: Cluster) -> int:
    ranks = cluster.node.devices if arguments.ranks is None else arguments.ranks
    check_ranks(ranks, cluster)
    plans, failures = search(config, sizes, cluster, ranks)
    if arguments.json:
        records = [to_json(plan, cluster) for plan in plans[: arguments.show]]
        failed = [failure._asdict() for failure in failures]
        print(json.dumps({"layouts": records, "failures": failed}, indent=2))
    else:
        print(search_text(plans, failures, arguments.show))
        if plans:
            print(f"\nThe first:\n\n{to_text(plans[0], cluster)}")
    return 0 if plans else 1
