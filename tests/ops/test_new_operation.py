"""The operation of docs/extending.md, section "A kernel", as written there."""

import re
from pathlib import Path
from typing import Any

import torch

DOCUMENT = Path(__file__).parents[2] / "docs" / "extending.md"


def test_the_operation_of_the_document() -> None:
    text = DOCUMENT.read_text().split("\n## A kernel\n")[1].split("\n## ")[0]
    (source,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    module: dict[str, Any] = {"__name__": "cube"}
    exec(compile(source, str(DOCUMENT), "exec"), module)
    x = torch.tensor([-2.0, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
    value = module["cube"](x)
    assert value.tolist() == [-8.0, 0.0, 0.125]
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    assert first.tolist() == [12.0, 0.0, 0.75]
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.tolist() == [-12.0, 0.0, 3.0]
    assert torch.autograd.gradcheck(module["cube"], x)
    assert torch.autograd.gradgradcheck(module["cube"], x)
