"""A launcher's words about this process, as a value: its rank, and the address at which the ranks meet.

torchrun, Open MPI, MPICH and Intel MPI, and Slurm's srun each tell a process its number in environment
variables of their own; the first of this order that speaks decides. A batch script's own shell, where Slurm
sets variables too but has started no step, is one process. Slurm writes lists of hosts and counts per node in
short forms, node[01-03,7]x and 4(x2),3.
"""

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# (rank, number of ranks) of MPI launchers; of the last pair, Hydra's, a variable that srun's PMI does not set
_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
_HYDRA = ("PMI_RANK", "PMI_SIZE")
_HYDRA_ALONE = "MPI_LOCALRANKID"
_SLURM_STEP = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")
_SLURM_OWN_STEPS = 0xFFFFFFF0  # from here on steps are shells: of salloc, of the batch script, ...
_FIRST_PORT, _NUM_PORTS = 10_000, 20_000  # below the ports that Linux gives away itself


@dataclass(frozen=True)
class Rendezvous:
    """This process among the ranks, and the address at which they meet."""

    launcher: str = "one process"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Number on its machine."""
    num_local: int = 1
    """Ranks of its machine."""
    host: str = ""
    port: int = 0
    serves: bool = False
    """Whether this process holds the store; torchrun may hold it itself."""
    prefix: str = "megagnn"
    """Prefix of the store's keys."""
    outlives: bool = False
    """Whether the store outlives the ranks: torchrun's does, which starts them again after a failure."""
    listener: int | None = None
    """File descriptor of the socket that holds the port, where it was chosen by us."""


def launched(environment: Mapping[str, str]) -> tuple[str, int, int]:
    """(launcher, rank, world size) from the environment alone.

    Raises:
        ValueError: variables that are no numbers or do not fit one another.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return "torchrun", *_rank_of(environment, "RANK", "WORLD_SIZE")
    if _OPEN_MPI[1] in environment:
        return "MPI", *_rank_of(environment, *_OPEN_MPI)
    if _HYDRA[1] in environment and _HYDRA_ALONE in environment:
        return "MPI", *_rank_of(environment, *_HYDRA)
    if _is_slurm_step(environment):
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
        return "Slurm", *_rank_of(environment, "SLURM_PROCID", size)
    if _HYDRA[1] in environment:
        return "MPI", *_rank_of(environment, *_HYDRA)
    if _number(environment, "WORLD_SIZE", 1) > 1:
        raise ValueError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']} but RANK is not set: start with torchrun, mpirun or "
            "srun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process"
        )
    return "one process", 0, 1


def discover(environment: Mapping[str, str], join_mpi: Callable[[int], Rendezvous]) -> Rendezvous:
    """The rendezvous of this process; `join_mpi(world_size)` asks MPI, and is called for its launchers only.

    Raises:
        ValueError: the launcher's variables are incomplete or contradict one another.
    """
    launcher, rank, world_size = launched(environment)
    if world_size == 1:
        return Rendezvous()
    if launcher == "torchrun":
        return _torchrun(environment, rank, world_size)
    if launcher == "Slurm":
        return _slurm(environment, rank, world_size)
    return join_mpi(world_size)


def rank_label(environment: Mapping[str, str]) -> str:
    """ " [rank 3]" for messages of one among several processes, else nothing; never raises."""
    try:
        _, rank, world_size = launched(environment)
    except ValueError:
        return ""
    return f" [rank {rank}]" if world_size > 1 else ""


def _torchrun(environment: Mapping[str, str], rank: int, world_size: int) -> Rendezvous:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise ValueError(
                f"RANK and WORLD_SIZE are set but {name} is not: start with torchrun, or set {name} to where "
                "rank 0 listens"
            )
    agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Rendezvous(
        "torchrun",
        rank,
        world_size,
        local_rank=_number(environment, "LOCAL_RANK", 0),
        num_local=_number(environment, "LOCAL_WORLD_SIZE", 1),
        host=environment["MASTER_ADDR"],
        port=_number(environment, "MASTER_PORT"),
        serves=rank == 0 and not agent,
        outlives=agent,
    )


def _is_slurm_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process: shells of sbatch and salloc know of a job, not of a step."""
    if "SLURM_PROCID" not in environment or not any(name in environment for name in _SLURM_STEP):
        return False
    return _step(environment) < _SLURM_OWN_STEPS


