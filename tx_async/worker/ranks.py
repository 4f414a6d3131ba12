"""Which process of its mesh a worker is, according to the launcher that started it: Slurm, Kubernetes or MPI.

The rules are those of `jax.distributed` (jax/_src/clusters), read from the environment alone, because the server hears
of a worker before JAX is imported. So `srun tx-async worker --connect …` is the whole command for any number of nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from msgspec import Struct

from tx_async.errors import ConfigError

KUBERNETES_PORT = 55527
PORTS = 2**12
FIRST_PORT = 65535 - PORTS + 1
"""The job's number picks a coordinator's port among the last 4096, so that two jobs seldom share one."""
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
)
"""Variables of Open MPI, of MPICH and what is built on it, and of MVAPICH."""

Environment = Mapping[str, str]


class Rank(Struct, frozen=True):
    launcher: str
    process_id: int
    num_processes: int = 0
    """0: the launcher does not say, but the server's `backend_config` does."""
    coordinator_address: str = ""
    """Empty where the launcher does not say it."""

    def __str__(self) -> str:
        total = f" of {self.num_processes}" if self.num_processes else ""
        at = f", coordinator {self.coordinator_address}" if self.coordinator_address else ""
        return f"{self.launcher}: process {self.process_id}{total}{at}"


def discover(environ: Environment, connect: str, host_name: Callable[[], str]) -> Rank | None:
    """None where no launcher is recognised: the process stands alone. host_name: returns this host's full name.

    Raises `ConfigError` for a launcher's variable that is no number.
    """
    for find in (_jax, _slurm, _leader_worker_set, _kubernetes, _mpi):
        if rank := find(environ, connect, host_name):
            return rank
    return None


def _jax(environ: Environment, connect: str, host_name: Callable[[], str]) -> Rank | None:
    """What a person has set for JAX takes precedence."""
    if "JAX_PROCESS_ID" not in environ:
        return None
    total = _number(environ, "JAX_NUM_PROCESSES", 0)
    return Rank("JAX_PROCESS_ID", _number(environ, "JAX_PROCESS_ID"), total, environ.get("JAX_COORDINATOR_ADDRESS", ""))


def _slurm(environ: Environment, connect: str, host_name: Callable[[], str]) -> Rank | None:
    """Only a step of `srun` has a rank; a batch script by itself has none."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if not all(name in environ for name in needed):
        return None
    port = FIRST_PORT + _number(environ, "SLURM_JOB_ID") % PORTS
    total = _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS"))
    first = first_node(environ["SLURM_STEP_NODELIST"])
    return Rank("Slurm", _number(environ, "SLURM_PROCID"), total, f"{first}:{port}")


def first_node(node_list: str) -> str:
    """The first node of `node001`, `node001,host2`, `node[001-015],host2` or `node[001,007-015]-gpu`."""
    head, bracket, rest = node_list.partition("[")
    if not bracket or "," in head:
        return node_list.partition(",")[0]
    numbers, _, tail = rest.partition("]")
    first = next(iter(_split(numbers, ",-")), "")
    return head + first + tail.partition(",")[0]


def _split(text: str, separators: str) -> Iterator[str]:
    for separator in separators:
        text = text.replace(separator, " ")
    yield from text.split()


def _leader_worker_set(environ: Environment, connect: str, host_name: Callable[[], str]) -> Rank | None:
    if "LWS_WORKER_INDEX" not in environ or "LWS_LEADER_ADDRESS" not in environ:
        return None
    address = f"{environ['LWS_LEADER_ADDRESS']}:{KUBERNETES_PORT}"
    total = _number(environ, "LWS_GROUP_SIZE", 0)
    return Rank("LeaderWorkerSet", _number(environ, "LWS_WORKER_INDEX"), total, address)


def _kubernetes(environ: Environment, connect: str, host_name: Callable[[], str]) -> Rank | None:
    """A pod of an indexed Job is called `<job>-<index>`, and `<job>-0` is found where the Job has a subdomain."""
    if "JOB_COMPLETION_INDEX" not in environ:
        return None
    index = _number(environ, "JOB_COMPLETION_INDEX")
    name, _, domain = host_name().partition(".")
    job, dash, suffix = name.rpartition("-")
    address = f"{job}-0.{domain}:{KUBERNETES_PORT}" if dash and suffix == str(index) and domain else ""
    total = _number(environ, "JAX_NUM_PROCESSES", 0)
    return Rank("Kubernetes", index, total, environ.get("JAX_COORDINATOR_ADDRESS", address))


def _mpi(environ: Environment, connect: str, host_name: Callable[[], str]) -> Rank | None:
    """MPI does not say where process 0 runs: the server's host is taken for it, as JAX takes the launcher's."""
    for rank, size in _MPI:
        if rank in environ and size in environ:
            host = connect.rpartition("//")[2].rpartition(":")[0]
            address = f"{host}:{FIRST_PORT}" if host and connect.startswith("tcp://") else ""
            return Rank("MPI", _number(environ, rank), _number(environ, size), address)
    return None


def _number(environ: Environment, name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        number = int(text or "")
    except ValueError:
        number = -1
    if number < 0:
        raise ConfigError(f"{name} is {text!r}: not a process number. Give --process-id by hand.")
    return number
