"""Tables of runs: SWEEP.toml to a list of configurations, which of them are done, and what is left.

    config = "../configs/quickstart.toml"   # beside this file
    out_dir = "runs/sweep"
    recipe = "quickstart"
    processes = 2                           # runs at a time

    [set]                                   # configuration keys of every run
    "train.num_steps" = 500

    [grid]                                  # every combination
    width = [16, 32, 64]
    structures = [500, 2000]
    seed = [0, 1]

    [[runs]]                                # and runs beside the grid
    width = 128
    structures = 2000
    seed = 0

Several grids are tables of an array, [[grid]]. A grid or a run can have a recipe of its own, which begins the
names of its runs; keys of one value are then not in the names. The other keys of grids and runs are width,
depth, structures, seed, learning_rate, steps, or dotted configuration keys; and, which give steps in terms of
the data,

    epochs        train.num_steps: passes over `structures`, with data.max_structures of them in a batch
    warmup        optim.warmup_steps: share of the steps
    validations   train.validate_every and checkpoint_every: times in the run

Errors are those on the test split, or on `split`, "valid" or a list of both; of the stores that `evaluate`
lists, if it is given, in place of those that a run trains on.

Results go to out_dir/runs.jsonl, or to the file that `results` names, such as one under version control.
"""

import difflib
import hashlib
import itertools
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megagnn.config import RunConfig, flat_config
from megagnn.overrides import Change, change_of
from megagnn.scaling.laws.record import RunRecord
from megagnn.scaling.records import read_records, slug
from megagnn.train.fine_tune import complete_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHORT = {
    "width": "model.width",
    "depth": "model.num_layers",
    "structures": "data.num_structures",
    "seed": "train.seed",
    "learning_rate": "optim.learning_rate",
    "steps": "train.num_steps",
}
# What becomes steps once the rest is known.
RELATIVE = ("epochs", "warmup", "validations")
_LETTERS = {
    "width": "w",
    "depth": "l",
    "structures": "n",
    "seed": "s",
    "learning_rate": "lr",
    "steps": "t",
    "epochs": "e",
}
_KEYS = (
    "config",
    "out_dir",
    "recipe",
    "processes",
    "threads",
    "split",
    "evaluate",
    "results",
    "set",
    "grid",
    "runs",
)

# Defaults that have changed since their keys were made, as they were: digests are of what differs from these.
FIRST_DEFAULTS: dict[str, Any] = {
    "data.num_workers": 0,
    "loss.energy": "huber",
    "loss.forces": "huber",
    "loss.energy_weight": 1.0,
    "loss.final_energy_factor": 1.0,
}


@dataclass(frozen=True)
class PlannedRun:
    """One line of the table."""

    name: str
    config: RunConfig
    digest: str
    """Digest of the configuration, except where it runs, and of the stores that it is evaluated on."""
    recipe: str

    @property
    def out_dir(self) -> Path:
        return Path(self.config.out_dir)

    @property
    def work(self) -> float:
        """Rough share in the work of a sweep, for the time left: width^2 x depth x steps."""
        model = self.config.model
        return float((model.width**2 + 64 * model.width) * model.num_layers * self.config.train.num_steps)


@dataclass(frozen=True)
class Sweep:
    """A table of runs."""

    path: Path
    out_dir: Path
    processes: int
    threads: int
    """Threads of each run."""
    splits: tuple[str, ...]
    """Where the losses of the results are measured; those of the second are named `valid/force_mae`."""
    evaluate: tuple[str, ...]
    """Stores whose splits those are; empty for those that each run trains on."""
    results: Path
    """Lines of results."""
    runs: tuple[PlannedRun, ...]

    def finished(self) -> dict[str, RunRecord]:
        """Results by name.

        Raises:
            ValueError: a damaged file, or a result of this name that was made with other settings.
        """
        if not self.results.is_file() or not self.results.stat().st_size:
            return {}
        recipes = {run.name: run.recipe for run in self.runs}
        records = {r.run: r for r in read_records([self.results]) if recipes.get(r.run) == r.recipe}
        for run in self.runs:
            record = records.get(run.name)
            if record is not None and record.versions.get("settings") != run.digest:
                raise ValueError(
                    f"{self.results} has a run '{run.name}' made with other settings than {self.path} gives "
                    "it now; take another out_dir, or remove that line and the run's folder"
                )
        return records

    def pending(self) -> list[int]:
        """Indices of the runs without a result, in the order of the table."""
        done = self.finished()
        return [k for k, run in enumerate(self.runs) if run.name not in done]


