"""P17, the operator sees: whatever keeps a server from starting is one line on stderr and exit code 2."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tx_async.errors import ConfigError, LeaseHeld, StorageError
from tx_async.serve import _as_operators_own, _innermost
from tx_async.testing.server import free_port


def garbage(folder: Path) -> None:
    (folder / "tx_async.db").write_bytes(b"this is a text, and a rather long one" * 200)


def malformed(folder: Path) -> None:
    """A database whose pages are damaged behind its header."""
    path = folder / "tx_async.db"
    subprocess.run([*CLI, "migrate", "--data-dir", str(folder)], check=True, capture_output=True)
    content = bytearray(path.read_bytes())
    content[200:] = b"\xa5" * (len(content) - 200)
    path.write_bytes(content)


def unreadable_record(folder: Path) -> None:
    subprocess.run([*CLI, "migrate", "--data-dir", str(folder)], check=True, capture_output=True)
    with sqlite3.connect(folder / "tx_async.db") as connection:
        connection.execute("INSERT INTO session (key, record) VALUES ('s', x'00')")
    connection.close()


def a_folder_in_its_place(folder: Path) -> None:
    (folder / "tx_async.db").mkdir()


CLI = [sys.executable, "-m", "tx_async.cli"]


def serve(model: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*CLI, "serve", "--base-model", str(model), "--port", str(free_port()), "--local-workers", "0"]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=60, check=False, env=dict(os.environ)
    )


def assert_one_line(done: subprocess.CompletedProcess[str], *named: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "CRITICAL" not in done.stderr, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("tx-async: ")
    for word in named:
        assert word in line, line


@pytest.mark.parametrize("damage", [garbage, malformed, unreadable_record, a_folder_in_its_place])
def test_a_journal_that_cannot_be_used_is_one_line(damage: Callable[[Path], None], tiny_qwen3: Path, tmp_path: Path):
    damage(tmp_path)
    assert_one_line(serve(tiny_qwen3, "--data-dir", str(tmp_path)), str(tmp_path / "tx_async.db"))


def test_a_journal_that_cannot_be_written_is_one_line(tiny_qwen3: Path, tmp_path: Path):
    """Root writes everywhere but on a file system that is read-only, or into what is no folder."""
    (tmp_path / "file").write_text("")
    assert_one_line(serve(tiny_qwen3, "--data-dir", str(tmp_path / "file" / "data")), str(tmp_path / "file"))


def test_a_compilation_cache_that_cannot_be_written_is_one_line(tiny_qwen3: Path, tmp_path: Path):
    """The folder is the server's setting: its worker would end at each start for the same reason."""
    (tmp_path / "file").write_text("")
    nowhere = str(tmp_path / "file" / "cache")
    settings = ("--data-dir", str(tmp_path), "--local-workers", "1", "--compilation-cache-dir", nowhere)
    done = serve(tiny_qwen3, *settings)
    assert_one_line(done, "compilation_cache_dir", nowhere)


def test_a_database_that_is_down_is_one_line_without_the_password(tiny_qwen3: Path, tmp_path: Path):
    url = f"postgresql://user:secret@127.0.0.1:{free_port()}/tx"
    done = serve(tiny_qwen3, "--data-dir", str(tmp_path), "--database-url", url)
    assert_one_line(done, "postgresql://user@127.0.0.1")
    assert "secret" not in done.stderr


def test_what_the_system_refuses_before_the_start_is_the_operators_to_change():
    assert isinstance(_as_operators_own(PermissionError(13, "Permission denied", "/data")), ConfigError)
    assert isinstance(_as_operators_own(StorageError("full")), ConfigError)
    assert isinstance(_as_operators_own(AssertionError()), AssertionError)


def test_of_several_errors_the_one_that_says_what_to_change_counts():
    error = BaseExceptionGroup("", [RuntimeError(), BaseExceptionGroup("", [LeaseHeld("taken")])])
    assert _innermost(error).args == ("taken",)
