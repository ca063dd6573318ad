"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = sorted((ROOT / "megagnn").rglob("*.py"))
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh", ".sh"}
FOLDERS = ("megagnn", "csrc", "tests", "tools", "examples")
SOURCES = [
    ROOT / "setup.py",
    *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES),
]
MAX_LINES = 500


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def distributed_names(source: str) -> Iterator[str]:
    """Every dotted name under torch.distributed that a module imports or reaches through torch."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("torch.distributed"))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = (f"{node.module}.{a.name}" for a in node.names)
            yield from (name for name in names if name.startswith("torch.distributed"))
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed"):
            yield ast.unparse(node)


def may_use(path: str) -> bool:
    """torch.distributed belongs to parallel/ and launch/."""
    return path.startswith(("megagnn/parallel/", "megagnn/launch/"))


def test_torch_distributed_stays_in_its_folder() -> None:
    found = [
        f"{name_of(path)}: {name}"
        for path in PACKAGE
        for name in distributed_names(path.read_text())
        if not may_use(name_of(path))
    ]
    assert not found, "go through megagnn.parallel instead"


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed",
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import all_reduce",
        "from torch.distributed.checkpoint import save",
        "import torch\ntorch.distributed.barrier()",
    ],
)
def test_the_rule_sees_each_way_to_break_it(source: str) -> None:
    names = list(distributed_names(source))
    assert names
    assert not may_use("megagnn/checkpoint/writer.py")
    assert may_use("megagnn/parallel/context.py")


def test_the_rule_lets_other_imports_pass() -> None:
    lines = [
        "import torch",
        "from torch import distributions, nn",
        "from megagnn.parallel import distributed",
    ]
    assert not list(distributed_names("\n".join([*lines, "torch.nn"])))


def families_named(path: str, source: str) -> list[str]:
    """Modules of a model family that a module outside of its folder imports; the registry alone may."""
    families = [f"megagnn.models.{f.name}" for f in (ROOT / "megagnn/models").iterdir() if f.is_dir()]
    if path == "megagnn/models/registry.py":
        return []
    own = path.replace("/", ".")
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.module)
    return [
        str(node.module)
        for node in nodes
        for family in families
        if f"{node.module}.".startswith(f"{family}.") and not own.startswith(f"{family}.")
    ]


def test_nothing_outside_of_a_family_names_it() -> None:
    found = {name_of(path): families_named(name_of(path), path.read_text()) for path in PACKAGE}
    assert not {path: names for path, names in found.items() if names}, "read models/family.py instead"


def test_a_family_named_outside_is_seen() -> None:
    planted = "from megagnn.models.egnn.layer import EGNNLayer"
    assert families_named("megagnn/pipeline_parallel/stage.py", planted) == ["megagnn.models.egnn.layer"]
    assert not families_named("megagnn/models/egnn/model.py", planted)


def test_files_stay_short() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert not {name: n for name, n in lengths.items() if n > MAX_LINES}, (
        f"split what is over {MAX_LINES} lines"
    )


def test_every_module_says_what_it_is() -> None:
    assert not [name_of(path) for path in PACKAGE if not ast.get_docstring(ast.parse(path.read_text()))]


def test_there_is_something_to_check() -> None:
    assert len(PACKAGE) > 5
    assert any(path.suffix == ".cu" for path in SOURCES)
