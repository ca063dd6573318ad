"""The command line: `megagnn COMMAND`, or `torchrun ... -m megagnn COMMAND` for several ranks."""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import megagnn
from megagnn.launch.rendezvous import rank_label

# command -> (module with add_arguments and run, one line of help); modules load only when their command is
# called
COMMANDS = {
    "train": ("megagnn.train.command", "train a model: CONFIG.toml [--section.field value ...]"),
    "evaluate": ("megagnn.train.evaluate", "errors of a checkpoint on a data set, beside baselines"),
    "predict": ("megagnn.train.predict", "energies, forces and stress of the frames of a file, to a file"),
    "export": ("megagnn.checkpoint.export", "a checkpoint's weights as one safetensors file"),
    "import": ("megagnn.checkpoint.import_file", "a run's checkpoint of a file that holds all of it"),
    "config": ("megagnn.describe", "the keys of a configuration: --describe [SECTION]"),
    "inspect": ("megagnn.train.inspect", "what a checkpoint or a data set holds"),
    "prepare": ("megagnn.data.prepare", "make a packed store from files that ASE reads, and others"),
    "label": ("megagnn.data.labels.run", "make structures and label them with a simulation engine"),
    "fit": ("megagnn.scaling.fit_command", "scaling laws of finished runs: RUNS.jsonl"),
    "report": (
        "megagnn.scaling.report",
        "a page with the figures and laws of finished runs: RUNS.jsonl --out HTML",
    ),
    "coordinate-check": (
        "megagnn.scaling.coordinates",
        "how much activations move in training, against width: CONFIG.toml --out DIR",
    ),
    "plan": (
        "megagnn.plan.command",
        "memory, time and cost of a run on a cluster: CONFIG.toml --cluster 8xh100",
    ),
    "sweep": ("megagnn.scaling.sweep_command", "train a table of runs, one line of results each: SWEEP.toml"),
}
# Commands that take keys of the configuration, and their own options; every other option is such a key.
TAKES_OVERRIDES = {
    "train": ("--resume", "--overwrite", "--help", "--version"),
    "plan": (
        *(
            "--calibrate",
            "--cluster",
            "--ranks",
            "--search",
            "--show",
            "--atoms",
            "--edges",
            "--structures",
            "--elements",
        ),
        *("--levels", "--json", "--help"),
    ),
    "coordinate-check": ("--out", "--widths", "--depths", "--steps", "--seeds", "--tensorboard", "--help"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake (ValueError and its kin) is one line on stderr and exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="megagnn", description="Graph neural networks for atomistic materials."
    )
    parser.add_argument("--version", action="version", version=f"megagnn {megagnn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((a for a in argv if not a.startswith("-")), None)
    modules = {}
    for name, (module, help_line) in COMMANDS.items():
        sub = commands.add_parser(name, help=help_line, description=help_line, allow_abbrev=False)
        if name == chosen:
            modules[name] = importlib.import_module(module)
            modules[name].add_arguments(sub)
    overrides: list[str] = []
    if chosen in TAKES_OVERRIDES:
        from megagnn.config import RunConfig
        from megagnn.overrides import split_overrides

        own = TAKES_OVERRIDES[chosen]
        argv, overrides = split_overrides(RunConfig, argv, own)
        for name in overrides:
            near = difflib.get_close_matches(name, own, n=1, cutoff=0.7)
            if near and "." not in name:
                parser.error(f"unknown option {name}; did you mean {near[0]}?")
    arguments = parser.parse_args(argv)
    _expand_home(arguments)
    from megagnn.ops.allocator import configure_allocator  # imports torch, which --version need not wait for

    configure_allocator()
    try:
        if arguments.command in TAKES_OVERRIDES:
            return int(modules[arguments.command].run(arguments, overrides))
        return int(modules[arguments.command].run(arguments))
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        print(f"megagnn {arguments.command}{rank_label(os.environ)}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"megagnn {arguments.command}: interrupted", file=sys.stderr)
        return 130


def _expand_home(arguments: argparse.Namespace) -> None:
    """A path's ~ is the user's home also where no shell has seen to it."""
    for name, value in vars(arguments).items():
        if isinstance(value, Path):
            setattr(arguments, name, Path(os.path.expanduser(value)))
        elif isinstance(value, list) and value and all(isinstance(one, Path) for one in value):
            setattr(arguments, name, [Path(os.path.expanduser(one)) for one in value])


if __name__ == "__main__":
    sys.exit(main())
