"""Start and end of a run on one process or under torchrun."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from megagnn.parallel.context import ParallelContext
from megagnn.parallel.groups import grid_context


def default_threads(num_local_ranks: int) -> int:
    """CPU threads of a rank: the usable cores divided by the ranks of this machine, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // num_local_ranks)


def pick_device(name: str, local_rank: int, num_local_ranks: int = 1) -> torch.device:
    """`auto`, `cpu` or `cuda` to a device.

    Raises:
        ValueError: CUDA is asked for and absent, or there are more ranks on this machine than GPUs.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("train.device is 'cuda' but PyTorch sees no GPU here; use 'cpu' or 'auto'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if num_local_ranks > torch.cuda.device_count():
        raise ValueError(
            f"{num_local_ranks} ranks on this machine but {torch.cuda.device_count()} GPU(s): each rank "
            "needs its own; start fewer ranks, or set train.device = 'cpu'"
        )
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def parallel_context(device: str = "auto", threads: int | None = None) -> Iterator[ParallelContext]:
    """The context of this process: torchrun's environment decides the ranks; without it, one process.

    Leaves the process group behind a barrier: destroying it while a peer still sends can abort at exit. After
        an error there is no barrier, for the peers may never reach it.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local_rank, num_local = (
        int(os.environ.get("LOCAL_RANK", "0")),
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )
    torch.set_num_threads(
        threads or int(os.environ.get("OMP_NUM_THREADS", "0")) or default_threads(num_local)
    )
    chosen = pick_device(device, local_rank, num_local)
    if world_size == 1:
        yield ParallelContext(device=chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    if rank != 0:
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    dist.init_process_group(backend, timeout=timedelta(minutes=30))
    try:
        yield grid_context(world_size, 1, 1, chosen)
        dist.barrier()
    finally:
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()
