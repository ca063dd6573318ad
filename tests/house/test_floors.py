"""The order of the house: no import runs back up the floors, and no modules import each other in a circle."""

from __future__ import annotations

import ast
import functools
import graphlib
from collections.abc import Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megagnn"
# From the ground up: a room imports rooms of its own floor and of those below.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("overrides", "drawing"),
    ("ops",),
    ("data",),
    ("parallel",),
    ("tensor_parallel",),
    ("models",),
    ("objective",),
    ("optim",),
    ("pipeline_parallel",),
    ("config",),
    ("plan",),
    ("launch",),
    ("checkpoint",),
    ("train",),
    ("scaling",),
    ("calculator", "cli", "describe", "__main__"),
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
# Rooms inside rooms that stand below the rest of theirs: laws know tables of runs and no training.
INNER = (("megagnn.scaling.laws", "megagnn.scaling"), ("megagnn.models.egnn.edge", "megagnn.models.egnn"))
# Imports that still run up, as (module, what it imports); the goal is none.
KNOWN: set[tuple[str, str]] = set()

Imports = Mapping[str, set[tuple[str, bool]]]
"""Module -> modules it imports, each with whether it is imported for annotations only."""


def sources() -> dict[str, str]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path.read_text()
    return found


@functools.cache  # each test parses what it planted, and all others once
def imports_of(source: str, modules: frozenset[str]) -> frozenset[tuple[str, bool]]:
    """Modules of the package that a source imports, at its top or inside functions."""
    found = set()
    tree = ast.parse(source)
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports of the package are written whole"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in modules:  # a name in a module
                name = name.rpartition(".")[0]
            if name:
                found.add((name, id(node) in typing_only))
    return frozenset(found)


def graph(modules: Mapping[str, str]) -> Imports:
    names = frozenset(modules)
    return {name: set(imports_of(source, names)) - {(name, False)} for name, source in modules.items()}


def room(module: str) -> str:
    return module.split(".")[1]


def going_up(imports: Imports) -> set[tuple[str, str]]:
    """Imports from a floor above, or from an inner room into the one around it."""
    found = {
        (name, target)
        for name, targets in imports.items()
        for target, _ in targets
        if name != "megagnn" and target != "megagnn" and LEVEL[room(target)] > LEVEL[room(name)]
    }
    for inner, outer in INNER:
        for name, targets in imports.items():
            if f"{name}.".startswith(f"{inner}."):
                found |= {
                    (name, target)
                    for target, _ in targets
                    if f"{target}.".startswith(f"{outer}.") and not f"{target}.".startswith(f"{inner}.")
                }
    return found


def circle(imports: Imports) -> list[str]:
    """Modules that import each other in a circle when they are loaded or run; empty if there is none."""
    edges = {name: {target for target, typing in t if not typing} for name, t in imports.items()}
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_every_room_has_a_floor() -> None:
    assert {room(name) for name in sources() if name != "megagnn"} == set(LEVEL)


def test_no_import_runs_up() -> None:
    found = going_up(graph(sources()))
    assert not found - KNOWN, "a room imports from its own floor and from those below"
    assert found == KNOWN, "known exceptions that are mended leave the list"


def test_no_circle() -> None:
    assert not circle(graph(sources()))


@pytest.mark.parametrize(
    ("module", "line", "wrong"),
    [
        ("megagnn.ops.segment", "from megagnn.models.potential import Potential", "megagnn.models.potential"),
        ("megagnn.ops.segment", "def f():\n    import megagnn.config", "megagnn.config"),
        ("megagnn.optim.flat", "from megagnn import config", "megagnn.config"),
        ("megagnn.checkpoint.writer", "import megagnn.train.trainer as t", "megagnn.train.trainer"),
        ("megagnn.scaling.laws.forms", "from megagnn.scaling import sweep", "megagnn.scaling.sweep"),
        (
            "megagnn.data.batch",
            "if TYPE_CHECKING:\n    from megagnn.parallel.context import ParallelContext",
            "megagnn.parallel.context",
        ),
    ],
)
def test_a_planted_import_up_is_found(module: str, line: str, wrong: str) -> None:
    modules = sources()
    modules[module] += f"\n{line}\n"
    assert going_up(graph(modules)) - KNOWN == {(module, wrong)}


@pytest.mark.parametrize("line", ["import {}", "def f():\n    from {} import x"])
def test_a_planted_circle_is_found(line: str) -> None:
    modules = sources()
    modules["megagnn.ops.extension"] += "\n" + line.format("megagnn.ops.segment") + "\n"
    found = circle(graph(modules))
    assert {"megagnn.ops.extension", "megagnn.ops.segment"} <= set(found)


def test_imports_for_annotations_make_no_circle() -> None:
    modules = sources()
    modules["megagnn.ops.extension"] += "\nif TYPE_CHECKING:\n    import megagnn.ops.segment\n"
    assert not circle(graph(modules))
