"""Start and end of a run: one process, or ranks that torchrun, mpirun or srun started."""

import contextlib
import dataclasses
import itertools
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megagnn.launch.agreement import agree, fingerprint_of, join_generation, open_store
from megagnn.launch.heartbeat import Roll, WatchTimes, this_peer
from megagnn.launch.rendezvous import Rendezvous, discover
from megagnn.launch.watch import Watcher
from megagnn.parallel.config import ParallelConfig
from megagnn.parallel.context import (
    ParallelContext,
    grid_context,
    grid_coordinates,
    grid_sizes,
    rank_name,
    usable_cores,
)


def join_mpi(world_size: int) -> Rendezvous:
    """Every rank's place, and a free port of the main rank's machine, through mpi4py.

    Args:
        world_size: ranks as the launcher's environment has it.

    Raises:
        ValueError: mpi4py is missing, finds no MPI library, or belongs to another MPI than the launcher.
    """
    way_out = "install it with pip install 'megagnn[mpi]' and an MPI library, or start with torchrun"
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ValueError(f"mpirun started {world_size} ranks, but mpi4py is missing: {way_out}") from error
    except RuntimeError as error:  # what mpi4py raises where it finds no library
        line = str(error).splitlines()[0]
        raise ValueError(
            f"mpirun started {world_size} ranks, but mpi4py does not load ({line}): {way_out}"
        ) from error
    world = MPI.COMM_WORLD
    if world.size != world_size:
        raise ValueError(
            f"mpirun started {world_size} ranks, but mpi4py sees {world.size}: it belongs to another MPI "
            "than this mpirun; use the mpirun that came with mpi4py's MPI, or start with torchrun"
        )
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    listener, address = None, None
    if world.rank == 0:
        with socket.create_server(("", 0), backlog=2048) as server:
            listener, port = os.dup(server.fileno()), server.getsockname()[1]
        name = "127.0.0.1" if local.size == world.size else socket.gethostname()
        address = (os.environ.get("MASTER_ADDR") or name, port)
    host, port = world.bcast(address, root=0)
    return Rendezvous(
        "MPI",
        world.rank,
        world.size,
        local_rank=local.rank,
        num_local=local.size,
        host=host,
        port=port,
        serves=world.rank == 0,
        listener=listener,
    )


# torchrun's store keeps what the ranks of a process's earlier context said: each context has its own keys
_MEETINGS = itertools.count()


