"""A backup of a running server is whole, and starts where it was restored."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from tests.support.clients import Client
from tests.support.durability import serving
from tx_async import cli


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_a_backup_under_load_is_restored_elsewhere_and_goes_on(
    tiny_qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Snapshots come and go while it is taken. What was acknowledged before it began is in it."""
    over = threading.Event()
    with serving(tmp_path / "data", tiny_qwen3, snapshot_every_steps=1) as server:
        client = Client(server)
        model = client.create_model(str(tiny_qwen3))
        assert "metrics" in client.optim_step(model, 1)
        assert "path" in client.save_weights(model, 2, "kept")
        last = [2]

        def train() -> None:
            while not over.is_set():
                last[0] += 1
                client.optim_step(model, last[0])

        thread = threading.Thread(target=train)
        thread.start()
        try:
            assert run("backup", tmp_path / "copy", "--data-dir", tmp_path / "data") == 0, capsys.readouterr().err
        finally:
            over.set()
            thread.join()
    shutil.rmtree(tmp_path / "data")
    assert run("restore", tmp_path / "copy", "--data-dir", tmp_path / "new") == 0, capsys.readouterr().err
    with serving(tmp_path / "new", tiny_qwen3) as server:
        client = Client(server)
        assert client.training_runs() == [model]
        assert "model_id" in client.load_weights(f"tinker://{model}/weights/kept")
        assert "metrics" in client.optim_step(model, last[0] + 1)


def test_a_relative_data_dir_is_the_one_below_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert run("migrate", "--data-dir", "data") == 0 and (tmp_path / "data" / "tx_async.db").exists()
    assert run("backup", "copy", "--data-dir", "data") == 0, capsys.readouterr().err
    assert run("restore", "copy", "--data-dir", "new") == 0, capsys.readouterr().err
    assert (tmp_path / "new" / "tx_async.db").exists()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_what_is_no_whole_backup_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data, copy = tmp_path / "data", tmp_path / "copy"
    assert "There is no journal" in refused(capsys, "backup", copy, "--data-dir", data)
    assert run("migrate", "--data-dir", data) == 0
    assert run("backup", copy, "--data-dir", data) == 0
    capsys.readouterr()
    assert "is not empty" in refused(capsys, "backup", copy, "--data-dir", data)
    (tmp_path / "file").touch()
    assert "is a file" in refused(capsys, "backup", tmp_path / "file", "--data-dir", data)
    assert "file" in refused(capsys, "restore", copy, "--data-dir", tmp_path / "file")
    assert "is there already" in refused(capsys, "restore", copy, "--data-dir", data)
    assert run("restore", copy, "--data-dir", tmp_path / "new") == 0
    capsys.readouterr()
    journal = copy / "tx_async.db"
    content = journal.read_bytes()
    journal.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "is damaged" in refused(capsys, "restore", copy, "--data-dir", tmp_path / "other")
    (copy / "backup.json").unlink()
    assert "not a complete backup" in refused(capsys, "restore", copy, "--data-dir", tmp_path / "other")
    url = "postgresql://user@host/db"
    assert "pg_dump" in refused(capsys, "backup", tmp_path / "pg", "--database-url", url)
