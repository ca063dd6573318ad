"""The sharded optimizer in one process: layouts, deferred weights, buffers in files, errors."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from megagnn.config import config_from_dict
from megagnn.models.potential import build_potential
from megagnn.optim.config import OptimConfig
from megagnn.optim.optimizer import WeightAverage, make_optimizer, make_sharded_optimizer, parameter_groups
from megagnn.optim.rules import rule_of
from megagnn.optim.zero.offload import DiskStorage, MemoryStorage, Storage
from megagnn.optim.zero.optimizer import ShardedAverage, ShardedOptimizer
from megagnn.optim.zero.unit import Unit
from megagnn.parallel.context import ParallelContext
from tests.models.physics import STATISTICS, model_config
from tests.tolerances import PARITY, assert_close

CONTEXT = ParallelContext()
CONFIG = OptimConfig(weight_decay=0.1)


class Chain(nn.Module):
    """Linear layers as modules of their own."""

    def __init__(self, width: int = 6, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x

    def blocks(self) -> list[tuple[str, nn.Module]]:
        return [(f"layers.{k}", layer) for k, layer in enumerate(self.layers)]


def make(model: Chain, stage: int, **settings: Any) -> ShardedOptimizer:
    groups = parameter_groups(model, CONFIG)
    return ShardedOptimizer(model.blocks(), groups, CONTEXT, stage, lr=1e-2, betas=CONFIG.betas, **settings)


def steps(model: Chain, optimizer: Any, number: int, average: Any = None) -> None:
    x = torch.linspace(-1, 1, 12, dtype=model.layers[0].weight.dtype).view(2, 6)  # type: ignore[union-attr]
    for _ in range(number):
        optimizer.zero_grad()
        if isinstance(optimizer, ShardedOptimizer):
            optimizer.reducer.start()
        (model(x) - x.roll(1, 1)).square().sum().backward()
        if isinstance(optimizer, ShardedOptimizer):
            optimizer.reducer.finish()
        optimizer.step()
        if average is not None:
            average.update()


def whole(model: Chain, optimizer: ShardedOptimizer) -> list[Tensor]:
    for unit in optimizer.units:
        unit.gather()
    return [p.detach().clone() for p in model.parameters()]


def plain(number: int) -> tuple[list[Tensor], Chain, WeightAverage]:
    model = Chain()
    optimizer = make_optimizer(model, OptimConfig(learning_rate=1e-2, weight_decay=0.1))
    average = WeightAverage(model, 0.9)
    steps(model, optimizer, number, average)
    return [p.detach().clone() for p in model.parameters()], model, average


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_equals_plain_adamw_bit_for_bit(stage: int) -> None:
    model = Chain()
    optimizer = make(model, stage)
    steps(model, optimizer, 5)
    for got, want in zip(whole(model, optimizer), plain(5)[0], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_average(stage: int) -> None:
    """Within the context the model holds the average, and afterwards its own weights, bit for bit."""
    model = Chain()
    optimizer = make(model, stage)
    average = ShardedAverage(optimizer, 0.9)
    steps(model, optimizer, 5, average)
    own = whole(model, optimizer)
    with average.applied():
        applied = whole(model, optimizer)
    want = plain(5)[2].average.values()
    for got, expected in zip(applied, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-15)
    for got, expected in zip(whole(model, optimizer), own, strict=True):
        assert torch.equal(got, expected)


def test_stage_3_holds_nothing_between_steps() -> None:
    model = Chain()
    optimizer = make(model, 3)
    assert all(p.untyped_storage().nbytes() == 0 for p in model.parameters())
    steps(model, optimizer, 2)
    assert all(p.untyped_storage().nbytes() == 0 for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_step_of_stage_3_gathers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Chain()
    optimizer = make(model, 3)
    steps(model, optimizer, 1)
    monkeypatch.setattr(Unit, "start_gather", lambda self: pytest.fail("parameters were gathered"))
    optimizer.step()


def test_stage_3_holds_two_modules_at_most() -> None:
    model = Chain()
    optimizer = make(model, 3)
    most = 0

    def count(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(unit.full.untyped_storage().nbytes() > 0 for unit in optimizer.units))

    for layer in model.layers:
        layer.register_forward_hook(count, prepend=True)
        layer.register_full_backward_hook(count)
    steps(model, optimizer, 1)
    assert most == 2  # the one at work and the next


def test_files_give_the_same_bits(tmp_path: Path) -> None:
    model = Chain()
    optimizer = make(model, 3, storage=DiskStorage(tmp_path / "state"))
    steps(model, optimizer, 5)
    for got, want in zip(whole(model, optimizer), plain(5)[0], strict=True):
        assert torch.equal(got, want)
    assert not list((tmp_path / "state").iterdir())  # without names: gone with the process


def with_matrices(rule: str, storage: Storage | None, stage: int, number: int = 5) -> list[Tensor]:
    """What some steps of a rule of matrices give."""
    model = Chain()
    for layer in model.layers:
        layer.weight.matrix_rate = 1.0  # type: ignore[union-attr]
    groups = parameter_groups(model, OptimConfig(rule=rule, weight_decay=0.1, refresh_every=2))
    settings: dict[str, Any] = {"lr": 1e-2, "storage": storage, "rule": rule_of(rule)}
    optimizer = ShardedOptimizer(model.blocks(), groups, CONTEXT, stage, **settings)
    kept = {(p.name, p.kind) for p in optimizer.pieces()}
    assert ("layers.1.weight", {"muon": "momentum", "soap": "left_basis"}[rule]) in kept
    steps(model, optimizer, number)
    return whole(model, optimizer)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("rule", ["muon", "soap"])
def test_state_of_matrices_elsewhere_gives_the_same(tmp_path: Path, rule: str, stage: int) -> None:
    """On the host and in files, where units are updated one by one."""
    want = with_matrices(rule, None, stage)
    for storage in (MemoryStorage(host=True), DiskStorage(tmp_path)):
        for got, expected in zip(with_matrices(rule, storage, stage), want, strict=True):
            assert_close(got, expected, PARITY)
    earlier = with_matrices(rule, None, stage, 4)
    assert max((a - b).abs().max().item() for a, b in zip(earlier, want, strict=True)) > 1e-3


def test_shards_in_files_leave_the_process_during_a_step(tmp_path: Path) -> None:
    """In stage 3 parameters and gradients go when their module is done, before the optimizer's step."""

    released: set[int] = set()

    class Counting(DiskStorage):
        def release(self, buffers: Iterable[Tensor]) -> None:
            buffers = list(buffers)
            released.update(b.data_ptr() for b in buffers)
            super().release(buffers)

    model, storage = Chain(), Counting(tmp_path)
    optimizer = make(model, 3, storage=storage)
    released.clear()
    optimizer.zero_grad()
    optimizer.reducer.start()
    model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    optimizer.reducer.finish()
    for unit in optimizer.units:
        assert {unit.param_shard.data_ptr(), unit.grad_shard.data_ptr()} <= released
        assert unit.state["exp_avg"].data_ptr() not in released


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_a_step_goes_through_files_unit_by_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """A unit's pages are released before the next one is updated, with matrices or without."""
    events: list[str] = []

    class Telling(DiskStorage):
        def release(self, buffers: Iterable[Tensor]) -> None:
            owners = {u.name for b in buffers for u in optimizer.units if b is u.weight_shard}
            events.extend(f"release {name}" for name in owners)

    model = Chain()
    for layer in model.layers:
        layer.weight.matrix_rate = 1.0  # type: ignore[union-attr]
    groups = parameter_groups(model, OptimConfig(rule=rule))
    storage = Telling(tmp_path)
    optimizer = ShardedOptimizer(model.blocks(), groups, CONTEXT, 3, storage=storage, rule=rule_of(rule))
    original = Unit.update_elements

    def update(self: Unit, *arguments: Any) -> None:
        events.append(f"update {self.name}")
        original(self, *arguments)

    monkeypatch.setattr(Unit, "update_elements", update)
    steps(model, optimizer, 1)
    begin = events.index("update layers.0")
    assert events[begin:] == [f"{what} layers.{k}" for k in range(3) for what in ("update", "release")]


