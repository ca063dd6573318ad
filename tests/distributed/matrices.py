"""Training with rules of matrices on any layout, pipelines among them, for the parity tests."""

from __future__ import annotations

import hashlib
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megagnn.models.potential import Potential
from megagnn.objective.gradient_methods import GRADIENT_METHODS
from megagnn.objective.loss import Loss, label_counts, step_counts
from megagnn.optim.config import OptimConfig
from megagnn.optim.optimizer import make_sharded_optimizer
from megagnn.optim.zero.optimizer import ShardedOptimizer
from megagnn.parallel.config import ParallelConfig
from megagnn.parallel.context import ParallelContext, grid_context
from megagnn.parallel.parameter import layout_of
from megagnn.pipeline_parallel.pipeline import Pipeline, schedule_for
from tests.distributed.pairwise import pairwise
from tests.distributed.parity import Configuration, batch_of
from tests.distributed.sharded import SHARES
from tests.distributed.whole import gather_whole
from tests.models.physics import STATISTICS, randomised

NUM_STEPS, NUM_MICRO_BATCHES = 20, 4
CONFIGURATIONS = {
    "conservative": Configuration({"stress": True, "num_layers": 2}, "huber"),
    "direct": Configuration({"forces": "direct", "num_layers": 2}, "huber"),
}
SCHEDULES = {"conservative": "conservative", "direct": "1f1b"}
LAYOUTS = tuple((dp, tp, pp) for dp, tp, pp in product((1, 2, 4), (1, 2), (1, 2)) if dp * tp * pp <= 4)
OPTIM = OptimConfig(learning_rate=2e-3, clip_norm=0.25, weight_decay=0.1)


class Cell(NamedTuple):
    """How a model is trained."""

    layout: tuple[int, int, int]
    """(dp, tp, pp)"""
    stage: int
    configuration: str
    rule: str = "muon"

    def __str__(self) -> str:
        dp, tp, pp = self.layout
        return f"{self.rule} dp{dp}-tp{tp}-pp{pp} stage {self.stage} {self.configuration}"

    @property
    def world_size(self) -> int:
        """Ranks of the layout."""
        dp, tp, pp = self.layout
        return dp * tp * pp


def cells(full: bool, rule: str = "muon") -> list[Cell]:
    """All, or a cover of all pairs of the axes' values; each in stages 1 to 3, whose bits are compared."""
    every = list(product(LAYOUTS, range(4), CONFIGURATIONS))
    chosen = dict.fromkeys(Cell(*cell, rule=rule) for cell in (every if full else pairwise(every)))
    for cell in [cell for cell in chosen if cell.stage == 3 and rule == "muon"]:
        chosen |= dict.fromkeys(cell._replace(stage=stage) for stage in (1, 2))
    return list(chosen)


def train(cell: Cell, context: ParallelContext, num_steps: int = NUM_STEPS) -> dict[str, Tensor]:
    """Whole parameters of this rank's stage, by name."""
    what = CONFIGURATIONS[cell.configuration]
    config = what.model_config("fused", "none")
    whole = randomised(config, context=context)
    pipeline, potential = None, whole
    if context.pp_size > 1:
        schedule = schedule_for(SCHEDULES[config.forces], config.forces, context.pp_size, NUM_MICRO_BATCHES)
        pipeline = Pipeline(config, STATISTICS, schedule, context, precision=torch.float64)
        potential = pipeline.potential
        named = dict(whole.model.named_parameters())
        with torch.no_grad():
            for name, parameter in potential.model.named_parameters():
                parameter.copy_(named[name])
    optimizer = optimizer_of(cell, potential, context)
    if cell.rule == "soap":
        num_steps = 1
        fill_state(optimizer)
    share, loss = SHARES[cell.layout[0]][context.dp_rank], Loss(what.loss_config())
    for _ in range(num_steps):
        optimizer.zero_grad()
        if pipeline is not None:
            batches = [batch_of(share[k::NUM_MICRO_BATCHES]) for k in range(NUM_MICRO_BATCHES)]
            pipeline.accumulate(batches, loss, step_counts(batches, context), optimizer.reducer)
        else:
            batch = batch_of(share)
            optimizer.reducer.start()
            GRADIENT_METHODS["one_backward"](potential, batch, loss, label_counts(batch, context))
            optimizer.reducer.finish()
        optimizer.clipped_step(optimizer.gradient_norm(context), OPTIM.clip_norm)
    for unit in optimizer.units:
        unit.gather()
    parameters = potential.model.named_parameters()
    return {name: gather_whole(p, layout_of(p), context).clone() for name, p in parameters}


def optimizer_of(cell: Cell, potential: Potential, context: ParallelContext) -> ShardedOptimizer:
    """The sharded optimizer of the cell's rule and stage."""
    parallel = ParallelConfig(zero_stage=cell.stage, bucket_megabytes=1000 / 2**20)
    config = OptimConfig(**{**vars(OPTIM), "rule": cell.rule})
    return make_sharded_optimizer(potential.model, config, parallel, context)


def fill_state(optimizer: ShardedOptimizer) -> None:
    """Gives SOAP's matrices a state that depends on their names alone, as after many steps."""
    pieces = optimizer.pieces()
    names = {p.name for p in pieces if p.kind == "left"}
    for piece in (p for p in pieces if p.name in names and p.kind != "model"):
        digest = hashlib.sha256(f"{piece.kind} {piece.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        shape = piece.layout.full_shape
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if piece.kind.endswith("_basis"):
            values = torch.linalg.qr(values)[0]
        elif piece.kind == "turned_exp_avg_sq":
            values = values.square() + 0.1
        elif piece.kind in ("left", "right"):
            values = values @ values.T
        assert (piece.begin, piece.end) == (0, values.numel())
        piece.values.copy_(values.reshape(-1))
    optimizer.num_steps = 9  # the step that follows finds the eigenvectors again


@cache
def one_process(configuration: str, rule: str = "muon") -> dict[str, Tensor]:
    """What every layout must give."""
    return train(Cell((1, 1, 1), 0, configuration, rule), ParallelContext())


def on_rank(context: ParallelContext, chosen: list[Cell]) -> list[dict[str, Any]]:
    """Of each cell what `train` gives."""
    found = []
    for cell in chosen:
        dp, tp, pp = cell.layout
        try:
            found.append(train(cell, grid_context(dp, pp, tp)))
        except Exception as error:
            raise RuntimeError(f"in {cell}") from error
    return found


def error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """max |w - w_ref| / max |w_ref|, over the parameters that this rank has."""
    errors = [(got[n] - expected[n]).abs().max() / expected[n].abs().max().clamp(min=1e-30) for n in got]
    return float(torch.stack(errors).nan_to_num(nan=torch.inf).max())
