"""Results of runs: one JSON object a line, which sweeps append and fits read.

    {"run": "w64-l3-n1000-s0", "recipe": "quickstart", "width": 64, "depth": 3, "parameters": 118000,
     "data": {"structures": 1000, "atoms": 12345}, "seed": 0, "learning_rate": 0.006, "flops": 1.2e15,
     "steps": 1300, "epochs": 7.5, "losses": {"force_mae": {"value": 0.05, "unit": "eV/Å"}},
     "seconds": 210.0, "memory_gib": 0.6, "technique": "fused, save", "versions": {"megagnn": "0.1.0"}}

`flops` are those of the whole training (models/family.py). The name of a loss says its kind by its last part:
`mae` (absolute), `rmse` and `mse` (squared); other names are training objectives.
"""

import fcntl
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megagnn.scaling.laws.record import RunRecord


def geometric_mean(values: Sequence[float]) -> float:
    """Geometric mean of losses over seeds: laws are fitted to logarithms."""
    return math.exp(sum(map(math.log, values)) / len(values))


_NUMBERS = ("width", "depth", "parameters", "flops", "steps", "epochs", "learning_rate")
_WHOLE = ("width", "depth", "parameters", "seed", "steps")
_NEEDED = ("run", "recipe", "data", "losses", "seed", *_NUMBERS)
_OPTIONAL = ("seconds", "memory_gib", "technique", "versions")


def parse_record(line: str, where: str) -> RunRecord:
    """One line to a record; `where` (file and line) begins the messages.

    Raises:
        ValueError: no JSON object, a field that is missing, unknown or not of its kind, or a number that is
            not positive and finite.
    """
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not a JSON object ({error.msg}); each line holds one run") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where}: not a JSON object; each line holds one run")
    missing = [name for name in _NEEDED if name not in values]
    if missing:
        raise ValueError(f"{where}: the field '{missing[0]}' is missing; a run needs {', '.join(_NEEDED)}")
    unknown = sorted(set(values) - {*_NEEDED, *_OPTIONAL})
    if unknown:
        raise ValueError(
            f"{where}: unknown field '{unknown[0]}'; a run has {', '.join((*_NEEDED, *_OPTIONAL))}"
        )
    data, losses = values.pop("data"), values.pop("losses")
    for name in _NUMBERS:
        values[name] = _number(values[name], f"{where}: {name}")
    sizes = {
        name: int(_number(_item(data, name, where, "data"), f"{where}: data.{name}"))
        for name in ("structures", "atoms")
    }
    for name in _WHOLE:
        values[name] = _whole(values[name], f"{where}: {name}")
    for name in ("seconds", "memory_gib"):
        if values.get(name) is not None:
            values[name] = _number(values[name], f"{where}: {name}")
    return RunRecord(**{**values, **sizes}, losses=_losses(losses, where))


def _item(values: Any, name: str, where: str, what: str) -> Any:
    if not isinstance(values, dict) or name not in values:
        raise ValueError(f"{where}: {what} must be an object with '{name}', got {values!r}")
    return values[name]


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{what} must be a positive, finite number, got {value!r}")
    return float(value)


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 0:
        raise ValueError(f"{what} must be a whole number, not negative, got {value!r}")
    return int(value)


def _losses(values: Any, where: str) -> dict[str, tuple[float, str]]:
    if not isinstance(values, dict) or not values:
        raise ValueError(f'{where}: losses must be {{"name": {{"value": ..., "unit": ...}}}}, got {values!r}')
    return {
        name: (
            _number(_item(loss, "value", where, f"losses.{name}"), f"{where}: losses.{name}.value"),
            str(_item(loss, "unit", where, f"losses.{name}")),
        )
        for name, loss in values.items()
    }


def slug(recipe: str) -> str:
    """A recipe in the names of runs and files: words joined by hyphens."""
    return re.sub(r"\W+", "-", recipe).strip("-")


def read_records(paths: Sequence[str | Path]) -> list[RunRecord]:
    """All runs of some files, in their order.

    A last line without an end, as a killed process leaves it, is left out.

    Raises:
        ValueError: see `parse_record`; also two runs of one name and recipe, and files without a run.
        FileNotFoundError: no such file.
    """
    records: list[RunRecord] = []
    seen: dict[tuple[str, str], str] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"no file of runs at {path}")
        for number, line in _lines(path):
            where = f"{path}, line {number}"
            record = parse_record(line, where)
            key = (record.recipe, record.run)
            if key in seen:
                raise ValueError(
                    f"{where}: the run '{record.run}' of the recipe '{record.recipe}' is there already "
                    f"({seen[key]}); name runs apart, or remove one of the lines"
                )
            seen[key] = where
            records.append(record)
    if not records:
        raise ValueError(f"no runs in {', '.join(map(str, paths))}")
    return records


def _lines(path: Path) -> Iterable[tuple[int, str]]:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        try:
            json.loads(lines[-1])
        except json.JSONDecodeError:
            lines.pop()
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def append_line(path: Path, line: str) -> None:
    """Append one line, on the disk when this returns; an unfinished last line is cut off first.

    Processes that append at once wait for each other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
        file.write((line + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
