"""The parity matrix as a Markdown page."""

from __future__ import annotations

import datetime
from collections.abc import Iterable

import torch

from tests.distributed.parity import AXES, Outcome
from tests.tolerances import PARITY, PARITY_FLOOR

_HEADER = """# Parity: every layout against one process

    {command}

{date}, two CPU cores (x86-64, shared), gloo, PyTorch {torch}, float64. A cell is a layout (tp x dp), a plan
for the edges, a force method, what is recomputed, the edge operation and a configuration; each is
compared with one process that runs the unfused operation, `create_graph` and no recomputation. Errors are
max|x - x_ref| / max|x_ref| of each tensor, the worst over ranks and cells: of energies (without references),
forces, stress and loss, and of every parameter's gradient (floor: {floor:g} of the global gradient norm).
{count} cells, {passed} within {tolerance:g}.

Plans do not exist at tp = 1, blocks are not recomputed where the operation is unfused: such cells are left
out. Configurations and structures: `tests/distributed/parity.py`. In `energies` and `study` one of two
data-parallel ranks has no structure.
"""


def label(value: object) -> str:
    """An axis value in words."""
    return f"tp {value[0]}, dp {value[1]}" if isinstance(value, tuple) else str(value)


def worst(outcomes: Iterable[Outcome]) -> str:
    """Number of cells, worst outputs, worst gradients, as cells of a row."""
    found = list(outcomes)
    if not found:
        return "0 | | |"
    outputs, gradients = max(o.outputs for o in found), max(o.gradients for o in found)
    return f"{len(found)} | {outputs:.1e} | {gradients:.1e} |"


def table(outcomes: list[Outcome], command: str) -> str:
    """A page: by axis value, by layout and configuration, the worst cells."""
    lines = [
        _HEADER.format(
            command=command,
            date=datetime.date.today().isoformat(),
            torch=torch.__version__.split("+")[0],
            floor=PARITY_FLOOR,
            tolerance=PARITY,
            count=len(outcomes),
            passed=sum(o.passes for o in outcomes),
        ),
        "| axis | value | cells | outputs and loss | gradients |",
        "|---|---|---|---|---|",
    ]
    for axis, values in AXES.items():
        for value in values:
            some = (o for o in outcomes if getattr(o.cell, axis) == value)
            # the number of cells is the third column
            lines.append(f"| {axis} | {label(value)} | {worst(some)}")
    lines += ["", "## By configuration and layout, gradients", ""]
    lines += [
        "| | " + " | ".join(map(label, AXES["layout"])) + " |",
        "|---" * (1 + len(AXES["layout"])) + "|",
    ]
    for configuration in AXES["configuration"]:
        cells = [
            [o.gradients for o in outcomes if o.cell[0] == layout and o.cell.configuration == configuration]
            for layout in AXES["layout"]
        ]
        lines.append(f"| {configuration} | " + " | ".join(f"{max(c):.1e}" if c else "" for c in cells) + " |")
    lines += ["", "## The five worst cells", "", "| cell | tensor | error |", "|---|---|---|"]
    for o in sorted(outcomes, key=lambda o: -max(o.errors.values()))[:5]:
        name = max(o.errors, key=o.errors.__getitem__)
        lines.append(f"| {o.cell} | {name} | {o.errors[name]:.1e} |")
    return "\n".join(lines) + "\n"
