"""The work of the whole-step benchmark: its batches, its arithmetic, and that it refuses wrong steps."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from megagnn.data import keys
from megagnn.models.egnn.edge.runner import Call, SerialRunner
from megagnn.ops import extension
from tools.bench.memory.step import peak_memory
from tools.bench.peers.model import PeerEGNN
from tools.bench.work import edge as workload
from tools.bench.work import layer as layer_workload

UNFUSED, METHODS = ("unfused", "unfused layers"), ("one_backward", "create_graph")
BATCH, CUTOFF = workload.dense_batch(2000)
NUM_ATOMS, NUM_EDGES = len(BATCH[keys.POSITIONS]), BATCH[keys.EDGE_INDEX].shape[1]
PEERS = [name for name, layer in workload.peer_layers().items() if layer]


class CountProducts(TorchDispatchMode):
    """Adds up the matrix products that run below autograd, by torch's own formulas."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


class CountCalls:
    """Units of the fused operation's products, by what each pass of `edge_runner` is asked for.

    A pair has twice the rows of values. A backward takes as many products as a forward for the inputs, as
    many for the weights where they are wanted, and as many once more where nothing was kept; those of the
    distance features, `radial`, once more in any case.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.units = self.radial = 0
        forward, backward = SerialRunner.forward, SerialRunner.backward

        def counted_forward(runner: SerialRunner, call: Call, save: bool) -> Any:
            self.units += 2 if call.pair else 1
            self.radial += 2 if call.pair else 1
            return forward(runner, call, save)

        def counted_backward(
            runner: SerialRunner, call: Call, kept: Any, bars: Any, wanted: Any, outputs: bool = False
        ) -> Any:
            self.units += (2 if call.pair else 1) * (1 + int(wanted[1]) + int(kept[0].numel() == 0))
            self.radial += (2 if call.pair else 1) * (2 + int(wanted[1]))
            return backward(runner, call, kept, bars, wanted, outputs)

        monkeypatch.setattr(SerialRunner, "forward", counted_forward)
        monkeypatch.setattr(SerialRunner, "backward", counted_backward)


def make_step(name: str, forces: str = "direct", width: int = 64) -> workload.TrainingStep:
    step = workload.make_step(name, BATCH, workload.model_config(width, forces, CUTOFF))
    assert step is not None
    return step


def test_batches_are_dense_and_as_large_as_asked() -> None:
    for asked in (2000, 12_000):
        batch, cutoff = workload.dense_batch(asked)
        num_edges = batch[keys.EDGE_INDEX].shape[1]
        assert abs(num_edges - asked) <= 0.02 * asked
        assert len(batch[keys.POSITIONS]) == round(asked / workload.NEIGHBOURS)
        assert 4 < cutoff < 6
        assert batch[keys.ROW_PTR].diff().min() > 5
        assert batch[keys.HAS_FORCES].all()


@pytest.mark.parametrize("forces", ["direct", "conservative"])
@pytest.mark.parametrize(
    "name", [*(workload.our_name(*which) for which in product(UNFUSED, METHODS)), *PEERS]
)
def test_arithmetic_is_what_runs(name: str, forces: str) -> None:
    """Against torch's own count of the products; embedding-side gradients nobody needs are the difference."""
    step = make_step(name, forces)
    with CountProducts() as counter:
        step()
    counted = counter.flops
    stated = workload.step_flops(name, forces, 64, NUM_ATOMS, NUM_EDGES)
    assert stated == pytest.approx(counted, rel=0.05)


@pytest.mark.skipif(not extension.has_cpu, reason="counts calls of the compiled operations")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("memory", [memory for memory in workload.MEMORY if memory not in UNFUSED])
def test_units_are_those_of_the_compiled_calls(
    memory: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every layer; also for direct forces and for none, where the method does not matter."""
    calls = CountCalls(monkeypatch)
    for forces in ("conservative", "direct", "none"):
        calls.units = calls.radial = 0
        name = workload.our_name(memory, method)
        make_step(name, forces)()
        table = method if forces == "conservative" else "direct"
        assert calls.units == workload.DEPTH * workload.UNITS[table][memory]
        again = workload.radial_again(name, forces, width=1, num_edges=1)
        assert calls.radial == calls.units + again / (2 * workload.NUM_RADIAL)


def test_one_backward_takes_eight_units_and_eleven_again() -> None:
    assert [workload.UNITS["one_backward"][memory] for memory in ("save", "recompute", "layers", "both")] == [
        8,
        11,
        11,
        11,
    ]


def test_arithmetic_of_the_two_formulations() -> None:
    """6[(4L-1) F^2 E + 3 L F^2 N] for concatenations, half of the leading term for the split Linear."""
    width, atoms, edges, depth = 512, 10_000, 300_000, workload.DEPTH
    usual = workload.step_flops("usual index_add", "conservative", width, atoms, edges) / 2
    ours = workload.step_flops("megagnn unfused create_graph", "conservative", width, atoms, edges) / 2
    square = width * width
    assert usual == pytest.approx(
        6 * ((4 * depth - 1) * square * edges + 3 * depth * square * atoms), rel=0.02
    )
    assert ours == pytest.approx(
        6 * ((2 * depth - 1) * square * edges + 5 * depth * square * atoms), rel=0.03
    )
    again = workload.step_flops("megagnn recompute", "direct", width, atoms, edges)
    kept = workload.step_flops("megagnn save", "direct", width, atoms, edges)
    assert again / kept == pytest.approx(4 / 3, rel=0.03)


@pytest.mark.parametrize("forces", ["direct", "conservative"])
def test_every_implementation_takes_the_same_step(forces: str) -> None:
    names = [*workload.our_variants(forces), *PEERS]
    steps = {name: make_step(name, forces, width=16) for name in names}
    assert workload.check_equal(steps) < 1e-3
    losses = [float(step()) for step in steps.values()]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)


def test_another_step_is_refused() -> None:
    """One weight in another place, or a step with other parameters, stops the benchmark."""
    one, other = make_step("megagnn unfused"), make_step("usual index_add")
    assert isinstance(other.model, PeerEGNN)
    with torch.no_grad():
        other.model.layers[1].edge_mlp[0].weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"usual index_add: .* must equal that of megagnn unfused to 0.0001"):
        workload.check_equal({"megagnn unfused": one, "usual index_add": other})
    with pytest.raises(ValueError, match="only one of them has"):
        workload.check_equal({"direct": one, "conservative": make_step("megagnn unfused", "conservative")})


@pytest.mark.parametrize("part", layer_workload.PARTS)
def test_layers_are_equal(part: str) -> None:
    config = workload.model_config(16, "conservative", CUTOFF)
    results = []
    for name in (*workload.our_variants(), *PEERS):
        layer = layer_workload.make_layer(name, BATCH, config)
        assert layer is not None
        results.append(layer.work(part)())
    for got in results[1:]:
        for one, want in zip(got, results[0], strict=True):
            assert (one - want).abs().max() <= 1e-4 * want.abs().max()


def test_memory_of_a_step() -> None:
    """More than the edge tensors that a concatenating step must keep for its backward, less than twenty."""
    memory = peak_memory("usual index_add", "direct", 2000, 64, threads=1)
    edge_tensor = 4 * NUM_EDGES * 64
    assert 7 * workload.DEPTH * edge_tensor < memory["peak_bytes"] < 20 * workload.DEPTH * edge_tensor
    assert memory["resident_bytes"] >= 0
    with pytest.raises(RuntimeError, match="the process ended with 1"):
        peak_memory("numpy", "direct", 2000, 64, threads=1)
