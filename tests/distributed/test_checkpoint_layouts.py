"""A checkpoint written on any layout and ZeRO stage continues on any other, from the same numbers."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megagnn.checkpoint import boxes as checkpoint_boxes
from megagnn.checkpoint import writer as checkpoint_store
from megagnn.checkpoint.boxes import Box
from megagnn.checkpoint.folder import open_folder
from megagnn.checkpoint.progress import Progress
from megagnn.checkpoint.single_file import load_checkpoint
from megagnn.checkpoint.writer import CheckpointStore
from megagnn.config import RunConfig
from megagnn.models.potential import Potential
from megagnn.objective.gradient_methods import GRADIENT_METHODS
from megagnn.objective.loss import Loss, label_counts
from megagnn.optim.bucket_reducer import GradientReducer
from megagnn.optim.config import OptimConfig
from megagnn.optim.optimizer import (
    WeightAverage,
    make_optimizer,
)
from megagnn.optim.zero.optimizer import ShardedAverage
from megagnn.parallel.context import ParallelContext, grid_context
from megagnn.parallel.world import barrier, sum_over_dp
from tests.distributed.parity import CONFIGURATIONS, batch_of
from tests.distributed.sharded import OPTIMIZER, SHARES, Case, build, optimizer_of
from tests.distributed.spawn import spawn
from tests.models.physics import STATISTICS

MORE: dict[str, set[str]] = {"adamw": set(), "muon": {"momentum"}}
KINDS = ("model", "average", "exp_avg", "exp_avg_sq")


NUM_STEPS = 3
LOSS = 1e-10  # of the first step after loading
LATER = 1e-8  # of those that follow: Adam divides gradients by their own size, so that roundings grow


class Layout(NamedTuple):
    """Ranks and what they divide; no stage is the unsharded optimizer."""

    tp: int
    dp: int
    stage: int | None
    rule: str = "adamw"

    def __str__(self) -> str:
        return f"tp{self.tp}-dp{self.dp}-stage{self.stage}-{self.rule}"


ADAMW = [Layout(2, 2, None), Layout(2, 2, 1), Layout(2, 2, 3)]
MUON = [Layout(2, 2, 2, "muon")]
WRITERS = ADAMW + MUON
READERS = [Layout(4, 1, None), Layout(4, 1, 3), Layout(1, 4, None), Layout(1, 4, 2), Layout(2, 2, 3)]
ALONE = [Layout(1, 1, None), Layout(1, 1, 3)]
READERS_MUON = [Layout(4, 1, 3, "muon"), Layout(1, 4, 1, "muon")]
ALONE_MUON = [Layout(1, 1, 0, "muon")]
PAIRS_MUON = [(writer, reader) for writer in MUON for reader in READERS_MUON]
PAIRS = [(writer, reader) for writer in ADAMW for reader in READERS]
# without --full: stage 3 to most, the others to some
FEWER = [PAIRS[k] for k in (0, 2, 3, 9, 10, 11, 12)] + PAIRS_MUON
PAIRS += PAIRS_MUON


@dataclass
class Run:
    """A model in training."""

    potential: Potential
    optimizer: Any
    reducer: Any
    average: WeightAverage | ShardedAverage
    context: ParallelContext
    rule: str = "adamw"

    @classmethod
    def begin(cls, layout: Layout, context: ParallelContext, factor: float = 1.0) -> "Run":
        """With initial weights times a factor, so that a loaded run began elsewhere."""
        case = Case(layout.dp, layout.tp, layout.stage or 0, rule=layout.rule)
        potential = build(case, context)
        with torch.no_grad():
            for p in potential.parameters():
                p.mul_(factor)
        if layout.stage is not None:
            sharded = optimizer_of(potential, case, context)
            return cls(
                potential, sharded, sharded.reducer, ShardedAverage(sharded, 0.9), context, layout.rule
            )
        plain = make_optimizer(potential, OPTIMIZER)
        reducer = GradientReducer(potential.parameters(), context, 1000, plain.gradient_buffers())
        return cls(potential, plain, reducer, WeightAverage(potential.model, 0.9), context)

    def steps(self, num: int) -> list[float]:
        """The losses of so many steps, each before the step."""
        what = CONFIGURATIONS["stress"]
        batch, loss = batch_of(SHARES[self.context.dp_size][self.context.dp_rank]), Loss(what.loss_config())
        losses = []
        for _ in range(num):
            self.optimizer.zero_grad()
            counts = label_counts(batch, self.context)
            self.reducer.start()
            total, _ = GRADIENT_METHODS["one_backward"](self.potential, batch, loss, counts)
            self.reducer.finish()
            self.optimizer.clipped_step(self.optimizer.gradient_norm(self.context), OPTIMIZER.clip_norm)
            self.average.update()
            losses.append(sum_over_dp(total, self.context).item())
        return losses

    def save(self, folder: Path) -> None:
        """A checkpoint, and wait for it."""
        store = CheckpointStore(folder, self.context)
        progress = Progress(
            step=NUM_STEPS,
            optimizer_steps=self.optimizer.num_steps,
            average_updates=self.average.num_updates,
        )
        pieces = [*self.optimizer.pieces(self.potential.model), *self.average.pieces()]
        config = RunConfig(optim=OptimConfig(rule=self.rule))
        store.save(pieces, config, STATISTICS, progress)
        store.wait()

    def load(self, folder: Path) -> None:
        """The newest checkpoint."""
        found = CheckpointStore(folder, self.context).newest()
        assert found is not None
        found.load([*self.optimizer.pieces(self.potential.model), *self.average.pieces()])
        self.optimizer.pieces_loaded(found.progress.optimizer_steps)
        self.average.num_updates = found.progress.average_updates


def write_all(context: ParallelContext, folder: Path) -> dict[Layout, list[float]]:
    """Checkpoints of all writers, and how they went on."""
    found = {}
    for layout in WRITERS:
        run = Run.begin(layout, grid_context(layout.dp, 1, layout.tp))
        run.steps(NUM_STEPS)
        run.save(folder / str(layout))
        found[layout] = run.steps(2)
    return found


def read(folder: Path, writer: Layout, reader: Layout, context: ParallelContext) -> list[float]:
    """Losses of a run that continues; what it read, it also writes again."""
    run = Run.begin(reader, context, factor=1.5)
    run.load(folder / str(writer))
    run.save(folder / f"{writer}-{reader}")
    return run.steps(2)


def on_rank(
    context: ParallelContext, folder: Path, pairs: list[tuple[Layout, Layout]]
) -> tuple[Any, Any, list[Any]]:
    written = write_all(context, folder)
    contexts = {reader: grid_context(reader.dp, 1, reader.tp) for reader in READERS + READERS_MUON}
    going_on = {(writer, reader): read(folder, writer, reader, contexts[reader]) for writer, reader in pairs}
    return (
        written,
        going_on,
        [
            mistaken(contexts[READERS[0]], folder),
            damaged(context, folder),
            failing(context, folder),
        ],
    )


def mistaken(context: ParallelContext, folder: Path) -> list[float]:
    """Every tensor-parallel rank takes the slice of the first: what a test of shapes would not see."""
    original = checkpoint_boxes.slice_box
    checkpoint_boxes.slice_box = lambda layout: Box((0,) * len(layout.full_shape), original(layout).sizes)
    try:
        run = Run.begin(READERS[0], context, factor=1.5)
        run.load(folder / str(WRITERS[0]))
        return run.steps(1)
    finally:
        checkpoint_boxes.slice_box = original


def damaged(context: ParallelContext, folder: Path) -> str:
    """Which checkpoint a rank takes when the file of one rank of the newest is damaged."""
    run = Run.begin(WRITERS[0], grid_context(2, 1, 2))
    store = CheckpointStore(folder / "damaged", context)
    for step in (1, 2):
        pieces = [*run.optimizer.pieces(run.potential.model), *run.average.pieces()]
        store.save(pieces, RunConfig(), STATISTICS, Progress(step=step))
    store.wait()
    if context.is_main:
        path = folder / "damaged" / "step-00000002" / "rank-00002.safetensors"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    barrier(context)
    found = store.newest()
    return found.path.name if found else "none"


def failing(context: ParallelContext, folder: Path) -> list[str]:
    """What each rank is told when one cannot write, and when one leaves no word."""

    def full_disk(*_: object) -> None:
        raise OSError("No space left on device")

    run, told = Run.begin(WRITERS[0], grid_context(2, 1, 2)), []
    pieces = [*run.optimizer.pieces(run.potential.model), *run.average.pieces()]
    for rank, name, replaced in ((2, "save_parts", full_disk), (3, "_leave", lambda *_: None)):
        store = CheckpointStore(folder / "failing", run.context)
        original, waits = getattr(checkpoint_store, name), checkpoint_store.WAIT_SECONDS
        if context.rank == rank:
            setattr(checkpoint_store, name, replaced)
        checkpoint_store.WAIT_SECONDS = 300.0 if rank == 2 else 1.0
        store.save(pieces, RunConfig(), STATISTICS, Progress(step=rank))
        try:
            store.wait()
            told.append("nothing")
        except OSError as error:
            told.append(str(error))
        setattr(checkpoint_store, name, original)
        checkpoint_store.WAIT_SECONDS = waits
    return [*told, *(path.name for path in (folder / "failing").iterdir() if path.name[0] != ".")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def pairs(request: pytest.FixtureRequest) -> list[tuple[Layout, Layout]]:
    return PAIRS if request.config.getoption("--full") else FEWER


@pytest.fixture(scope="module")
def ranks(folder: Path, pairs: list[tuple[Layout, Layout]]) -> list[Any]:
    return spawn(4, on_rank, folder, pairs)


def check(going_on: list[float], expected: list[float], where: str) -> None:
    assert going_on[0] == pytest.approx(expected[0], rel=LOSS, abs=0), where
    assert going_on[1] == pytest.approx(expected[1], rel=LATER, abs=0), where


def test_other_layouts_go_on_from_the_same_loss(ranks: list[Any]) -> None:
    for written, going_on, _ in ranks:
        for (writer, reader), losses in going_on.items():
            check(losses, written[writer], f"{writer} read at {reader}")


@pytest.mark.parametrize(("writer", "reader"), [*product(ADAMW, ALONE), *product(MUON, ALONE_MUON)], ids=str)
def test_one_process_goes_on_from_the_same_loss(
    ranks: list[Any], folder: Path, writer: Layout, reader: Layout
) -> None:
    check(read(folder, writer, reader, ParallelContext()), ranks[0][0][writer], f"{writer} read alone")


def test_nothing_is_lost_on_the_way(
    ranks: list[Any], folder: Path, pairs: list[tuple[Layout, Layout]]
) -> None:
    """Weights, their average and moments, read and written again on each layout: every bit."""
    for writer, reader in pairs:
        first = load_checkpoint(folder / str(writer) / "last", optimizer=True)
        assert {name.split("/")[0] for name in first.tensors} == set(KINDS) | MORE[writer.rule]
        again = load_checkpoint(folder / f"{writer}-{reader}" / "last", optimizer=True)
        assert again.progress == first.progress
        assert again.tensors.keys() == first.tensors.keys()
        for name, tensor in first.tensors.items():
            assert torch.equal(again.tensors[name], tensor), f"{name} of {writer} through {reader}"


def test_every_rank_writes_its_share(ranks: list[Any], folder: Path) -> None:
    for writer in WRITERS:
        found = open_folder(folder / str(writer) / "last")
        sizes = []
        for entry in found.manifest.files.values():
            boxes = [checkpoint_boxes.parse_key(key) for key in entry.boxes]
            sizes.append(sum(box.numel for name, box in boxes if not name.startswith("random/")))
        whole = load_checkpoint(folder / str(writer) / "last", optimizer=True).tensors.values()
        assert sum(sizes) == sum(tensor.numel() for tensor in whole), "each number once"
        if writer.stage is None:  # else it is what the rank keeps
            assert max(sizes) - min(sizes) <= 2 * len(KINDS), f"{writer}: {sizes}"


def test_a_wrong_slice_shows(ranks: list[Any]) -> None:
    written, _, (losses, _, _) = ranks[0]
    assert abs(losses[0] / written[WRITERS[0]][0] - 1) > 1e-4


def test_all_ranks_take_the_same_when_one_file_is_damaged(ranks: list[Any]) -> None:
    assert [name for _, _, (_, name, _) in ranks] == ["step-00000001"] * 4


def test_all_ranks_hear_of_one_that_cannot_write(ranks: list[Any]) -> None:
    for _, _, (_, _, told) in ranks:
        assert told[0].endswith("step-00000002 was not written: dp1-pp0-tp0: No space left on device")
        assert "1 of the ranks have not written their files within 1 s, rank-00003 among them" in told[1]
        assert len(told) == 2, "no checkpoint appears"
