"""Ranks part without threads that live on: see [Note: groups that end] in parallel/context.py."""

import atexit
import weakref
from pathlib import Path

import pytest
import torch

from megagnn.parallel import messages
from megagnn.parallel.context import ParallelContext
from tests.distributed import sharded
from tests.distributed.sharded import Case
from tests.distributed.spawn import spawn

TASKS = Path("/proc/self/task")
KEPT: list[ParallelContext] = []


def gloo_threads() -> list[str]:
    names = [path.read_text().strip() for path in TASKS.glob("*/comm")]
    return [name for name in names if "gloo" in name]


def train_and_keep(context: ParallelContext, folder: Path, stage: int) -> list[str]:
    """Holds the context to the end of the process, where it writes which of gloo's threads still run."""
    sharded.train(Case(2, 1, stage), context, num_steps=1)
    KEPT.append(context)
    atexit.register(lambda: (folder / str(context.rank)).write_text(" ".join(gloo_threads())))
    return gloo_threads()


@pytest.mark.skipif(not TASKS.exists(), reason="threads are named as Linux shows them")
@pytest.mark.parametrize("stage", [0, 3])
def test_no_thread_of_a_group_outlives_it(tmp_path: Path, stage: int) -> None:
    during = spawn(2, train_and_keep, tmp_path, stage)
    assert all(during)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["", ""]


def test_a_context_whose_ranks_have_parted() -> None:
    group = torch.nn.Identity()  # anything that ends
    context = ParallelContext(dp_size=2, groups={"dp": weakref.ref(group)})
    del group
    with pytest.raises(RuntimeError, match="'dp' is gone: the ranks have parted"):
        messages.all_reduce(torch.ones(1), context, "dp")
