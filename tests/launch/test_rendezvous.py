"""From a launcher's environment to the rank, literal examples of each launcher."""

import sys
from typing import NoReturn

import pytest

from megagnn.launch.context import join_mpi
from megagnn.launch.rendezvous import Rendezvous, discover, expand_counts, expand_hosts, rank_label

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[05-08]",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
}
# what sbatch sets for its script
SBATCH = {k: v for k, v in SRUN.items() if "STEP" not in k} | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "3", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
MPI_SAYS = Rendezvous("MPI", 1, 3, 1, 3, "here", 4000)


def mpi(world_size: int) -> Rendezvous:
    assert world_size == 3
    return MPI_SAYS


def no_mpi(world_size: int) -> NoReturn:
    raise AssertionError("MPI was asked")


def test_torchrun() -> None:
    assert discover(TORCHRUN, no_mpi) == Rendezvous("torchrun", 3, 4, 1, 2, "node1", 29500)
    first = {**TORCHRUN, "RANK": "0"}
    assert discover(first, no_mpi).serves
    agent = {**first, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert not discover(agent, no_mpi).serves
    assert discover(agent, no_mpi).outlives
    assert not discover(first, no_mpi).outlives


def test_srun() -> None:
    port = 10_000 + (123456 + 2 * 1009) % 20_000
    assert discover(SRUN, no_mpi) == Rendezvous("Slurm", 5, 6, 1, 2, "gpu07", port)
    assert discover({**SRUN, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}, no_mpi).num_local == 4
    assert discover({**SRUN, "SLURM_PROCID": "0"}, no_mpi).serves
    other_step = discover({**SRUN, "SLURM_STEP_ID": "3"}, no_mpi)
    assert 10_000 <= other_step.port != port, "steps of a job may run at once"
    chosen = discover({**SRUN, "MASTER_ADDR": "ib7", "MASTER_PORT": "4242"}, no_mpi)
    assert (chosen.host, chosen.port) == ("ib7", 4242)


def test_srun_with_the_variables_of_older_releases() -> None:
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_ID", "SLURM_STEP_TASKS_PER_NODE")
    old = {k: v for k, v in SRUN.items() if k not in names} | {"SLURM_STEPID": "0"}
    found = discover(old, no_mpi)
    assert (found.rank, found.world_size, found.host, found.num_local) == (5, 6, "gpu05", 2)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        SBATCH,
        {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"},  # salloc's shell is a step of its own
        {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --ntasks 1 --pty bash
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALRANKID": "0"},
        {"WORLD_SIZE": "1"},
    ],
)
def test_one_process(environment: dict[str, str]) -> None:
    assert discover(environment, no_mpi) == Rendezvous()
    assert rank_label(environment) == ""


@pytest.mark.parametrize("environment", [OPEN_MPI, HYDRA, {"PMI_RANK": "1", "PMI_SIZE": "3"}])
def test_mpi_is_asked(environment: dict[str, str]) -> None:
    assert discover(environment, mpi) == MPI_SAYS
    assert rank_label(environment) == " [rank 1]"


def test_who_wins() -> None:
    assert discover({**TORCHRUN, **SRUN, **HYDRA}, no_mpi).launcher == "torchrun"
    # mpirun in a Slurm job starts its daemons by srun, and the ranks inherit their variables
    assert discover({**SRUN, **OPEN_MPI}, mpi).launcher == "MPI"
    assert discover({**SRUN, **HYDRA}, mpi).launcher == "MPI"
    # srun --mpi=pmi2 sets PMI_RANK itself
    assert discover({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "6"}, no_mpi).launcher == "Slurm"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**TORCHRUN, "RANK": "x"}, "RANK must be a whole number, got 'x'"),
        ({**TORCHRUN, "RANK": "4"}, r"RANK must lie in \[0, WORLD_SIZE\), got 4 of 4"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "MASTER_PORT is not: start with torchrun, or set MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but RANK is not set: start with torchrun, mpirun or srun"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK must be a whole number, got ''"),
        ({**SRUN, "SLURM_STEP_NODELIST": "gpu[7"}, r"cannot read the host list 'gpu\[7'"),
        ({**SRUN, "SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""}, "export MASTER_ADDR"),
    ],
)
def test_contradictions(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        discover(environment, no_mpi)


def test_without_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ValueError, match=r"mpi4py is missing: install it .*'megagnn\[mpi\]'.*torchrun"):
        join_mpi(2)


def test_mpi4py_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoLibrary:
        def __getattr__(self, name: str) -> NoReturn:
            raise RuntimeError("cannot load MPI library\nlibmpi.so.12: not found")

    monkeypatch.setitem(sys.modules, "mpi4py", NoLibrary())
    with pytest.raises(ValueError, match=r"mpi4py does not load \(cannot load MPI library\): install"):
        join_mpi(2)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login", ["login"]),
        ("a,b.cluster.org", ["a", "b.cluster.org"]),
        ("node[7]", ["node7"]),
        ("node[01-03,07],login", ["node01", "node02", "node03", "node07", "login"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[099-101]-ib", ["n099-ib", "n100-ib", "n101-ib"]),
        ("r[1-2]c[3,5]", ["r1c3", "r1c5", "r2c3", "r2c5"]),
        ("gpu-a[1-2],gpu-b[4]", ["gpu-a1", "gpu-a2", "gpu-b4"]),
    ],
)
def test_hosts(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node[1-", r"cannot read the host list 'node\[1-': expected a form like"),
        ("node]1", "expected a form like"),
        ("", "expected a form like"),
        ("a,,b", "expected a form like"),
        ("node[3-1]", "'3-1' is no number and no rising range"),
        ("node[a-c]", "'a-c' is no number"),
        ("node[]", "'' is no number"),
    ],
)
def test_bad_hosts(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand_hosts(text)


@pytest.mark.parametrize(
    ("text", "counts"), [("4", [4]), ("4(x2),3", [4, 4, 3]), ("1,2(x1),10(x3)", [1, 2, 10, 10, 10])]
)
def test_counts(text: str, counts: list[int]) -> None:
    assert expand_counts(text) == counts


@pytest.mark.parametrize("text", ["", "4(2)", "x2", "4,,3"])
def test_bad_counts(text: str) -> None:
    with pytest.raises(ValueError, match=r"cannot read the tasks per node '.*': expected a form like 4\(x2"):
        expand_counts(text)
