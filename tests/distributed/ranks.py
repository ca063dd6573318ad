"""Ranks as plain processes of a test, with an environment that a launcher would have made."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

TIMEOUT_S = 300  # of a start that takes seconds, on a machine that others use, too


def free_port() -> int:
    """One that nobody has at the moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def clean_environment(**more: str) -> dict[str, str]:
    """Ours without what a launcher of the tests themselves may have set; one thread for each rank."""
    launcher = re.compile(r"(OMPI|PMI|PMIX|MPI|SLURM|TORCHELASTIC)_|(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_\w+)$")
    kept = {name: value for name, value in os.environ.items() if not launcher.match(name)}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def torchrun_like(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank, with the store held by rank 0."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {**address, "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}


@dataclass
class Ended:
    """What a rank left behind."""

    code: int
    out: str
    err: str
    at: float
    """Time of its end, in seconds since the epoch."""
    pid: int = field(default=0)


def run_ranks(
    arguments: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]], expected_to_stay: int = -1
) -> list[Ended]:
    """`python -m ...` of each rank's arguments and environment; waits for all but the one that is expected to
    stay (it is stopped), which is then killed."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", *given],
            env=clean_environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for given, environment in zip(arguments, environments, strict=True)
    ]
    ends: dict[int, float] = {}
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while len(ends) < len(processes) - (expected_to_stay >= 0):
            assert time.monotonic() < deadline, f"ranks {sorted(ends)} of {len(processes)} ended in time"
            for rank, process in enumerate(processes):
                if rank not in ends and process.poll() is not None:
                    ends[rank] = time.time()
            time.sleep(0.01)
    finally:
        for rank, process in enumerate(processes):
            if rank not in ends:
                process.send_signal(signal.SIGKILL)
    results = []
    for rank, process in enumerate(processes):
        out, err = process.communicate()
        results.append(Ended(process.returncode, out, err, ends.get(rank, time.time()), process.pid))
    return results
