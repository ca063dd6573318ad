"""Which device a rank takes, and that no two take one GPU."""

import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megagnn.launch.context import claim_gpu, device_name, pick_device


def gpus(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """A process that sees these."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(names))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"model of {names[device.index]}")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=names[device.index])
    )


def start(monkeypatch: pytest.MonkeyPatch, seen: list[list[str]], local: list[tuple[int, int]]) -> list[str]:
    """The devices of ranks that see these GPUs, and are told these numbers on the machine."""
    store, found = dist.HashStore(), []
    for rank, (names, numbers) in enumerate(zip(seen, local, strict=True)):
        gpus(monkeypatch, *names)
        device = pick_device("auto", *numbers)
        claim_gpu(store, device, rank)
        found.append(names[device.index])
    return found


def test_every_rank_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    all_seen = ["a", "b", "c"]
    assert start(monkeypatch, [all_seen] * 3, [(0, 3), (1, 3), (2, 3)]) == ["a", "b", "c"]
    # --gpus-per-task=1, --gpu-bind=single:1, and mpirun with one visible device each
    assert start(monkeypatch, [["a"], ["b"], ["c"]], [(0, 3), (1, 3), (2, 3)]) == ["a", "b", "c"]
    # two GPUs for each of three ranks
    assert start(monkeypatch, [["a", "b"], ["c", "d"], ["e", "f"]], [(0, 3), (1, 3), (2, 3)]) == [
        "a",
        "c",
        "e",
    ]
    # --gpus-per-task=2 for two ranks
    assert start(monkeypatch, [["a", "b"], ["c", "d"]], [(0, 2), (1, 2)]) == ["a", "d"]


@pytest.mark.parametrize("local", [[(0, 2), (1, 2)], [(0, 1), (0, 1)]])
def test_two_ranks_on_one_gpu(local: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """More ranks than GPUs, or RANK without LOCAL_RANK."""
    seen = ["a"] if local[1][0] else ["a", "b"]
    with pytest.raises(ValueError, match=r"ranks 0 and 1 would share one GPU \(cuda:0 of .*LOCAL_RANK"):
        start(monkeypatch, [seen, seen], local)


def test_gpus_of_two_machines_may_have_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    gpus(monkeypatch, "a")
    for rank in range(2):
        monkeypatch.setattr(socket, "gethostname", lambda rank=rank: f"node{rank}")
        claim_gpu(store, torch.device("cuda", 0), rank)


def test_the_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch)
    assert device_name(torch.device("cpu")) == "the CPU"
    gpus(monkeypatch, "a", "b")
    assert device_name(torch.device("cuda", 1)) == "cuda:1 (model of b)"
    assert device_name(torch.device("cpu")) == "the CPU (train.device = 'cpu'; there is a GPU)"
