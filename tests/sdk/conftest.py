"""One real server for the tests that drive it with the real SDK. It is shared, as any server is, by clients that do not
know each other."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tx_async.testing.server import Server, running_server

BACKEND = {"max_lora_adapters": 8, "max_lora_rank": 32, "max_context_length": 256}


@pytest.fixture(scope="session")
def server(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tiny_qwen3, data_dir=tmp_path_factory.mktemp("server"), backend_config=BACKEND) as server:
        yield server
    assert "Traceback" not in server.log(), server.log_tail()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The SDK leaves its sockets to the garbage collector: here, and only here, that is no error."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"))


@pytest.fixture
def service(server: Server):
    import tinker

    with tinker.ServiceClient(base_url=server.base_url, api_key="tml-dummy") as client:
        yield client
    gc.collect()