def _step(environment: Mapping[str, str]) -> int:
    return _number(environment, "SLURM_STEP_ID" if "SLURM_STEP_ID" in environment else "SLURM_STEPID", 0)


def _slurm(environment: Mapping[str, str], rank: int, world_size: int) -> Rendezvous:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    host = environment.get("MASTER_ADDR")
    if not host and not nodes:
        raise ValueError(
            "started by srun, but neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST is set: export "
            "MASTER_ADDR, the host of rank 0"
        )
    job = _number(environment, "SLURM_JOB_ID", 0)
    # two steps of a job may run at once, or one after the other while the first one's port still lingers
    port = _FIRST_PORT + (job + 1009 * _step(environment)) % _NUM_PORTS
    return Rendezvous(
        "Slurm",
        rank,
        world_size,
        local_rank=_number(environment, "SLURM_LOCALID", 0),
        num_local=_slurm_tasks_here(environment, world_size, len(expand_hosts(nodes)) if nodes else 1),
        host=host or expand_hosts(nodes or "")[0],
        port=_number(environment, "MASTER_PORT", port),
        serves=rank == 0,
    )


def _slurm_tasks_here(environment: Mapping[str, str], world_size: int, num_nodes: int) -> int:
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    node = _number(environment, "SLURM_NODEID", 0)
    counts = expand_counts(text) if text else []
    return counts[node] if node < len(counts) else -(-world_size // num_nodes)


def _rank_of(environment: Mapping[str, str], rank_name: str, size_name: str) -> tuple[int, int]:
    rank, size = _number(environment, rank_name), _number(environment, size_name)
    if not 0 <= rank < size:
        raise ValueError(f"{rank_name} must lie in [0, {size_name}), got {rank} of {size}")
    return rank, size


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if not text and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ValueError(f"{name} must be a whole number, got '{text or ''}'") from None


_PART = re.compile(r"\[([^\[\]]*)\]")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def expand_hosts(text: str) -> list[str]:
    """ "a[01-02],b" to ["a01", "a02", "b"]; several brackets in one name give every combination.

    Raises:
        ValueError: brackets that do not close, or a range that is none.
    """
    hosts: list[str] = []
    for name in re.split(r",(?![^\[]*\])", text.strip()):  # commas outside of brackets
        pieces = _PART.split(name)  # literal, inside, literal, inside, ..., literal
        literals, insides = pieces[::2], pieces[1::2]
        if not name or any("[" in part or "]" in part for part in literals):
            raise ValueError(f"cannot read the host list '{text}': expected a form like node[01-03,7],other")
        for numbers in itertools.product(*(_numbers(inside, text) for inside in insides)):
            hosts.append("".join(itertools.chain(*zip(literals, numbers, strict=False), literals[-1:])))
    return hosts


def _numbers(inside: str, text: str) -> list[str]:
    """ "01-03,7" to ["01", "02", "03", "7"]: a range keeps the digits of its first number."""
    numbers: list[str] = []
    for part in inside.split(","):
        match = _RANGE.fullmatch(part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"cannot read the host list '{text}': '{part}' is no number and no rising range")
        first, last = match[1], match[2] or match[1]
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return numbers


def expand_counts(text: str) -> list[int]:
    """ "4(x2),3" to [4, 4, 3], the tasks of each node.

    Raises:
        ValueError: anything else.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = _COUNT.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"cannot read the tasks per node '{text}': expected a form like 4(x2),3")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts
