"""Disks that are really full, or read-only: a small file system of its own holds the journal, or the checkpoints, of a
real server. What was accepted stays, what cannot be accepted is refused with a reason, and when there is room again
everything goes on by itself."""

import contextlib
import json
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.durability import Told, batch, serving, stored, train, wait_until
from tx_async.testing.server import ServerFailed, ServerProcess

STEPS = 10
DISK_BYTES = 8 * 2**20
Clean = tuple[Told, dict[str, str]]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)).returncode != 0:
        pytest.skip("mounting a small file system needs root, and a kernel that lets it")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mount(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(["mount", *arguments], capture_output=True, check=False)
    return subprocess.CompletedProcess(arguments, 1)


@contextlib.contextmanager
def full(disk: Path) -> Iterator[None]:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (2**16, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def read_only(disk: Path) -> Iterator[None]:
    assert mount("-o", "remount,ro", str(disk)).returncode == 0
    try:
        yield
    finally:
        assert mount("-o", "remount,rw", str(disk)).returncode == 0


def create_session(server: ServerProcess) -> tuple[int, str]:
    """Status and message of a submission."""
    body = json.dumps({"tags": [], "sdk_version": "0", "type": "create_session"}).encode()
    request = urllib.request.Request(
        server.base_url + "/api/v1/create_session", body, {"Content-Type": "application/json", "X-API-Key": "tml-dummy"}
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_the_journal_s_disk_is_full_for_a_while(fake_clean: Clean, tiny_qwen3: Path, tmp_path: Path, disk: Path):
    """In the middle of a run. The SDK tries again by itself; others are told 503 and why."""
    refused: list[tuple[int, str]] = []

    def fill() -> None:
        def refuse() -> None:
            with full(disk):
                wait_until(lambda: refused.append(create_session(server)) or refused[-1][0] != 200)
                time.sleep(1)

        filler = threading.Thread(target=refuse)
        filler.start()
        wait_until(lambda: bool(refused))
        fillers.append(filler)

    fillers: list[threading.Thread] = []
    url = f"sqlite://{disk}/journal.db"
    with serving(tmp_path / "server", tiny_qwen3, database_url=url, snapshot_every_steps=3) as server:
        told = train(server.base_url, tiny_qwen3, STEPS, at={4: fill})
        fillers[0].join()
        assert create_session(server)[0] == 200
    status, message = refused[-1]
    assert status == 503 and "could not be written: database or disk is full" in message and '"server"' in message
    assert str(disk) not in message  # that the path is named is for the log
    assert told == fake_clean[0]
    assert stored(server) == fake_clean[1]


def test_a_server_whose_journal_is_read_only_says_so_and_ends(tiny_qwen3: Path, tmp_path: Path, disk: Path):
    url = f"sqlite://{disk}/journal.db"
    with (
        read_only(disk),
        pytest.raises(ServerFailed, match=r"journal\.db cannot be opened.*Read-only file system"),
        serving(tmp_path / "server", tiny_qwen3, database_url=url),
    ):
        pass


@pytest.mark.parametrize("trouble", [full, read_only])
def test_storage_that_takes_no_files_fails_saves_and_nothing_else(
    tiny_qwen3: Path, tmp_path: Path, disk: Path, trouble
):
    """Checkpoints cannot be written: the saves that were asked for say so, snapshots wait, training goes on; later the
    snapshots are made up for, and the same name can be saved."""
    import tinker

    def step(number: int) -> None:
        trainer.forward_backward(batch(number), "cross_entropy")
        trainer.optim_step(tinker.AdamParams(learning_rate=0.01)).result()

    def snapshots() -> list[Path]:
        return list(disk.glob("*/snapshots/*/metadata.json"))

    folder = tmp_path / "server"
    settings: dict[str, Any] = {"checkpoints_base": str(disk), "snapshot_every_steps": 2, "storage_patience_s": 3}
    with (
        serving(folder, tiny_qwen3, snapshot_idle_s=1, **settings) as server,
        tinker.ServiceClient(base_url=server.base_url, api_key="tml-dummy") as service,
    ):
        trainer = service.create_lora_training_client(str(tiny_qwen3), rank=4).result()
        for number in range(3):
            step(number)
        with trouble(disk):
            before = snapshots()
            with pytest.raises(tinker.RequestFailedError, match=r"could not be (written|deleted).*(space|Read-only)"):
                trainer.save_state("a").result()
            for number in range(3, 6):
                step(number)
            assert snapshots() == before
        path = trainer.save_state("a").result().path
        wait_until(lambda: len(snapshots()) > len(before), timeout_s=20)
        server.kill()
        server.start()
        step(6)
        service.create_training_client_from_state_with_optimizer(path)
    assert server.log().count("Traceback") == 0
