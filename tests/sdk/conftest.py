"""One real server for the tests that drive it with the real SDK. It is shared, as any server is, by clients that do not
know each other."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import xla
from tx_async.testing.sdk import UNCLOSED, collect_connections
from tx_async.testing.server import ServerProcess, free_port, running_server

BACKEND = {"max_lora_adapters": 8, "max_lora_rank": 32, "max_context_length": 256}
MESH_VARIABLE = "SDK_TESTS_ON_MESH"
"""Set: the server's worker is a mesh of two processes (tests/mesh/test_suites_on_mesh.py)."""


def settings() -> dict:
    if not os.environ.get(MESH_VARIABLE):
        return {"backend_config": BACKEND}
    mesh = {
        "num_processes": 2,
        "coordinator_address": f"127.0.0.1:{free_port()}",
        "fully_sharded_data_parallel_size": 2,
    }
    return {"backend_config": BACKEND | mesh, "local_workers": 2, "environ": xla.flags(1)}


@pytest.fixture(scope="session")
def server(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running_server(tiny_qwen3, data_dir=tmp_path_factory.mktemp("server"), **settings()) as server:
        yield server
    assert "Traceback" not in server.log(), server.log_tail()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The SDK leaves its sockets to the garbage collector: here, and only here, that is no error."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings(UNCLOSED))


@pytest.fixture(scope="module", autouse=True)
def connections_of_the_sdk() -> Iterator[None]:
    """None is left for tests that come later in the same process, and do not expect what is said about them."""
    yield
    collect_connections()


@pytest.fixture
def service(server: ServerProcess):
    import tinker

    with tinker.ServiceClient(base_url=server.base_url, api_key="tml-dummy") as client:
        yield client
    gc.collect()
