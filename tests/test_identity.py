"""P13, data know whose they are: a journal, its storage and its base model refuse strangers, and what storage cannot
find for the moment is an outage. Real server processes, with workers that need no JAX."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import Client
from tests.support.durability import serving, wait_until
from tx_async.errors import ConfigError, WrongIdentity
from tx_async.identity import identity_of, with_base
from tx_async.journal.journal import Journal
from tx_async.journal.sqlite import SqliteDriver
from tx_async.scheduler.interface import BaseModelInfo
from tx_async.storage.identity import ensure_identity_sync
from tx_async.storage.store import IDENTITY, Store
from tx_async.testing.models import make_qwen3
from tx_async.testing.server import ServerFailed
from tx_async.wire.records import IdentityRecord, ModelRecord

# ---- which base


def base(fingerprint: str, path: str = "/models/a") -> BaseModelInfo:
    return BaseModelInfo(
        name=path, path=path, architecture="", vocab_size=1, max_context_length=1, fingerprint=fingerprint
    )


def journal_of(*bases: BaseModelInfo) -> IdentityRecord:
    identity = identity_of([])
    for each in bases:
        identity = with_base(identity, each, True, 1.0)
    return identity


def test_a_new_journal_takes_its_first_base():
    identity = with_base(identity_of([]), base("aa"), False, 1.0)
    assert [(known.fingerprint, known.path) for known in identity.bases] == [("aa", "/models/a")]


def test_the_same_weights_under_another_path_need_nothing():
    identity = with_base(journal_of(base("aa")), base("aa", "/moved"), False, 2.0)
    assert [(known.fingerprint, known.path) for known in identity.bases] == [("aa", "/moved")]


@pytest.mark.parametrize("path", ["/models/a", "/models/b"])
def test_another_base_is_refused_in_one_line_that_names_both(path: str):
    with pytest.raises(WrongIdentity) as refused:
        with_base(journal_of(base("aa")), base("bb", path), False, 2.0)
    assert "/models/a" in refused.value.message and path in refused.value.message
    assert "\n" not in refused.value.message and isinstance(refused.value, ConfigError)


def test_what_was_adopted_is_the_base_from_then_on_and_the_first_is_remembered():
    identity = journal_of(base("aa"), base("bb"))
    assert [known.fingerprint for known in identity.bases] == ["aa", "bb"]
    assert with_base(identity, base("bb"), False, 3.0) == identity
    with pytest.raises(WrongIdentity):
        with_base(identity, base("aa"), False, 3.0)


def test_a_base_without_weights_on_this_host_changes_nothing():
    identity = journal_of(base("aa"))
    assert with_base(identity, base(""), False, 2.0) == identity


# ---- real servers


@pytest.fixture(scope="module")
def first_server(tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A server on this folder has trained this run, saved it, and stopped."""
    folder = tmp_path_factory.mktemp("first") / "data"
    with serving(folder, tiny_qwen3) as server:
        client = Client(server)
        model_id = client.create_model(str(tiny_qwen3))
        client.optim_step(model_id, 1)
        assert "path" in client.save_weights(model_id, 2, "kept")
    return model_id, folder


@pytest.fixture
def trained(first_server: tuple[str, Path], tmp_path: Path) -> str:
    """The run; its server's data lie in `tmp_path / "data"`."""
    model_id, folder = first_server
    shutil.copytree(folder, tmp_path / "data", ignore=shutil.ignore_patterns("server.log"))
    return model_id


def refusal(folder: Path, model: Path, **settings: Any) -> str:
    """The last line of a server that does not start; its exit code is 2."""
    with pytest.raises(ServerFailed) as failed, serving(folder, model, **settings):
        pass
    assert "exit code 2" in str(failed.value)
    lines = str(failed.value).strip().splitlines()
    assert "Traceback" not in str(failed.value)
    return lines[-1]


def another(folder: Path, **overrides: Any) -> Path:
    return make_qwen3(folder, seed=7, tokenizer=False, **overrides)


def test_another_base_is_refused_before_anything_runs(trained: str, tiny_qwen3: Path, tmp_path: Path):
    """Of the same shapes, of others, and with other files under the same path; then the first one goes on."""
    same_shapes = another(tmp_path / "same-shapes")
    other_shapes = another(tmp_path / "other-shapes", hidden_size=32, vocab_size=200, eos_token_id=1)
    for model in (same_shapes, other_shapes):
        line = refusal(tmp_path / "data", model)
        assert str(model) in line and str(tiny_qwen3) in line
    with serving(tmp_path / "data", shutil.copytree(tiny_qwen3, tmp_path / "moved")) as server:
        assert "metrics" in Client(server).optim_step(trained, 3)
    make_qwen3(tmp_path / "moved", seed=8, tokenizer=False)
    assert "other files than before" in refusal(tmp_path / "data", tmp_path / "moved")


