"""Results of runs: one JSON object a line, which sweeps append and fits read.

    {"run": "w64-l3-n1000-s0", "recipe": "quickstart", "width": 64, "depth": 3, "parameters": 118000,
     "data": {"structures": 1000, "atoms": 12345}, "seed": 0, "learning_rate": 0.006, "flops": 1.2e15,
     "steps": 1300, "epochs": 7.5, "losses": {"force_mae": {"value": 0.05, "unit": "eV/Å"}},
     "seconds": 210.0, "memory_gib": 0.6, "technique": "fused, save", "versions": {"megagnn": "0.1.0"}}

`flops` are those of the whole training (models/family.py). The name of a loss says its kind by its last part:
`mae` (absolute), `rmse` and `mse` (squared); other names are training objectives.
"""

import dataclasses
import fcntl
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megagnn.scaling.laws.record import RunRecord


def geometric_mean(values: Sequence[float]) -> float:
    """Geometric mean of losses over seeds: laws are fitted to logarithms."""
    return math.exp(sum(map(math.log, values)) / len(values))


def parse_record(line: str, where: str) -> RunRecord:
    """One line to a record; `where` (file and line) begins the messages.

    Raises:
        ValueError: no JSON object, or a field that is missing, unknown or not of its kind; names it.
    """
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not a JSON object ({error.msg}); each line holds one run") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where}: not a JSON object; each line holds one run")
    data = values.pop("data", None)
    try:
        return TypeAdapter(RunRecord).validate_python({**values, **(data if isinstance(data, dict) else {})})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        text = f"{first['msg']}, got {first['input']!r}"
        if first["type"] in ("missing", "unexpected_keyword_argument"):
            known = ", ".join(field.name for field in dataclasses.fields(RunRecord))
            text = f"{first['msg']}; a run has {known} (structures and atoms in `data`)"
        raise ValueError(f"{where}: field '{name}': {text}") from None


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