def load_sweep(path: str | Path) -> Sweep:
    """Read a SWEEP.toml.

    Raises:
        ValueError: unreadable TOML, an unknown key, a value that cannot be, no run, or two runs of one name.
        FileNotFoundError: no such file, or no base configuration.
    """
    path = Path(path)
    values = _read(path)
    _check_keys(path, values)
    base_path = path.parent / str(values["config"])
    base = _read(base_path)
    out_dir = Path(str(values["out_dir"]))
    threads = _positive(values, "threads", path)
    common = {**_dotted(path, values.get("set", {})), "train.threads": threads}
    evaluate, usual, runs = _evaluate(path, values), str(values.get("recipe", base_path.stem)), []
    for recipe, settings, told in _settings(path, values):
        name = run_name({key: settings[key] for key in told})
        if recipe is not None:
            name = "-".join([slug(recipe), *([name] if name else [])])
        dotted = {**common, **_dotted(path, settings), "out_dir": str(out_dir / name)}
        relative = {key: dotted.pop(key) for key in RELATIVE if key in dotted}
        try:
            config = _in_steps(complete_config(_merged(base, dotted)), relative)
        except ValueError as error:
            raise ValueError(f"{path}, run {name}: {error}") from None
        runs.append(PlannedRun(name, config, _digest(config, evaluate), usual if recipe is None else recipe))
    names = [run.name for run in runs]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: two runs are '{twice}'; take one out of [grid] or [[runs]]")
    return Sweep(
        path,
        out_dir,
        _positive(values, "processes", path),
        threads,
        _splits(path, values),
        evaluate,
        Path(str(values.get("results", out_dir / "runs.jsonl"))),
        tuple(runs),
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error


def _check_keys(path: Path, values: Mapping[str, Any]) -> None:
    for key in values:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"; nearest: '{near[0]}'" if near else f"; known are {', '.join(_KEYS)}"
            raise ValueError(f"{path}: unknown key '{key}'{hint}")
    for key in ("config", "out_dir"):
        if key not in values:
            raise ValueError(
                f"{path}: '{key}' is missing; a sweep needs config, out_dir, and [grid] or [[runs]]"
            )


def _positive(values: Mapping[str, Any], key: str, path: Path) -> int:
    value = values.get(key, 1)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{path}: {key} must be a whole number, at least 1, got {value!r}")
    return value


def _splits(path: Path, values: Mapping[str, Any]) -> tuple[str, ...]:
    given = values.get("split", "test")
    splits = tuple(given) if isinstance(given, list) else (given,)
    if not splits or len(set(splits)) < len(splits) or not set(splits) <= {"valid", "test"}:
        raise ValueError(f"{path}: split must be 'test' or 'valid', or a list of both, got {given!r}")
    return splits


def _evaluate(path: Path, values: Mapping[str, Any]) -> tuple[str, ...]:
    stores = values.get("evaluate", [])
    if not isinstance(stores, list) or not all(isinstance(store, str) for store in stores):
        raise ValueError(
            f'{path}: evaluate must be a list of stores, as evaluate = ["runs/data/mine"], got {stores!r}'
        )
    return tuple(os.path.expanduser(store) for store in stores)


def _settings(path: Path, values: Mapping[str, Any]) -> list[tuple[str | None, dict[str, Any], list[str]]]:
    """Own recipe and settings of each run, and which settings its name tells: grids, then single runs."""
    grids, single = values.get("grid", []), values.get("runs", [])
    found: list[tuple[str | None, dict[str, Any], list[str]]] = []
    for grid in [grids] if isinstance(grids, dict) else grids:
        recipe, choices = _own_recipe(path, grid)
        for key, value in choices.items():
            if not isinstance(value, list) or not value:
                raise ValueError(f"{path}: grid.{key} must be a list of values, got {value!r}")
        told = [key for key, value in choices.items() if recipe is None or len(value) > 1]
        rows = itertools.product(*choices.values()) if choices else []
        found += [(recipe, dict(zip(choices, row, strict=True)), told) for row in rows]
    if not found and not single:
        raise ValueError(f"{path}: no runs; give [grid] or [[runs]]")
    return found + [(recipe, own, list(own)) for recipe, own in (_own_recipe(path, run) for run in single)]


def _own_recipe(path: Path, settings: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    recipe = settings.get("recipe")
    if recipe is not None and (not isinstance(recipe, str) or not slug(recipe)):
        raise ValueError(f"{path}: recipe must be a name, got {recipe!r}")
    return recipe, {key: value for key, value in settings.items() if key != "recipe"}


def _dotted(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    for key in settings:
        if key not in SHORT and key not in RELATIVE and "." not in key:
            known = (*SHORT, *RELATIVE)
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"nearest: '{near[0]}'" if near else f"known are {', '.join(known)}"
            raise ValueError(f"{path}: unknown key '{key}' of a run; {hint}, or a dotted configuration key")
    return {SHORT.get(key, key): value for key, value in settings.items()}


def _in_steps(config: RunConfig, relative: Mapping[str, Any]) -> RunConfig:
    """The configuration with what was given in passes over the data and in shares of the run."""
    for key, value in relative.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{key} must be a positive number, got {value!r}")
    optim, train = config.optim, config.train
    if "epochs" in relative:
        structures, batch = config.data.num_structures, config.data.max_structures
        if structures is None or batch is None:
            raise ValueError(
                "epochs needs structures, and data.max_structures for a batch; set both, or give steps"
            )
        steps = math.ceil(structures / batch / optim.accumulate_steps) * relative["epochs"]
        train = replace(train, num_steps=max(1, round(steps)))
    if "warmup" in relative:
        optim = replace(optim, warmup_steps=round(relative["warmup"] * train.num_steps))
    if "validations" in relative:
        every = math.ceil(train.num_steps / relative["validations"])
        train = replace(train, validate_every=every, checkpoint_every=every)
    return replace(config, optim=optim, train=train)


def _merged(base: Mapping[str, Any], dotted: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(base))
    for key, value in dotted.items():
        *sections, name = key.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return values


def run_name(settings: Mapping[str, Any]) -> str:
    """w64-l3-n1000-s0: the keys of a run in the order of the table, dotted ones by their last part."""
    parts = []
    for key, value in settings.items():
        letter = _LETTERS.get(key) or f"{key.rsplit('.', 1)[-1]}_"
        text = f"{value:g}" if isinstance(value, float) else str(value)
        parts.append(f"{letter}{text}")
    return "-".join(parts).replace("/", "_").replace(" ", "")


def _digest(config: RunConfig, evaluate: tuple[str, ...] = ()) -> str:
    """Digest of what differs from the first defaults, so that neither new keys nor new defaults change it."""
    family = flat_config(RunConfig(model=type(config.model)()))
    usual = {**family, **flat_config(RunConfig()), **FIRST_DEFAULTS}
    flat = {
        key: value
        for key, value in flat_config(config).items()
        if Change.SAME_RUN not in change_of(RunConfig, key) and value != usual.get(key)
    }
    if evaluate:
        flat["evaluate"] = evaluate
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:12]


def describe(sweep: Sweep) -> str:
    """The table with the state of each run."""
    done = sweep.finished()
    width = max(len(run.name) for run in sweep.runs)
    lines = [f"{len(done)} of {len(sweep.runs)} runs done, results in {sweep.results}"]
    for index, run in enumerate(sweep.runs):
        state = "done" if run.name in done else "started" if run.out_dir.exists() else "to do"
        lines.append(f"{index:>5}  {run.name:<{width}}  {state}")
    return "\n".join(lines)
