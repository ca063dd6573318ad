"""A run over pipeline stages is the run of one process: validation, final weights, and what it saves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from megagnn.cli import main
from megagnn.config import RunConfig, load_config
from megagnn.optim.zero.optimizer import ShardedOptimizer
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.parameter import layout_of
from megagnn.pipeline_parallel import stage_costs
from megagnn.pipeline_parallel.pipeline import Pipeline, schedule_for
from megagnn.train.trainer import Trainer
from tests.distributed.pipeline import CONFIGURATIONS, micro_batches
from tests.distributed.spawn import spawn
from tests.distributed.whole import gather_whole
from tests.models.physics import STATISTICS
from tests.runs import CONFIG, write_data

pytestmark = pytest.mark.timeout(1200)

# Adam divides gradients by their own size, so that roundings of the small ones grow with every step.
TOLERANCE = 1e-8
NUM_STEPS = 6
SETTINGS = {
    "train.dtype": "float64",
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
    {"parallel.stage_costs": "measured"},
    {"parallel.schedule": "conservative-zb", "parallel.zero_stage": "2", "parallel.stages": "[1, 3]"},
    {"parallel.schedule": "interleaved", "parallel.zero_stage": "3"},
]


def configuration(
    context: ParallelContext,
    store: Path,
    out_dir: Path,
    number: int,
    num_steps: int,
    more: dict[str, str] | None = None,
) -> RunConfig:
    """Of a run."""
    out_dir.mkdir(parents=True, exist_ok=True)
    file = out_dir / f"config-{context.rank}.toml"
    file.write_text(CONFIG)
    given = {"data.paths": str(store), "out_dir": str(out_dir), **SETTINGS, **MODELS[number]}
    given["train.num_steps"] = str(num_steps)
    if context.pp_size > 1:
        given |= LAYOUTS[number]
        given |= {"parallel.pipeline": str(context.pp_size), "parallel.tensor": str(context.tp_size)}
    given |= more or {}
    return load_config(file, [part for key, value in given.items() for part in (f"--{key}", value)])


def train(
    context: ParallelContext, store: Path, out_dir: Path, number: int, num_steps: int = NUM_STEPS
) -> dict[str, Any]:
    """A run: whole final weights of this rank's part, and the lowest validation loss.

    With more steps than the other runs have it continues the one in its folder.
    """
    config = configuration(context, store, out_dir, number, num_steps)
    trainer = Trainer(config, context, resume=num_steps > NUM_STEPS)
    assert trainer.progress.step == (NUM_STEPS if num_steps > NUM_STEPS else 0)
    trainer.run()
    if isinstance(trainer.optimizer, ShardedOptimizer):
        for unit in trainer.optimizer.units:
            unit.gather()
    named = trainer.potential.named_parameters()
    weights: dict[str, Tensor] = {n: gather_whole(p, layout_of(p), context).clone() for n, p in named}
    return {"weights": weights, "best": trainer.progress.best_loss}


class StoppedError(Exception):
    """Ends a run in the middle."""


def resumed(context: ParallelContext, store: Path, folder: Path) -> bool:
    """Whether a run that was ended in the middle of an epoch and continued has the bits of one that was not,
    though the layers' costs have changed in between, and processes made its batches."""
    found = []
    given = {"train.num_steps": "4", "train.checkpoint_every": "1", "train.validate_every": "9"}
    given["data.max_atoms"] = "12"  # several steps to an epoch
    for name, processes in (("whole", "0"), ("parts", "1")):
        given["data.num_workers"] = processes
        config = configuration(context, store, folder / name, 0, NUM_STEPS, given)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage_costs, "measured_costs", lambda *_: [9.0, 1.0, 1.0, 1.0])
            trainer = Trainer(config, context)
        if name == "parts":
            original = trainer._step

            def step(*arguments: Any, trainer: Trainer = trainer, original: Any = original) -> bool:
                if trainer.progress.step == 3:
                    trainer.checkpoints.wait()
                    raise StoppedError
                return bool(original(*arguments))

            trainer._step = step  # type: ignore[method-assign]
            with pytest.raises(StoppedError):
                trainer.run()
            assert trainer.progress.step_in_epoch > 0
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(stage_costs, "measured_costs", lambda *_: [1.0, 1.0, 1.0, 9.0])
                trainer = Trainer(config, context, resume=True)
            assert trainer._stage_sizes() == [1, 3]
        trainer.run()
        found.append([p.detach().clone() for p in trainer.potential.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def on_rank(context: ParallelContext, store: Path, folder: Path, runs: list[int]) -> list[dict[str, Any]]:
    """The runs with these numbers, and last one that one process began."""
    found = [train(context, store, folder / f"{context.world_size}-{k}", k) for k in runs]
    return [*found, train(context, store, folder / "begun", 0, NUM_STEPS + 2)]


def check(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """A run of the ranks against one process."""
    weights: dict[str, Tensor] = {}
    for rank in ranks:
        assert rank["best"] == pytest.approx(alone["best"], rel=TOLERANCE)
        weights |= rank["weights"]
    assert weights.keys() == alone["weights"].keys()
    for name, whole in alone["weights"].items():
        assert (weights[name] - whole).abs().max() <= TOLERANCE * whole.abs().max(), name


def check_all(world_size: int, tp: int, runs: list[int], folder: Path) -> None:
    """Runs on both sides; then each side continues what the other has saved."""
    store, one = write_data(folder / "store"), ParallelContext()
    alone = {k: train(one, store, folder / f"1-{k}", k) for k in runs}
    shutil.copytree(folder / "1-0", folder / "begun", symlinks=True)
    more = train(one, store, folder / "1-0", 0, NUM_STEPS + 2)
    ranks = spawn(world_size, on_rank, store, folder, runs, pp=2, tp=tp)
    for place, number in enumerate(runs):
        check([rank[place] for rank in ranks], alone[number])
    check([rank[-1] for rank in ranks], more)
    check([train(one, store, folder / f"{world_size}-0", 0, NUM_STEPS + 2)], more)


def test_two_stages(tmp_path: Path) -> None:
    check_all(2, 1, list(range(len(MODELS))), tmp_path)
    expected, found = (evaluated(tmp_path / f"{n}-1/checkpoints/best", tmp_path / "store") for n in (1, 2))
    assert found.keys() == expected.keys()
    for source, metrics in expected.items():
        assert found[source] == pytest.approx(metrics, rel=1e-6), source
    events = EventAccumulator(str(tmp_path / "2-1" / "tensorboard"))
    events.Reload()
    assert [image.step for image in events.Images("pipeline")] == [NUM_STEPS]
    for word in ("planned", "measured"):
        assert 0 < events.Scalars(f"pipeline/bubble_{word}")[0].value < 1
    trace = json.loads((tmp_path / "2-1" / "timeline.json").read_text())["traceEvents"]
    names = [record["args"]["name"] for record in trace if record["ph"] == "M"]
    assert names == ["planned pp0", "planned pp1", "dp0-pp0-tp0", "dp0-pp1-tp0"]
    done = [[r["name"] for r in trace if r["ph"] == "X" and r["pid"] == number] for number in range(4)]
    assert done[0] == done[2]
    assert done[1] == done[3]
    assert min(r["ts"] for r in trace if r["ph"] == "X" and r["pid"] >= 2) == 0


def evaluated(best: Path, store: Path) -> dict[str, dict[str, float]]:
    """Errors by `megagnn evaluate`, on one process."""
    out = best.parent / "metrics.json"
    assert main(["evaluate", str(best), str(store), "--json", str(out), "--threads", "1"]) == 0
    sources: dict[str, dict[str, float]] = json.loads(out.read_text())["sources"]
    return sources


def test_resume_is_bit_for_bit(tmp_path: Path) -> None:
    assert spawn(2, resumed, write_data(tmp_path / "store"), tmp_path, pp=2) == [True, True]


def test_four_ranks(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Stages of tensor-parallel ranks."""
    if not request.config.getoption("full"):
        pytest.skip("only with --full: starts four ranks for one more run")
    check_all(4, 2, [0], tmp_path)


def test_create_graph_is_refused() -> None:
    config = CONFIGURATIONS["stress"].model_config("fused", "none")
    one = ParallelContext()
    schedule = schedule_for("two-pass", "conservative", 1, 1)
    pipeline = Pipeline(config, STATISTICS, schedule, one, precision=torch.float64)
    with pytest.raises(ValueError, match="create_graph has no meaning across pipeline stages"):
        pipeline.potential(micro_batches(one)[0], create_graph=True)
