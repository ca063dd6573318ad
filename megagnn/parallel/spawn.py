"""Run a function on several ranks on this machine over gloo, for tests and tools."""

import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megagnn.parallel.context import grid_context


def spawn(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    pp: int = 1,
    tp: int = 1,
    start_method: str = "spawn",
) -> list[Any]:
    """`function(context, *arguments)` on every rank; returns each rank's value.

    The ranks meet through a file, so that no two tests fight for a port, and take one thread each. Those that
    pp and tp leave are data-parallel. With the start method "fork" they need not import anything again, but
    the caller must not have started threads.

    Raises:
        RuntimeError: with the traceback of the first rank that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = (world_size, pp, tp, folder, function, arguments)
        mp.start_processes(_run, work, nprocs=world_size, join=True, start_method=start_method)
        results = [pickle.loads((Path(folder) / f"{rank}.pickle").read_bytes()) for rank in range(world_size)]
    for rank, (value, error) in enumerate(results):
        if error:
            raise RuntimeError(f"rank {rank} failed:\n{error}\n{value}")
    return [value for value, _ in results]


def _run(
    rank: int,
    world_size: int,
    pp: int,
    tp: int,
    folder: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, world_size=world_size, rank=rank)
    try:
        context = grid_context(world_size // (pp * tp), pp, tp)
        result: tuple[Any, str | None] = (function(context, *arguments), None)
        dist.barrier()
    except Exception as error:
        result = (repr(error), traceback.format_exc())
    (Path(folder) / f"{rank}.pickle").write_bytes(pickle.dumps(result))
    if result[1] is None:
        dist.destroy_process_group()
    else:  # threads that still wait for other ranks would abort the process, and hide the error
        os._exit(0)
