"""A run that begins with a checkpoint is the run of one process on every layout, frozen parts included."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megagnn.checkpoint.folder import folder_name
from megagnn.checkpoint.single_file import load_checkpoint
from megagnn.config import load_config
from megagnn.parallel.context import ParallelContext, grid_context
from megagnn.train.trainer import Trainer
from tests import runs
from tests.distributed.spawn import spawn
from tests.tolerances import PARITY

pytestmark = pytest.mark.timeout(1200)

# Adam divides gradients by their own size, so that roundings of the small ones grow with every step.
TOLERANCE = 1e-8
NUM_STEPS = 3
SETTINGS = {
    "train.dtype": "float64",
    "train.num_steps": str(NUM_STEPS),
    "train.checkpoint_every": "1",
    "train.keep_checkpoints": "9",
    "train.threads": "1",
    "optim.warmup_steps": "1",
    "optim.weight_decay": "0.1",
    "optim.clip_norm": "0.01",
    "optim.rates": "layers=0.1,energy_head=1",
    "init.new_elements": "Au=Ag",
}
LAYOUTS: dict[str, tuple[tuple[int, int, int], dict[str, str]]] = {
    "dp": ((2, 1, 1), {}),
    "dp torch": ((2, 1, 1), {"optim.implementation": "torch"}),
    "zero 1": ((2, 1, 1), {"parallel.zero_stage": "1"}),
    "zero 3": ((2, 1, 1), {"parallel.zero_stage": "3"}),
    "tp": ((1, 1, 2), {"parallel.tensor": "2"}),
    "tp zero 3": ((1, 1, 2), {"parallel.tensor": "2", "parallel.zero_stage": "3"}),
    "pp": ((1, 2, 1), {"parallel.pipeline": "2"}),
}
"""Ranks along dp, pp and tp, and settings."""
USUAL = ("zero 3", "tp", "pp")
"""Without --full."""


def train(context: ParallelContext, folder: Path, name: str, more: dict[str, str], frozen: str) -> None:
    """A run; its checkpoints are what is compared."""
    file = folder / f"{name}-{context.rank}.toml"
    file.write_text(runs.CONFIG)
    given = {"data.paths": str(folder / "gold"), "out_dir": str(folder / name)}
    given |= {"init_from": str(folder / "base/checkpoints/last"), "optim.freeze": frozen, **SETTINGS, **more}
    Trainer(load_config(file, [part for key, v in given.items() for part in (f"--{key}", v)]), context).run()


def on_rank(context: ParallelContext, folder: Path, names: tuple[str, ...], frozen: str) -> None:
    for name in names:
        ranks, more = LAYOUTS[name]
        train(grid_context(*ranks), folder, name, more, frozen)


def saved(folder: Path, name: str, step: int) -> dict[str, Tensor]:
    return load_checkpoint(folder / name / "checkpoints" / folder_name(step), optimizer=True).tensors


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that all begin with, and their runs."""
    folder = tmp_path_factory.mktemp("tune")
    few = ("--train.num_steps", "8", "--train.validate_every", "8", "--train.dtype", "float64")
    assert runs.train(runs.write_data(folder / "store"), folder / "base", *few) == 0
    runs.write_gold(folder / "gold")
    model = load_checkpoint(folder / "base/checkpoints/last").weights("average")
    branch = sorted({".".join(name.split(".")[:3]) for name in model if name.startswith("layers.0.")})[0]
    frozen = f"element_embedding,{branch}"
    (folder / "frozen").write_text(frozen)
    train(ParallelContext(), folder, "alone", {}, frozen)
    spawn(2, on_rank, folder, tuple(LAYOUTS) if request.config.getoption("full") else USUAL, frozen)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_process(folder: Path, name: str) -> None:
    if not (folder / name).exists():
        pytest.skip("only with --full: one more run of two ranks")
    frozen = tuple((folder / "frozen").read_text().split(","))
    base = load_checkpoint(folder / "base/checkpoints/last").weights("average")
    one = saved(folder, "alone", 1)
    size = max(float(t.abs().max()) for key, t in one.items() if key.startswith("exp_avg/"))
    for key, got in saved(folder, name, 1).items():
        if key.startswith("exp_avg/"):  # a tenth of the clipped gradient
            assert (got - one[key]).abs().max() <= PARITY * size, f"first gradient, {key}"
    last = saved(folder, "alone", NUM_STEPS)
    for key, got in saved(folder, name, NUM_STEPS).items():
        kind, parameter = key.split("/", 1)
        if parameter.startswith(frozen):
            rows = base[parameter]
            if kind in ("model", "average"):
                assert torch.equal(got[: len(rows)], rows), f"{key} is frozen"
                assert torch.equal(got, last[key])
            else:
                assert (got == 0).all(), f"{key} is of a frozen part"
        else:
            assert (got - last[key]).abs().max() <= TOLERANCE * last[key].abs().max(), key


def test_the_steps_do_something(folder: Path) -> None:
    """All parts but the frozen ones move, in the first step by their shares of the rate."""
    frozen = tuple((folder / "frozen").read_text().split(","))
    base = load_checkpoint(folder / "base/checkpoints/last").weights("average")
    moved: dict[str, Any] = {"layers": [], "energy_head": []}
    for key, got in saved(folder, "alone", 1).items():
        kind, name = key.split("/", 1)
        if kind == "model" and not name.startswith(frozen):
            moved[name.split(".")[0]].append(float((got - base[name]).abs().max()))
    assert min(moved["layers"]) > 0
    assert max(moved["layers"]) < 0.2 * min(moved["energy_head"])
