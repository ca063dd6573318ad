"""`megagnn config --describe`: no key is left out, and each has its type, default and meaning."""

import re

import pytest

from megagnn.cli import main
from megagnn.config import RunConfig
from megagnn.describe import describe
from megagnn.overrides import changes


def test_every_key_is_described() -> None:
    section, found, lines = "", {}, describe().splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if header := re.match(r"\[(\w+)\]", line):
            section = header[1] + "."
        elif key := re.match(r"  (\w+) = (.+)  \((.+)\)$", line):
            found[section + key[1]] = (key[2], key[3], after.strip())
    assert set(found) == set(changes(RunConfig))
    assert all(meaning and not meaning.startswith("[") for _, _, meaning in found.values())
    assert found["model.width"] == ("128", "integer > 0", "Channels of a node, F.")
    assert found["optim.clip_norm"][:2] == ("10.0", "number > 0 or none")
    assert found["optim.betas"][:2] == ("[0.9, 0.99]", "list of 2: number, number")
    assert found["train.patience"][:2] == ("none", "integer > 0 or none")
    assert found["parallel.zero_stage"][:2] == ("0", "integer >= 0 <= 3")
    assert found["model.edge_memory"][:2] == ('"save"', '"save" | "recompute"')
    assert found["init.new_levels"][:2] == ("{}", "table of string")


def test_one_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--describe", "optim"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("[optim]  ")
    assert "learning_rate = 0.001  (number > 0)" in told
    assert "cutoff" not in told
    assert main(["config", "--describe", "optm"]) == 2
    assert "no section [optm] in a configuration; nearest: 'optim'" in capsys.readouterr().err
