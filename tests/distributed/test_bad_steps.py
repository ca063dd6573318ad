"""A bad step on one rank: all ranks leave it out alike, and each writes its own batches."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megagnn.config import load_config
from megagnn.data import keys
from megagnn.parallel.context import ParallelContext, grid_context
from megagnn.train.bad_steps import load_bad_batch
from megagnn.train.trainer import Trainer
from tests import runs
from tests.distributed.spawn import spawn

LAYOUTS = ((1, 2), (2, 1))  # (tp, dp)


def train(context: ParallelContext, folder: Path) -> dict[str, Any]:
    """Eight steps, of which rank 1 alone finds the fourth's loss to be no number."""
    name = f"tp{context.tp_size}"
    options = {"out_dir": folder / name, "data.paths": folder / "store", "data.max_structures": 2}
    options |= {"train.num_steps": 8, "train.on_bad_step": "skip", "optim.accumulate_steps": 2}
    overrides = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    trainer = Trainer(load_config(folder / "config.toml", overrides), context)
    original = trainer.gradient_method

    def spoil(*arguments: Any) -> Any:
        loss, shares = original(*arguments)
        bad = trainer.progress.step == 3 and context.rank == 1
        return loss * math.nan if bad else loss, shares

    trainer.gradient_method = spoil
    assert trainer.run() == ""
    weights = {name: p.detach().clone() for name, p in trainer.potential.named_parameters()}
    return {"progress": trainer.progress, "weights": weights, "steps": trainer.optimizer.num_steps}


def on_rank(context: ParallelContext, folder: Path) -> list[dict[str, Any]]:
    return [train(grid_context(dp, 1, tp), folder) for tp, dp in LAYOUTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad-steps")
    (folder / "config.toml").write_text(runs.CONFIG)
    runs.write_data(folder / "store")
    return folder


def test_one_rank_sees_it(folder: Path) -> None:
    first, second = spawn(2, on_rank, folder)
    for a, b in zip(first, second, strict=True):
        assert a["progress"] == b["progress"]
        assert (a["progress"].step, a["progress"].skipped_steps) == (8, 1)
        assert a["steps"] == b["steps"] == 7, "the optimizer has not seen the bad step"
        assert all(torch.isfinite(w).all() for w in a["weights"].values())
    assert all(torch.equal(first[0]["weights"][n], w) for n, w in second[0]["weights"].items())
    for (tp, dp), name in zip(LAYOUTS, ("tp1", "tp2"), strict=True):
        assert name == f"tp{tp}"
        files = sorted((folder / name / "bad_batches").iterdir())
        assert [f.name for f in files] == [
            f"step-3-dp{d}-{j}.safetensors" for d in range(dp) for j in range(2)
        ]
        seen: list[int] = []
        for file in files:
            batch, content = load_bad_batch(file)
            assert f"is not finite on 1 of {dp} data-parallel rank(s)" in content["fault"]
            seen += batch[keys.STRUCTURE].tolist()
        assert len(seen) == len(set(seen)) > 2, "each its own structures"
    losses = [
        load_bad_batch(folder / f"tp1/bad_batches/step-3-dp{d}-0.safetensors")[1]["loss"] for d in (0, 1)
    ]
    assert losses[1] == "nan" != losses[0], "which tells the rank"
