import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tx_async.dispatch.runtime import RuntimeDirectory, remove_leftovers
from tx_async.errors import ConfigError

OWNER = """
import sys, time
from pathlib import Path
from tx_async.dispatch.runtime import RuntimeDirectory
directory = RuntimeDirectory(Path(sys.argv[1]))
(directory.path / "arena-1").write_bytes(b"x" * 1000)
print(directory.path, flush=True)
time.sleep(60)
"""


@pytest.fixture
def tmp_path():
    """Shorter than pytest's own: socket files may not be deep."""
    with tempfile.TemporaryDirectory(prefix="tx") as folder:
        yield Path(folder)


@pytest.fixture
def owner(tmp_path):
    with subprocess.Popen([sys.executable, "-c", OWNER, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_it_is_private_and_leaves_nothing(tmp_path):
    directory = RuntimeDirectory(tmp_path)
    assert directory.path.stat().st_mode & 0o777 == 0o700
    (directory.path / "worker.sock").touch()
    directory.close()
    directory.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_server_left_is_removed_by_the_next(tmp_path, owner):
    left = owner.stdout.readline().strip()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert os.path.exists(left)
    directory = RuntimeDirectory(tmp_path)
    assert list(tmp_path.iterdir()) == [directory.path]
    directory.close()


def test_what_a_running_server_uses_stays(tmp_path, owner):
    used = owner.stdout.readline().strip()
    assert remove_leftovers(tmp_path) == []
    assert os.path.exists(used)


def test_folders_of_others_stay(tmp_path):
    (tmp_path / "somebody").mkdir()
    (tmp_path / f"tx_async-{os.getuid()}-what").mkdir()
    (tmp_path / f"tx_async-{os.getuid() + 1}-1-1-abc").mkdir()
    assert remove_leftovers(tmp_path) == []


def test_a_folder_too_deep_for_a_socket_is_a_clear_error(tmp_path):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    with pytest.raises(ConfigError, match="TMPDIR"):
        RuntimeDirectory(deep)