def test_a_run_of_the_old_base_is_only_listed_after_another_was_adopted(trained: str, tiny_qwen3: Path, tmp_path: Path):
    other = another(tmp_path / "other")
    path = f"tinker://{trained}/weights/kept"
    with serving(tmp_path / "data", other, environ={"TX_ADOPT": "1"}) as server:
        client = Client(server)
        assert client.training_runs() == [trained]
        for answer in (
            client.optim_step(trained, 3),
            client.save_weights(trained, 4, "more"),
            client.load_weights(path),
        ):
            assert answer["category"] == "user", answer
            assert str(tiny_qwen3) in answer["error"] and str(other) in answer["error"], answer
        status, body = client.create_sampler(path)
        assert status == 400 and str(tiny_qwen3) in json.dumps(body)
        assert "metrics" in client.optim_step(client.create_model(str(other)), 1)
    assert str(other) in refusal(tmp_path / "data", tiny_qwen3)  # adopting is not remembered
    with serving(tmp_path / "data", tiny_qwen3, adopt="true") as server:
        assert "metrics" in Client(server).optim_step(trained, 5)


def test_a_data_dir_that_moved_with_its_storage_needs_nothing(trained: str, tiny_qwen3: Path, tmp_path: Path):
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    with serving(tmp_path / "elsewhere", tiny_qwen3) as server:
        assert "metrics" in Client(server).optim_step(trained, 3)


def test_another_storage_is_refused_in_one_line_that_names_both(
    trained: str, first_server: tuple[str, Path], tiny_qwen3: Path, tmp_path: Path
):
    ensure_identity_sync(Store(tmp_path / "other"))
    line = refusal(tmp_path / "data", tiny_qwen3, checkpoints_base=str(tmp_path / "other"))
    assert str(tmp_path / "other") in line and str(first_server[1] / "checkpoints") in line


def test_a_storage_that_is_away_is_waited_for_and_costs_no_run(trained: str, tiny_qwen3: Path, tmp_path: Path):
    """Gone as a share that is not mounted is: an empty folder. The server starts, says so, and writes nothing there;
    the run waits, and goes on when the storage is back."""
    share, away = tmp_path / "data" / "checkpoints", tmp_path / "away"
    share.rename(away)
    share.mkdir()
    with serving(tmp_path / "data", tiny_qwen3, ready=False) as server:
        wait_until(lambda: "attached" in server.log() or "is ready" in server.log())
        status, body = server.get("/api/v1/healthz")
        assert status == 503 and str(share) in json.dumps(body)
        client = Client(server)
        step = client.submit("optim_step", model_id=trained, seq_id=3, adam_params={"learning_rate": 0.01})
        wait_until(lambda: "The server waits for its storage" in server.log())
        time.sleep(2.0)  # the worker has been asked for the run's snapshot, in vain
        assert list(share.iterdir()) == []
        share.rmdir()
        away.rename(share)
        assert "metrics" in client.result(step)
        server.wait_ready()
    assert run_status(tmp_path / "data") == ["live"]


def test_a_storage_that_goes_away_under_a_running_server_costs_no_run(trained: str, tiny_qwen3: Path, tmp_path: Path):
    """The run's snapshot and checkpoint cannot be found for a while: that is no answer."""
    share, away = tmp_path / "data" / "checkpoints", tmp_path / "away"
    with serving(tmp_path / "data", tiny_qwen3) as server:
        client = Client(server)
        share.rename(away)
        step = client.submit("optim_step", model_id=trained, seq_id=3, adam_params={"learning_rate": 0.01})
        time.sleep(2.0)
        away.rename(share)
        assert "metrics" in client.result(step)
        assert "path" in client.load_weights(f"tinker://{trained}/weights/kept")
    assert run_status(tmp_path / "data")[0] == "live"


def run_status(data_dir: Path) -> list[str]:
    async def read() -> list[str]:
        journal = Journal(SqliteDriver(data_dir / "tx_async.db"))
        records = await journal.open()
        await journal.close()
        return [record.status for record in records if isinstance(record, ModelRecord)]

    return asyncio.run(read())


def test_a_storage_that_was_lost_is_replaced_with_adopt(trained: str, tiny_qwen3: Path, tmp_path: Path):
    shutil.rmtree(tmp_path / "data" / "checkpoints")
    with serving(tmp_path / "data", tiny_qwen3, adopt="true") as server:
        client = Client(server)
        assert "metrics" in client.optim_step(client.create_model(str(tiny_qwen3)), 1)
    assert (tmp_path / "data" / "checkpoints" / IDENTITY).exists()
