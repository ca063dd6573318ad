"""Ranks started by mpirun or mpiexec: MPI says who is who, and carries nothing else."""

import os
import socket

from megagnn.launch.rendezvous import Rendezvous


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
