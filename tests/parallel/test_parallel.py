"""One process: collectives do nothing, and bad requests are refused."""

import pytest
import torch

from megagnn.launch.context import default_threads, named_device, pick_device
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.world import broadcast_object, sum_over_dp


def test_one_rank_leaves_values_alone() -> None:
    context = ParallelContext()
    assert torch.equal(sum_over_dp(torch.arange(3.0), context), torch.arange(3.0))
    assert broadcast_object({"a": 1}, context) == {"a": 1}


def test_strided_tensors_are_refused() -> None:
    """gloo would reduce such a view wrongly and overwrite what lies beside it."""
    with pytest.raises(ValueError, match=r"needs a contiguous tensor, got strides \(4,\)"):
        sum_over_dp(torch.zeros(4, 4)[:, 0], ParallelContext())


def test_context_prints_itself() -> None:
    assert str(ParallelContext(dp_size=4, dp_rank=3)) == "dp3-pp0-tp0"
    assert str(ParallelContext(pp_size=2, pp_rank=1, tp_size=2)) == "dp0-pp1-tp0"
    assert ParallelContext(dp_size=4).is_main
    assert not ParallelContext(dp_size=4, dp_rank=3).is_main


def test_device_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto", 0).type == "cpu"
    with pytest.raises(ValueError, match="the device is 'cuda' but PyTorch sees no GPU here; use 'cpu'"):
        pick_device("cuda", 0)
    with pytest.raises(ValueError, match="the device is 'cuda' but PyTorch sees no GPU here; use 'cpu'"):
        named_device("cuda:1")
    assert default_threads(10_000) == 1


@pytest.mark.parametrize("name", ["gpu", "cpu:0", "cuda:x", ""])
def test_devices_by_a_wrong_name(name: str) -> None:
    with pytest.raises(ValueError, match="must be 'auto', 'cpu', 'cuda' or 'cuda:NUMBER', got"):
        named_device(name)


def test_devices_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert named_device("cuda:1") == torch.device("cuda", 1)
    assert named_device("auto") == torch.device("cuda", 0)
    with pytest.raises(ValueError, match=r"'cuda:2' but there are 2 GPU\(s\) here"):
        named_device("cuda:2")
