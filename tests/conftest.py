"""Shared by all tests: options, warnings that are errors, multi-rank tests last."""

from __future__ import annotations

import pytest

# Where a collective has no autograd kernel, PyTorch only warns, and the gradients of a force loss are wrong.
FATAL_WARNINGS = ("error:.*autograd kernel was not registered:UserWarning",)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("megagnn")
    group.addoption("--full", action="store_true", help="parity: the whole matrix, not a cover of all pairs")
    group.addoption("--table", metavar="PATH", help="parity: write the table of errors")


def pytest_configure(config: pytest.Config) -> None:
    for line in FATAL_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "distributed" in item.path.parts)
