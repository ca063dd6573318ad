"""The label of docs/extending.md: its edits, made in a copy of the package, give charges that are trained."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import megagnn
from megagnn.cli import main
from megagnn.data import keys
from megagnn.data.dataset import StructureDataset
from megagnn.models.potential import Potential
from megagnn.objective.config import LossConfig
from megagnn.objective.gradient_methods import GRADIENT_METHODS
from megagnn.objective.loss import Loss, label_counts
from megagnn.parallel.context import ParallelContext
from megagnn.pipeline_parallel.pipeline import Pipeline, schedule_for
from megagnn.pipeline_parallel.registry import registered
from tests.models.physics import STATISTICS, model_config, randomised
from tests.tolerances import PARITY

ROOT = Path(__file__).parents[2]
EDIT = re.compile(
    r"^`(megagnn/\S+\.py)`, (in|before) `(\S+)`[^\n]*:\n\n```python\n(.*?)```", re.MULTILINE | re.DOTALL
)
CONFIG = """
[model]
family = "painn"
width = 16
num_layers = 1
num_radial = 4
cutoff = 3.0
[data]
paths = ["again"]
[loss]
charges_weight = 10
[optim]
learning_rate = 0.03
warmup_steps = 2
[train]
num_steps = 20
validate_every = 20
checkpoint_every = 20
[parallel]
zero_stage = 3
"""


def edits() -> list[tuple[str, str, str, str]]:
    """(file, "in" or "before", what, lines) of the section."""
    section = (ROOT / "docs/extending.md").read_text().split("\n## A label\n")[1].split("\n## ")[0]
    found = EDIT.findall(section)
    assert len(found) == section.count("```python")
    return found


def edited(source: str, where: str, what: str, lines: str) -> str:
    """A module with lines before a definition, or in it: at the end of a table or function, before the first
    method of a class."""
    body: list[ast.stmt] = ast.parse(source).body
    for name in what.split("."):
        (node,) = [n for n in body if name in names_of(n)]
        body = getattr(node, "body", [])
    assert node.end_lineno is not None
    if where == "before":
        at, lines = node.lineno - 1, f"{lines}\n\n"
    elif isinstance(node, ast.ClassDef):
        at, lines = next(n.lineno for n in body if isinstance(n, ast.FunctionDef)) - 1, f"{lines}\n"
    else:
        at = node.end_lineno if isinstance(node, ast.FunctionDef) else node.end_lineno - 1
    old = source.splitlines(keepends=True)
    return "".join([*old[:at], lines, *old[at:]])


def names_of(node: ast.stmt) -> set[str]:
    """What a statement defines."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def test_charges_are_trained(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "megagnn", tmp_path / "megagnn", ignore=shutil.ignore_patterns("__pycache__"))
    for file, *edit in edits():
        path = tmp_path / file
        path.write_text(edited(path.read_text(), *edit))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "tests.objective.test_new_label"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"charges +zero charges", done.stdout)
    error, zero = map(float, done.stdout.rsplit("waters", 1)[1].split()[-2:])
    assert error < 0.3 * zero


# What follows runs in a process of its own, on the edited copy.


def write_waters(path: Path) -> None:
    """Waters with charges -0.8 and 0.4 e, stretched at random; of every fifth they are not known."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for k in range(40):
            places = np.array([[0, 0, 0.12], [0, 0.76, -0.48], [0, -0.76, -0.48]]) + rng.normal(
                0, 0.03, (3, 3)
            )
            column = "" if k % 5 == 4 else ":q:R:1"
            file.write(f"3\nProperties=species:S:1:pos:R:3:forces:R:3{column} energy={-400 + rng.normal()}\n")
            for symbol, place, charge in zip("OHH", places, (-0.8, 0.4, 0.4), strict=True):
                numbers = [*place, *rng.normal(0, 0.1, 3), *([charge] if column else [])]
                file.write(f"{symbol} {' '.join(map(str, numbers))}\n")


def gradient(potential: Potential) -> dict[str, Tensor]:
    """The gradient that was added, by the parameters' names; it is cleared."""
    found = {name: p.grad for name, p in potential.named_parameters() if p.grad is not None}
    potential.zero_grad()
    return found


def check_gradients(store: Path) -> None:
    """One backward and a pipeline give the terms and the gradient of derivatives of derivatives."""
    config, context = model_config(family="painn", num_layers=1), ParallelContext()
    loss = Loss(LossConfig(charges_weight=3.0))
    data = StructureDataset([store], "all", 4.0)
    batch = data.batch([3, 4, 5], torch.float64)
    assert batch[keys.has("charges")].tolist() == [True, False, True]
    counts = label_counts(batch, context)
    assert counts.labels["charges"] == 6
    potential = randomised(config)
    terms = GRADIENT_METHODS["create_graph"](potential, batch, loss, counts)[1]
    expected = gradient(potential)
    assert expected["model.heads.charges.out.weight"].abs().max() > 0
    found = [(GRADIENT_METHODS["one_backward"](potential, batch, loss, counts)[1], gradient(potential))]
    name = next(name for name, entry in registered().items() if entry.conservative)
    schedule = schedule_for(name, "conservative", 1, 1)
    pipeline = Pipeline(config, STATISTICS, schedule, context, precision=torch.float64)
    pipeline.potential.load_state_dict(potential.state_dict())
    found.append((pipeline.gradients([batch], loss, counts)[1], gradient(pipeline.potential)))
    for shares, got in found:
        assert shares.keys() == terms.keys() == {"energy", "forces", "charges"}
        for name, share in terms.items():
            assert abs(shares[name] - share) <= PARITY * share
        for name, value in expected.items():
            assert (got[name] - value).abs().max() <= PARITY * value.abs().max(), name
    (predicted,) = pipeline.predict([batch])
    torch.testing.assert_close(predicted["charges"], potential(batch)["charges"], rtol=PARITY, atol=0)


if __name__ == "__main__":
    assert Path(megagnn.__file__).parents[1] == Path.cwd()
    write_waters(Path("waters.xyz"))
    flags = ["--group-by", "frame", "--split", "0.6,0.2,0.2"]
    assert main(["prepare", "waters.xyz", "--charges-key", "q", "--out", "waters", *flags]) == 0
    assert main(["prepare", "waters", "--out", "again"]) == 0
    check_gradients(Path("again"))
    Path("run.toml").write_text(CONFIG)
    assert main(["train", "run.toml", "--out_dir", "run"]) == 0
    assert main(["evaluate", "run/checkpoints/best", "again"]) == 0
