"""The reader of docs/extending.md: `megagnn prepare` finds it, and a store holds its labels."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from ase import units

from megagnn.cli import main
from megagnn.data.formats import FORMATS, Format
from megagnn.data.store import Store

DOCUMENT = Path(__file__).parents[3] / "docs" / "extending.md"
KCAL = units.kcal / units.mol
"""eV."""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The module's text, and the line of `FORMATS`, before "ase"."""
    section = DOCUMENT.read_text().split("\n## A reader\n")[1].split("\n## ")[0]
    (source,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    module = ModuleType("megagnn.data.formats.json_lines")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, str(DOCUMENT), "exec"), module.__dict__)
    (line,) = re.findall(r"^    (\"json-lines\": .*),$", section, re.MULTILINE)
    known = dict(FORMATS)
    FORMATS.clear()
    FORMATS.update(eval(f"{{{line}}}", {**module.__dict__, "Format": Format}) | known)
    yield
    FORMATS.clear()
    FORMATS.update(known)


def molecule(number: int, **changes: Any) -> str:
    """A line: water number `number`, its gradient a multiple of 1 kcal/mol/Å."""
    entry = {
        "molecule": f"water {number // 2}",
        "symbols": ["O", "H", "H"],
        "xyz": [[0, 0, 0.12], [0, 0.76, -0.48], [0, -0.76, -0.48 + 0.01 * number]],
        "energy": -47900.0 - 0.1 * number,
        "gradient": [[0, 0, 2.0 * number], [0, 0, -float(number)], [0, 0, -float(number)]],
        "hash": f"{number:03}",
    }
    return json.dumps({**entry, **changes}) + "\n"


def prepare(path: Path, lines: list[str], *arguments: str) -> int:
    path.write_text("".join(lines))
    return main(["prepare", str(path), "--out", str(path.with_suffix("")), "--level", "toy", *arguments])


def test_a_store_holds_its_labels(tmp_path: Path) -> None:
    assert prepare(tmp_path / "waters.jsonl", [molecule(k) for k in range(20)]) == 0
    store = Store.open(tmp_path / "waters")
    assert (len(store), store.header.sources, store.header.levels) == (20, ("waters",), ("toy",))
    third = store.structure(3)
    assert third["atomic_numbers"].tolist() == [8, 1, 1]
    assert third["energy"] == pytest.approx(-47900.3 * KCAL, rel=1e-12)
    assert third["forces"][:, 2] == pytest.approx([-6 * KCAL, 3 * KCAL, 3 * KCAL], rel=1e-6)
    assert store.group_names() == [f"water {k}" for k in range(10)]
    assert np.array_equal(store.split[::2], store.split[1::2])


def test_options_are_obeyed(tmp_path: Path) -> None:
    lines = [molecule(k, symbols=["OW", "H", "H"]) for k in range(10)]
    flags = ("--species", "OW=O", "--forces-key", "none", "--group-by", "info:hash", "--units", "energy=Ha")
    assert prepare(tmp_path / "waters.jsonl", lines, "--format", "json-lines", "--accept-labels", *flags) == 0
    store = Store.open(tmp_path / "waters")
    assert "forces" not in store.structure(0)
    assert store.structure(0)["energy"] == pytest.approx(-47900 * units.Hartree)
    assert len(store.group_names() or ()) == 10


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "JSONDecodeError"),
        ("{}", "KeyError 'symbols'"),
        (molecule(1, symbols=["OW", "H", "H"]), "unknown species OW; say"),
    ],
)
def test_a_broken_line_is_named_or_left_out(
    line: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [molecule(0), line.strip() + "\n", *(molecule(k) for k in range(2, 12))]
    assert prepare(tmp_path / "waters.jsonl", lines) == 2
    said = capsys.readouterr().err
    assert "waters.jsonl, frame 1: no molecule as JSON" in said
    assert reason in said
    assert prepare(tmp_path / "waters.jsonl", lines, "--on-bad", "skip") == 0
    assert Store.open(tmp_path / "waters").header.provenance["waters"]["rejected"] == {"unreadable": 1}
