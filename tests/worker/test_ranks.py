"""A worker finds its place in the mesh by itself, as `jax.distributed` does."""

import pytest

from tx_async.errors import ConfigError
from tx_async.worker.ranks import Rank, discover, first_node

SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


def found(environ: dict[str, str], host_name: str = "host") -> Rank | None:
    return discover(environ, "tcp://head:7001", lambda: host_name)


def test_no_launcher_is_no_rank():
    assert found({}) is None
    assert found({name: SLURM[name] for name in SLURM if name != "SLURM_STEP_NODELIST"}) is None, "a batch script"


def test_slurm_says_all_as_jax_reads_it(monkeypatch):
    rank = found(SLURM)
    assert rank == Rank("Slurm", 2, 3, f"gpu07:{4242 % 4096 + 61440}")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    from jax._src.clusters.slurm_cluster import SlurmCluster

    assert SlurmCluster.is_env_present()
    assert rank.coordinator_address == SlurmCluster.get_coordinator_address(None, None)
    assert (rank.process_id, rank.num_processes) == (SlurmCluster.get_process_id(), SlurmCluster.get_process_count())


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("node[001,007-015],host2", "node001"),
        ("host2,node[001-015]", "host2"),
        ("n[1-2]-gpu", "n1-gpu"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes, first):
    assert first_node(nodes) == first


def test_a_pod_of_an_indexed_job_finds_the_first_one():
    environ = {"JOB_COMPLETION_INDEX": "3", "JAX_NUM_PROCESSES": "4"}
    name = "tx-async-workers-3.tx-async-mesh.default.svc.cluster.local"
    expected = "tx-async-workers-0.tx-async-mesh.default.svc.cluster.local:55527"
    assert found(environ, name) == Rank("Kubernetes", 3, 4, expected)
    assert found({"JOB_COMPLETION_INDEX": "1"}, "job-1") == Rank("Kubernetes", 1), "the server knows the rest"


def test_a_leader_worker_set_says_all():
    environ = {"LWS_LEADER_ADDRESS": "tx-0.tx.default", "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1"}
    assert found(environ) == Rank("LeaderWorkerSet", 1, 2, "tx-0.tx.default:55527")


@pytest.mark.parametrize(
    "names",
    [
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
        ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ],
)
def test_mpi_says_the_place_and_the_servers_host_is_the_coordinators(names):
    assert found({names[0]: "1", names[1]: "2"}) == Rank("MPI", 1, 2, "head:61440")


def test_what_a_person_has_set_for_jax_comes_first():
    environ = SLURM | {"JAX_PROCESS_ID": "1", "JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "a:1"}
    assert found(environ) == Rank("JAX_PROCESS_ID", 1, 2, "a:1")


@pytest.mark.parametrize("value", ["", "x", "-1"])
def test_a_variable_that_is_no_number_is_named(value):
    with pytest.raises(ConfigError, match="SLURM_PROCID"):
        found(SLURM | {"SLURM_PROCID": value})
