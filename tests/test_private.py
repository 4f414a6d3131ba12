"""What a server keeps is its user's alone, whatever the umask."""

import contextlib
import os
import stat
from pathlib import Path

import pytest

from tests.support.durability import serving
from tx_async.config import ServerConfig
from tx_async.errors import ConfigError
from tx_async.private import check_writable, close_data, close_folder, make_folder, opener, private_umask
from tx_async.testing.server import ServerProcess


@contextlib.contextmanager
def umask(mask: int):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def open_to_others(folder: Path) -> dict[str, str]:
    """What anybody but its owner may use, the folder itself included."""
    entries = [folder, *folder.rglob("*")]
    return {str(e): stat.filemode(e.stat().st_mode) for e in entries if e.stat().st_mode & 0o077}


def save_a_checkpoint(server: ServerProcess, base_model: str) -> None:
    _, session = server.post("/api/v1/create_session", tags=[])
    model = {"session_id": session["session_id"], "model_seq_id": 0, "base_model": base_model}
    _, created = server.post("/api/v1/create_model", **model, lora_config={"rank": 8})
    _, promise = server.post("/api/v1/save_weights", model_id=created["model_id"], seq_id=1, path="one")
    status, saved = server.post("/api/v1/retrieve_future", 60.0, request_id=promise["request_id"])
    assert status == 200 and saved["path"].endswith("/one"), saved


@pytest.mark.parametrize("mask", [0, 0o022])
def test_everything_that_a_server_keeps_is_closed_to_others(tiny_qwen3, tmp_path, mask):
    """Journal, lease file, bodies, checkpoints, both folders, one of which was made by hand and open to all."""
    data, checkpoints = tmp_path / "data", tmp_path / "checkpoints"
    with umask(mask):
        data.mkdir()
        with serving(data, tiny_qwen3, checkpoints_base=str(checkpoints)) as server:
            save_a_checkpoint(server, str(tiny_qwen3))
            assert open_to_others(data) == open_to_others(checkpoints) == {}
            names = {path.name for path in data.iterdir()}
            assert {"tx_async.db", "tx_async.db.lock", "tx_async.db-wal", "tx_async.db.payloads"} <= names
            assert any(path.is_file() for path in checkpoints.rglob("*"))


def test_what_an_earlier_release_left_open_is_closed_at_the_start(tmp_path):
    with umask(0):
        checkpoint = tmp_path / "data/checkpoints/run/weights/one"
        checkpoint.mkdir(parents=True)
        for path in (checkpoint / "adapter", tmp_path / "data/tx_async.db", tmp_path / "data/tx_async.db-wal"):
            path.touch()
        stranger = tmp_path / "data/notes.txt"
        stranger.touch()
    close_data(ServerConfig(data_dir=str(tmp_path / "data")))
    assert set(open_to_others(tmp_path / "data")) == {str(stranger)}


def test_a_folder_that_programs_share_keeps_its_mode(tmp_path, caplog):
    tmp_path.chmod(0o1777)
    close_folder(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o1777
    assert str(tmp_path) in caplog.text


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o755)
    inside = tmp_path / "data"
    inside.mkdir()
    inside.chmod(0o755)
    (inside / "link").symlink_to(outside)
    close_folder(inside, inside.glob("*"))
    assert stat.S_IMODE(outside.stat().st_mode) == 0o755 and stat.S_IMODE(inside.stat().st_mode) == 0o700


def test_files_and_folders_are_private_from_their_first_moment(tmp_path):
    with umask(0):
        make_folder(tmp_path / "a/b")
        with open(tmp_path / "a/b/file", "w", opener=opener):
            pass
        with private_umask():
            (tmp_path / "a/other").mkdir()
        assert os.umask(0) == 0
    assert open_to_others(tmp_path / "a") == {}


def test_whether_a_folder_can_be_written_is_found_out_without_making_it(tmp_path):
    check_writable(tmp_path / "a/b", "data_dir")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="data_dir /proc/nope cannot be made or written"):
        check_writable(Path("/proc/nope"), "data_dir")