def default_threads(num_local_ranks: int) -> int:
    """CPU threads of a rank: the usable cores divided by the ranks of this machine, at least one."""
    return max(1, usable_cores() // num_local_ranks)


def pick_device(name: str, local_rank: int = 0, num_local_ranks: int = 1) -> torch.device:
    """`auto`, `cpu` or `cuda` to a device: the GPU of a rank's number, or the first where it sees fewer GPUs
    than its machine has ranks, as launchers that bind GPUs to ranks show each its own.

    Raises:
        ValueError: CUDA is asked for and absent.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("the device is 'cuda' but PyTorch sees no GPU here; use 'cpu' or 'auto'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank if num_local_ranks <= torch.cuda.device_count() else 0)


def claim_gpu(store: dist.Store, device: torch.device, rank: int) -> None:
    """Enter a rank's GPU into the store of all ranks.

    Raises:
        ValueError: another rank has it.
    """
    found = f"{socket.gethostname()}/{torch.cuda.get_device_properties(device).uuid}"
    number = store.add(f"gpu/{found}", 1)
    if number == 1:
        store.set(f"gpu/{found}/rank", str(rank))
        return
    other = store.get(f"gpu/{found}/rank").decode()
    raise ValueError(
        f"ranks {other} and {rank} would share one GPU ({device} of {socket.gethostname()}): each rank needs "
        "its own. Start fewer ranks, or set train.device = 'cpu'; a launcher that sets RANK and binds no "
        "GPUs must set LOCAL_RANK and LOCAL_WORLD_SIZE, too"
    )


def device_name(device: torch.device) -> str:
    """What a run tells of its device: the GPU's model, or the CPU and whether there is a GPU beside it."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    beside = " (train.device = 'cpu'; there is a GPU)" if torch.cuda.is_available() else ""
    return f"the CPU{beside}"


def named_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:NUMBER` to a device, for work of one process.

    Raises:
        ValueError: another name, or CUDA is asked for and there is no such GPU.
    """
    kind, _, number = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and (kind != "cuda" or not number.isdigit())):
        raise ValueError(f"the device must be 'auto', 'cpu', 'cuda' or 'cuda:NUMBER', got '{name}'")
    if not number:
        return pick_device(name)
    pick_device(kind)
    if int(number) >= torch.cuda.device_count():
        raise ValueError(
            f"the device is '{name}' but there are {torch.cuda.device_count()} GPU(s) here, numbered from 0"
        )
    return torch.device("cuda", int(number))


@contextlib.contextmanager
def parallel_context(
    device: str = "auto",
    threads: int | None = None,
    parallel: ParallelConfig | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    times: WatchTimes | None = None,
) -> Iterator[ParallelContext]:
    """The context of this process among the ranks that a launcher started (launch/rendezvous.py), or alone.

    Leaves the process group behind a barrier: destroying it while a peer still sends can abort at exit. After
    an error there is no barrier, for the peers may never reach it.

    Args:
        parallel: sizes of the grid; without it all ranks are data-parallel.
        fingerprint: configuration by dotted keys, which must be the same on every rank.
        times: when a rank is given up.

    Raises:
        ValueError: the sizes do not make the number of ranks, ranks were started differently, or two would
            share a GPU.
        ConnectionError: ranks are missing. PeerLostError, a kind of it: another rank died, failed or hangs.
    """
    parallel, times = parallel or ParallelConfig(), times or WatchTimes()
    meeting = discover(os.environ, join_mpi)
    meeting = dataclasses.replace(meeting, prefix=f"{meeting.prefix}/{next(_MEETINGS)}")
    rank, world_size = meeting.rank, meeting.world_size
    torch.set_num_threads(
        threads or int(os.environ.get("OMP_NUM_THREADS", "0")) or default_threads(meeting.num_local)
    )
    if world_size == 1:
        grid_sizes(1, parallel.data, parallel.pipeline, parallel.tensor)
        yield ParallelContext(device=pick_device(device))
        return
    store, own, roll = _join(meeting, fingerprint or {})
    # the same on all ranks, now that they agree: an error of one before that would leave the others waiting
    sizes = grid_sizes(world_size, parallel.data, parallel.pipeline, parallel.tensor)
    roll.read(lambda other: rank_name(*grid_coordinates(other, *sizes)))
    watcher = Watcher(own, roll, f"{meeting.host}:{meeting.port}", times)
    watcher.start()
    try:
        chosen = pick_device(device, meeting.local_rank, meeting.num_local)
        if chosen.type == "cuda":
            claim_gpu(store, chosen, rank)
            torch.cuda.set_device(chosen)
        if rank != 0:
            warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=30),
        )
        cores = default_threads(meeting.num_local)
        yield dataclasses.replace(grid_context(*sizes, chosen), cores=cores)
        dist.barrier()
    except BaseException as error:
        lost = watcher.explain(error)
        if lost is not None:
            raise lost from error
        raise
    watcher.stop(clean=True)
    dist.destroy_process_group()


def _join(meeting: Rendezvous, fingerprint: Mapping[str, Any]) -> tuple[dist.Store, dist.Store, Roll]:
    """Two connections to the store, for one serves one thread at a time, and the roll of ranks."""
    store, own = open_store(meeting), open_store(meeting, first=False)
    try:
        if meeting.outlives:
            generation = join_generation(store, meeting.rank, meeting.world_size)
            store, own = dist.PrefixStore(generation, store), dist.PrefixStore(generation, own)
        roll = Roll(own, this_peer(meeting.rank), meeting.world_size)
        agree(store, meeting.rank, meeting.world_size, fingerprint_of(fingerprint, meeting.world_size))
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        where = f"{meeting.host}:{meeting.port}"
        raise ConnectionError(
            f"rank {meeting.rank} lost rank 0 at {where} while starting ({line})"
        ) from error
    return store, own, roll
