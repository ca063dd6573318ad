"""Two update rules that only tests know: of elements, that of docs/extending.md, and of whole matrices."""

import math
import re
from pathlib import Path
from typing import Any

import torch

from megagnn.optim.rule import MatrixRule, Rule
from megagnn.optim.rules import RULES
from megagnn.optim.rules.adamw import ADAMW

DOCUMENT = Path(__file__).parents[2] / "docs" / "extending.md"


def _documented() -> dict[str, Rule]:
    """The file's text and the line of `RULES`, as the document has them."""
    section = DOCUMENT.read_text().split("\n## An optimizer\n")[1].split("\n## ")[0]
    (source,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (line,) = re.findall(r"^    (\"lion\": .*),$", section, re.MULTILINE)
    names: dict[str, Any] = {"__name__": "megagnn.optim.rules.lion", "Rule": Rule}
    exec(compile(source, str(DOCUMENT), "exec"), names)
    return eval(f"{{{line}}}", names)  # type: ignore[no-any-return]


def _normalised(gradients, states, settings, step):  # type: ignore[no-untyped-def]
    """Momentum over its norm, plus the mean of past gradients over each row."""
    found = []
    for gradient, state in zip(gradients, states, strict=True):
        state["velocity"].mul_(0.5).add_(gradient)
        state["rows"].lerp_(gradient.mean(1), 0.5)
        found.append(state["velocity"] / torch.linalg.vector_norm(state["velocity"]) + state["rows"][:, None])
    return found


RULES.update(_documented())
RULES["normalised"] = Rule(
    ADAMW,
    MatrixRule(lambda shape: {"velocity": shape, "rows": shape[:1]}, _normalised, lambda s: 3 * math.prod(s)),
)