def test_released_pages_are_not_resident(tmp_path: Path) -> None:
    storage, process = DiskStorage(tmp_path), psutil.Process()
    buffer = storage.zeros("moments", 2**24, torch.float32, torch.device("cpu"))
    before = process.memory_info().rss
    buffer.fill_(3.0)
    assert process.memory_info().rss - before > 60e6
    storage.release([buffer])
    assert process.memory_info().rss - before < 10e6
    assert buffer.sum() == 3.0 * 2**24


def test_deferred_weights_are_those_of_the_seed() -> None:
    config = model_config(width=8, num_radial=4)
    want = build_potential(config, STATISTICS, seed=5)
    got = build_potential(config, STATISTICS, deferred=True)
    assert all(p.untyped_storage().nbytes() == 0 for p in got.parameters())
    make_sharded_optimizer(got.model, CONFIG, config_from_dict({}).parallel, CONTEXT, seed=5)
    for a, b in zip(got.parameters(), want.parameters(), strict=True):
        assert torch.equal(a, b)


def test_small_updates_of_bfloat16_are_not_lost() -> None:
    """float32 gradients and master copies; without them a step of 1e-4 of a weight moves nothing."""
    model = Chain(dtype=torch.bfloat16)
    optimizer = make(model, 2)
    unit = optimizer.units[0]
    assert unit.grad_shard.dtype == torch.float32
    assert unit.master is not None
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-5
    before, rounded = unit.master.clone(), unit.param_shard.clone()
    steps(model, optimizer, 1)
    moved = (unit.master - before).abs()
    real = unit.grad_shard != 0
    assert (moved[real] > 0).all()
    assert torch.equal(unit.param_shard, unit.master.bfloat16())
    assert (unit.param_shard == rounded)[real].float().mean() > 0.9  # what would be lost
    steps(model, optimizer, 400)
    assert (unit.param_shard == rounded)[real].float().mean() < 0.3


