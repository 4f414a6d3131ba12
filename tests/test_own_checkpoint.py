"""Checkpoints are portable: what one server has saved is listed and loaded by another with the same base, also after
its journal is lost."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest

from tests.support.clients import Client
from tests.support.durability import serving
from tx_async import cli
from tx_async.testing.models import make_qwen3


@pytest.fixture(scope="module")
def saved(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(run, data_dir): a server has saved two checkpoints and stopped."""
    folder = tmp_path_factory.mktemp("saved") / "data"
    with serving(folder, tiny_qwen3) as server:
        client = Client(server)
        run = client.create_model(str(tiny_qwen3))
        client.optim_step(run, 1)
        client.save_weights(run, 2, "one")
        client.save_weights(run, 3, "two")
    return run, folder


def imported(capsys: pytest.CaptureFixture[str], source: Path, data: Path, model: Path, *more: str) -> list[str]:
    arguments = ["--data-dir", str(data), "--base-model", str(model), "--api-key", "tml-dummy"]
    assert cli.main(["import", str(source), *arguments, *more]) == 0, capsys.readouterr().err
    return capsys.readouterr().out.split()


def refused(capsys: pytest.CaptureFixture[str], source: Path, data: Path, model: Path, *more: str) -> str:
    assert cli.main(["import", str(source), "--data-dir", str(data), "--base-model", str(model), *more]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err


def test_a_storage_whose_journal_is_lost_is_taken_over_under_the_same_paths(
    saved: tuple[str, Path], tiny_qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, folder = saved
    paths = imported(capsys, folder / "checkpoints", tmp_path / "new", tiny_qwen3)
    assert paths == [f"tinker://{run}/weights/one", f"tinker://{run}/weights/two"]
    with serving(tmp_path / "new", tiny_qwen3) as server:
        client = Client(server)
        assert client.training_runs() == [run]
        assert all("model_id" in client.load_weights(path) for path in paths)


def test_a_folder_and_an_archive_get_the_name_that_is_asked_for(
    saved: tuple[str, Path], tiny_qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Twice the same: the second gets a run of its own."""
    run, folder = saved
    one = next((folder / "checkpoints").glob("*/weights/one~*"))
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        for file in one.iterdir():
            tar.add(file, file.name)
    first = imported(capsys, one, tmp_path / "new", tiny_qwen3)
    second = imported(capsys, tmp_path / "one.tar", tmp_path / "new", tiny_qwen3)
    third = imported(capsys, tmp_path / "one.tar", tmp_path / "new", tiny_qwen3, "--as", "renamed")
    assert first == [f"tinker://{run}/weights/one"]
    assert second[0].endswith("/weights/one") and second != first
    assert third[0].endswith("/weights/renamed") and run not in third[0]


def test_what_cannot_be_used_is_refused_in_one_line(
    saved: tuple[str, Path], tiny_qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    _, folder = saved
    other = make_qwen3(tmp_path / "other", seed=9, tokenizer=False)
    assert "belongs to the base model" in refused(capsys, folder / "checkpoints", tmp_path / "a", other)
    copy = shutil.copytree(next((folder / "checkpoints").glob("*/weights/one~*")), tmp_path / "copy")
    data = next(path for path in Path(copy).iterdir() if path.name != "metadata.json")
    content = data.read_bytes()
    data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "recorded hash" in refused(capsys, Path(copy), tmp_path / "b", tiny_qwen3)
    data.unlink()
    assert "is missing" in refused(capsys, Path(copy), tmp_path / "b", tiny_qwen3)
    (tmp_path / "text").write_text("no archive")
    assert "neither a folder nor a tar" in refused(capsys, tmp_path / "text", tmp_path / "b", tiny_qwen3)
    assert "leave out --as" in refused(capsys, folder / "checkpoints", tmp_path / "b", tiny_qwen3, "--as", "x")
    (tmp_path / "empty").mkdir()
    assert "holds no adapter" in refused(capsys, tmp_path / "empty", tmp_path / "b", tiny_qwen3, "--as", "x")
    snapshot = next((folder / "checkpoints").glob("*/snapshots/*/metadata.json"))
    assert "no checkpoint of its own" in refused(capsys, snapshot.parent, tmp_path / "b", tiny_qwen3)
