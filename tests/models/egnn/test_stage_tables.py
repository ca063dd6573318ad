"""The tables of `stages.py` have the names and the order of the enumerations of csrc/edge_stage.cpp."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megagnn.models.egnn.edge import stages
from megagnn.models.egnn.edge.runner import NUM_INPUTS

CSRC = Path(__file__).parents[3] / "csrc"
SOURCE = (CSRC / "edge_stage.cpp").read_text()
HEADER = (CSRC / "edge_call.h").read_text()


def enumerators(text: str, name: str) -> list[str]:
    """Names of an enumeration's values without the count at its end: kSumTangent as sum_tangent."""
    found = re.search(rf"enum {name} {{([^}}]*)}}", text)
    assert found, name
    values = [value.split("=")[0].strip() for value in found[1].split(",") if value.strip()]
    assert values[-1].startswith("kNum")
    return [re.sub(r"(?<!^)([A-Z])", r"_\1", value[1:]).lower() for value in values[:-1]]


def strings(name: str) -> list[str]:
    """The names that errors show."""
    found = re.search(rf"{name}\[\w+\] = {{([^}}]*)}}", SOURCE)
    assert found, name
    return re.findall(r'"(\w+)"', found[1])


def expected(source: str) -> dict[str, list[str]]:
    """Each table, as the C++ text has it."""
    inputs = enumerators(HEADER, "Input")
    bars = [f"{tangent}{name}_bar" for tangent in ("", "tangent_") for name in inputs]
    return {
        "_STAGES": enumerators(source, "Stage"),
        "_BUFFERS": enumerators(source, "Narrow") + enumerators(source, "Wide"),
        "_INPUT_BARS": bars,
        "_RESULTS": bars + enumerators(source, "Result"),
        "_WEIGHT_BARS": [f"{name}_bar" for name in enumerators(HEADER, "Weight")],
        "_OUTPUTS": [name.removesuffix("_bar") for name in enumerators(HEADER, "Bar")],
    }


@pytest.mark.parametrize("table", expected(SOURCE))
def test_tables_are_the_enumerations(table: str) -> None:
    assert getattr(stages, table) == expected(SOURCE)[table]


def test_names_in_errors() -> None:
    assert strings("kBufferNames") == stages._BUFFERS
    ours = [re.sub(r"tangent_(.)_bar", r"\1_tangent_bar", name) for name in stages._RESULTS]
    assert strings("kResultNames") == ours
    assert len(enumerators(HEADER, "Input")) == NUM_INPUTS


@pytest.mark.parametrize(
    ("before", "after", "table"),
    [
        ("kMessage,\n  kScalar,", "kScalar,\n  kMessage,", "_STAGES"),
        ("kZ,\n", "", "_BUFFERS"),
        ("kB3Bar,\n", "kB3Bar,\n  kExtra,\n", "_RESULTS"),
    ],
)
def test_a_change_of_one_side_is_seen(before: str, after: str, table: str) -> None:
    """Two values swapped, one taken away, one added in the C++ text."""
    assert before in SOURCE
    changed = expected(SOURCE.replace(before, after, 1))
    assert [name for name, values in changed.items() if values != getattr(stages, name)] == [table]