def test_micro_batches_of_bfloat16_are_added_in_float32() -> None:
    model = Chain(dtype=torch.bfloat16)
    optimizer = make(model, 1)
    unit = optimizer.units[0]
    for value in (256.0, *[0.5] * 8):
        model.layers[0].weight.grad = torch.full((6, 6), value, dtype=torch.bfloat16)  # type: ignore[union-attr]
        unit.take_gradient(0)
    assert unit.grad is not None
    assert unit.grad[0] == 260.0  # in bfloat16 every 0.5 would vanish beside 256
    assert torch.tensor(256.0, dtype=torch.bfloat16) + torch.tensor(0.5, dtype=torch.bfloat16) == 256.0


def test_pieces_are_all_there_is() -> None:
    model = Chain()
    optimizer = make(model, 3)
    pieces = {(p.name, p.kind): p for p in optimizer.pieces()}
    assert {kind for _, kind in pieces} == {"model", "exp_avg", "exp_avg_sq"}
    for name, parameter in model.named_parameters():
        piece = pieces[name, "model"]
        assert (piece.begin, piece.end) == (0, parameter.numel())
    pieces["layers.1.bias", "model"].values.fill_(2.5)
    optimizer.take_weights()
    assert (whole(model, optimizer)[3] == 2.5).all()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_is_freed_with_its_model(stage: int) -> None:
    model = Chain()
    optimizer = make(model, stage)
    steps(model, optimizer, 1)
    moments = weakref.ref(optimizer.units[0].state["exp_avg"])
    del model, optimizer
    gc.collect()
    assert moments() is None


def test_unknown_stage() -> None:
    with pytest.raises(ValueError, match="stage must be 0, 1, 2 or 3, got 4"):
        make(Chain(), 4)


def test_parameter_outside_of_the_modules() -> None:
    model = Chain()
    with pytest.raises(ValueError, match=r"2 parameter\(s\) of the groups are in none of the modules"):
        ShardedOptimizer(model.blocks()[:2], parameter_groups(model, CONFIG), CONTEXT, 1)


def test_parameter_in_two_modules() -> None:
    model = Chain()
    twice = [*model.blocks(), ("again", model.layers[0])]
    with pytest.raises(ValueError, match=r"again\.weight is in two modules"):
        ShardedOptimizer(twice, parameter_groups(model, CONFIG), CONTEXT, 1)


def test_two_types_in_a_module() -> None:
    model = Chain()
    model.layers[0].weight = nn.Parameter(model.layers[0].weight.detach().float())  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"the parameters of layers\.0 must be of one type"):
        make(model, 1)


def test_closure_and_state_dict() -> None:
    optimizer = make(Chain(), 1)
    with pytest.raises(ValueError, match="closures are not supported"):
        optimizer.step(lambda: None)
    with pytest.raises(NotImplementedError, match=r"pieces\(\)"):
        optimizer.state_dict()
    with pytest.raises(NotImplementedError, match=r"pieces\(\)"):
        optimizer.load_state_dict({})


def test_start_twice() -> None:
    optimizer = make(Chain(), 2)
    optimizer.reducer.start()
    with pytest.raises(RuntimeError, match=r"call finish\(\) between them"):
        optimizer.reducer.start()


@pytest.mark.parametrize("stage", [0, 1])
def test_second_backward_between_start_and_finish(stage: int) -> None:
    model = Chain()
    optimizer = make(model, stage)
    optimizer.zero_grad()
    optimizer.reducer.start()
    x = torch.ones(2, 6, dtype=torch.float64)
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="arrived after the unit had left"):
        model(x).sum().backward()


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"offload_dir .*file/state cannot be written"):
        DiskStorage(tmp_path / "file" / "state")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parallel": {"zero_stage": 1}, "optim": {"implementation": "torch"}}, "cannot be sharded"),
        ({"optim": {"offload": "host", "implementation": "torch"}}, "cannot be sharded or offloaded"),
        ({"optim": {"offload": "disk"}}, "needs a folder"),
        ({"optim": {"offload_dir": "here"}}, "needs a folder"),
        ({"parallel": {"zero_stage": 4}}, "zero_stage"),
        (
            {"parallel": {"zero_stage": 3}, "train": {"gradient_method": "create_graph"}},
            "needs train.gradient_method = 'one_backward'",
        ),
    ],
)
def test_settings_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict(values)
