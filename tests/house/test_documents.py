"""Files, modules and sections that the documents name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PLACES = (ROOT, ROOT / "megagnn", ROOT / "megagnn/pipeline_parallel", ROOT / "docs")
"""Where a path that a document names may begin."""
FOLDERS = ("megagnn", "csrc", "tests", "tools", "examples")
EXAMPLES = {
    "megagnn/models/schnet/config.py",
    "megagnn/models/schnet/model.py",
    "megagnn.models.schnet.model",
    "schedules/gpipe_fifo.py",
    "megagnn/data/formats/json_lines.py",
    "megagnn/optim/rules/lion.py",
    "megagnn/ops/cube.py",
    "csrc/cube.cpp",
}
"""Files that docs/extending.md tells its reader to write."""
PATH = re.compile(r"(?<![\w/.:-])(?:[\w.-]+/)+[\w.-]+\.(?:py|cpp|cuh|cu|h|sh|toml|md|svg|png)\b")
FILE = re.compile(r"`([\w-]+\.(?:py|cpp|cuh|cu|h|sh))`")
FILES = {"setup.py", *(path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*"))}
# Names of rooms that are sections of a configuration, too, count after "megagnn." only.
ROOMS = "ops|tensor_parallel|models|objective|pipeline_parallel|launch|scaling"
MODULE = re.compile(rf"(?<![\w/.-])(?:(?:megagnn|tools|tests)(?:\.\w+)+|(?:{ROOMS})(?:\.\w+)+)")
LINK = re.compile(r"\]\(([^)#:\s]*)(?:#([\w-]+))?\)")


def missing_paths(text: str, folder: Path) -> list[str]:
    """Paths in a document in `folder` at which nothing lies; NAME is a placeholder."""
    found = {path for path in PATH.findall(text) if not re.search("NAME|OUT_DIR", path)}
    missing = {p for p in found - EXAMPLES if not any((at / p).exists() for at in (*PLACES, folder))}
    return sorted(missing | (set(FILE.findall(text)) - FILES))


def missing_modules(text: str) -> list[str]:
    """Dotted names of which no module, or nothing in the module, has the name."""
    found = {name for name in MODULE.findall(text) if not re.search(r"NAME|\.(py|md)$", name)}
    return sorted(name for name in found - EXAMPLES if not is_there(name))


def is_there(name: str) -> bool:
    parts = name.split(".")
    if parts[0] not in ("megagnn", "tools", "tests"):
        parts = ["megagnn", *parts]
    for count in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:count])
        rest = parts[count : count + 1]
        if path.is_dir() and not rest:
            return True
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if source.is_file():
            return all(re.search(rf"\b{word}\b", source.read_text()) for word in rest)
    return False


def missing_links(text: str, document: Path) -> list[str]:
    """Links to files, and to sections of them, that are not there."""
    missing = []
    for target, section in LINK.findall(text):
        path = document.parent / target if target else document
        if not path.exists() or (section and section not in sections(path.read_text())):
            missing.append(f"{target}#{section}" if section else target)
    return missing


def sections(text: str) -> set[str]:
    """Anchors of a document's headings."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_is_there(document: Path) -> None:
    text = document.read_text()
    assert not missing_paths(text, document.parent)
    assert not missing_modules(text)
    assert not missing_links(text, document)


def test_what_is_missing_is_found() -> None:
    text = "`megagnn/train/loss.py`, `megagnn/train/trainer.py`, `OUT_DIR/a.py`, `segment.py`, `losses.py`"
    assert missing_paths(text, ROOT / "docs") == ["losses.py", "megagnn/train/loss.py"]
    text = "`python -m tools.bench_forces`, `megagnn.objective.loss.Loss`, `models.egnn.flops`, `a.stress`"
    assert missing_modules(text) == ["models.egnn.flops", "tools.bench_forces"]
    text = "[a](extending.md#a-kernel) [b](extending.md#a-palace) [c](nowhere.md) [d](https://x.org/a.md)"
    assert missing_links(text, ROOT / "docs/kernels.md") == ["extending.md#a-palace", "nowhere.md"]


def test_examples_are_not_there() -> None:
    assert not [name for name in EXAMPLES if "/" in name and any((at / name).exists() for at in PLACES)]
