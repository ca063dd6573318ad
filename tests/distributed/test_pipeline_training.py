"""A run over pipeline stages is the run of one process: losses, validation, final weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from megagnn.config import load_config
from megagnn.optim.sharded import ShardedAdamW
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import gather_whole, layout_of
from megagnn.pipeline_parallel.pipeline import Pipeline, schedule_for
from megagnn.train.trainer import Trainer
from tests.distributed.pipeline import CONFIGURATIONS, micro_batches
from tests.distributed.spawn import spawn
from tests.models.physics import STATISTICS
from tests.runs import CONFIG, write_data

pytestmark = pytest.mark.timeout(1200)

# Adam divides gradients by their own size, so that roundings of the small ones grow with every step.
TOLERANCE = 1e-8
SETTINGS = {
    "train.dtype": "float64",
    "train.num_steps": "6",
    "train.validate_every": "3",
    "train.checkpoint_every": "100",
    "train.log_every": "1",
    "train.threads": "1",
    "optim.accumulate_steps": "4",
    "optim.warmup_steps": "1",
    "model.num_layers": "4",
}
DIRECT = {"model.forces": "direct", "model.stress": "false", "loss.stress_weight": "0"}
MODELS: list[dict[str, str]] = [{}, {}, DIRECT]
LAYOUTS: list[dict[str, str]] = [
    {},
    {"parallel.schedule": "conservative-zb", "parallel.zero_stage": "2"},
    {"parallel.schedule": "interleaved", "parallel.zero_stage": "3"},
]


def train(context: ParallelContext, store: Path, out_dir: Path, number: int) -> dict[str, Any]:
    """A run without checkpoints: whole final weights of this rank's part, and the lowest validation loss."""
    out_dir.mkdir(parents=True, exist_ok=True)
    file = out_dir / f"config-{context.rank}.toml"
    file.write_text(CONFIG)
    given = {"data.paths": str(store), "out_dir": str(out_dir), **SETTINGS, **MODELS[number]}
    if context.pp_size > 1:
        given |= LAYOUTS[number]
        given |= {"parallel.pipeline": str(context.pp_size), "parallel.tensor": str(context.tp_size)}
    overrides = [part for key, value in given.items() for part in (f"--{key}", value)]
    trainer = Trainer(load_config(file, overrides), context)
    trainer._save = lambda *_: None  # type: ignore[method-assign]
    trainer.run()
    if isinstance(trainer.optimizer, ShardedAdamW):
        for unit in trainer.optimizer.units:
            unit.gather()
    named = trainer.potential.named_parameters()
    weights: dict[str, Tensor] = {n: gather_whole(p, layout_of(p), context).clone() for n, p in named}
    return {"weights": weights, "best": trainer.progress.best_loss}


def on_rank(context: ParallelContext, store: Path, folder: Path, runs: list[int]) -> list[dict[str, Any]]:
    """The runs with these numbers."""
    return [train(context, store, folder / f"{context.world_size}-{k}", k) for k in runs]


def check(ranks: list[list[dict[str, Any]]], runs: list[int], store: Path, folder: Path) -> None:
    """Each run of the ranks against one process."""
    for place, number in enumerate(runs):
        alone = train(ParallelContext(), store, folder / f"1-{number}", number)
        weights: dict[str, Tensor] = {}
        for rank in ranks:
            assert rank[place]["best"] == pytest.approx(alone["best"], rel=TOLERANCE)
            weights |= rank[place]["weights"]
        assert weights.keys() == alone["weights"].keys()
        for name, whole in alone["weights"].items():
            assert (weights[name] - whole).abs().max() <= TOLERANCE * whole.abs().max(), name


def test_two_stages(tmp_path: Path) -> None:
    store, runs = write_data(tmp_path / "store"), list(range(len(MODELS)))
    check(spawn(2, on_rank, store, tmp_path, runs, pp=2), runs, store, tmp_path)
    events = EventAccumulator(str(tmp_path / "2-0" / "tensorboard"))
    events.Reload()
    assert "pipeline" in events.Tags()["images"]


def test_four_ranks(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Stages of tensor-parallel ranks."""
    if not request.config.getoption("full"):
        pytest.skip("only with --full: starts four ranks for one more run")
    store = write_data(tmp_path / "store")
    check(spawn(4, on_rank, store, tmp_path, [0], pp=2, tp=2), [0], store, tmp_path)


def test_create_graph_is_refused() -> None:
    config = CONFIGURATIONS["stress"].model_config("fused", "none")
    one = ParallelContext()
    schedule = schedule_for("two-pass", "conservative", 1, 1)
    pipeline = Pipeline(config, STATISTICS, schedule, one, precision=torch.float64)
    with pytest.raises(ValueError, match="create_graph has no meaning across pipeline stages"):
        pipeline.potential(micro_batches(one)[0], create_graph=True)
