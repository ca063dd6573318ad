"""Program of the tests of faults: ranks that sum a number over and over, one of which comes to grief.

python -m tests.distributed.faulty RANK FAULT INTERVAL STALE GRACE [CONFIG.json]
"""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from megagnn.cli import rank_label
from megagnn.config import config_from_dict, flat_config
from megagnn.launch.context import parallel_context
from megagnn.launch.heartbeat import WatchTimes
from megagnn.parallel.context import ParallelContext
from megagnn.parallel.world import sum_over_dp


def come_to_grief(fault: str, stale: float) -> None:
    """What happens to the rank in the middle of its work."""
    print(f"grief {time.time()}", flush=True)
    if fault == "raise":
        raise ValueError("bad label in structure 7\nsecond line")
    if fault == "exit":
        os._exit(9)
    if fault == "lock":  # holds Python's lock, so that no thread of this process runs
        ctypes.PyDLL(None).usleep(int(1e6 * (stale + 3)))
    else:
        os.kill(os.getpid(), getattr(signal, fault.removesuffix("-compute")))
        time.sleep(5)  # SIGTERM comes to a thread of its own


def work(context: ParallelContext, rank: int, fault: str, stale: float) -> None:
    """Ten sums; the fault comes after three."""
    for step in range(10):
        total = sum_over_dp(torch.ones(3), context)
        assert total.tolist() == [context.dp_size] * 3
        if step == 3 and fault == "lock-all":
            ctypes.PyDLL(None).usleep(int(1e6 * (stale + 3)))
        if step == 3 and context.rank == rank and fault != "lock-all":
            come_to_grief(fault, stale)
        if step == 3 and fault == "SIGKILL-compute" and context.rank != rank:
            time.sleep(60)  # no collective whose failure would wake the main thread


def main(rank: str, fault: str, interval: str, stale: str, grace: str, config: str = "") -> int:
    """The rank's exit code."""
    times = WatchTimes(interval=float(interval), stale=float(stale), grace=float(grace))
    run = config_from_dict(json.loads(Path(config).read_text()) if config else {})
    try:
        with parallel_context("cpu", 1, run.parallel, flat_config(run), times) as context:
            print(f"rank {context.rank} is {context}, pid {os.getpid()}, {context.grid}", flush=True)
            work(context, int(rank), fault, float(stale))
    except (ValueError, OSError) as error:
        print(f"error{rank_label(os.environ)}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 2
    print("done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
