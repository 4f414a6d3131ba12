"""What `healthz?verbose` and `doctor` know: storage, journal, workers, disk and memory."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.support.durability import serving
from tx_async import base_model, doctor, health
from tx_async.config import ServerConfig
from tx_async.engine.devices import NOT_HERE
from tx_async.errors import StorageError
from tx_async.health import Finding, Health, probe_storage, within
from tx_async.journal.factory import open_journal
from tx_async.storage.identity import ensure_identity_sync
from tx_async.storage.store import Store
from tx_async.wire.records import IdentityRecord, KnownBase, KnownStorage, Put


def test_storage_is_written_read_and_cleared(tmp_path):
    assert probe_storage(Store(tmp_path)).state == "ok"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("[Errno 28] No space left on device", "the disk is full"),
        ("Client error with status 404 Not Found: <Code>NoSuchBucket</Code>", "the bucket is missing"),
        ("Client error with status 403 Forbidden: SignatureDoesNotMatch", "the credentials are wrong"),
        ("RequestTimeTooSkewed: 900 s", "the clocks differ"),
        ("[Errno 30] Read-only file system", "this user may not write there"),
        ("error sending request for url", "it does not answer"),
    ],
)
def test_what_is_wrong_is_said_in_an_operators_words(message, cause, tmp_path, monkeypatch):
    store = Store(tmp_path)

    def refuse(key, data):
        raise StorageError(f"{key} could not be written in {tmp_path}: {message}")

    monkeypatch.setattr(store, "put_sync", refuse)
    found = probe_storage(store)
    assert found.state == "problem" and found.text.startswith(f"{cause}: ") and message in found.text


def test_a_clock_that_differs_and_a_storage_that_lies_are_noticed(tmp_path, monkeypatch):
    store = Store(tmp_path)
    now = time.time()
    monkeypatch.setattr(health.time, "time", lambda: now + 3600)
    assert "differ by -3600 s" in probe_storage(store).text
    monkeypatch.setattr(store, "get_sync", lambda key: b"other")
    assert probe_storage(store).state == "problem"


def test_a_probe_that_hangs_has_failed():
    started = time.monotonic()
    found = within(0.2, lambda: time.sleep(5) or Finding("ok", ""))
    assert found.state == "problem" and "does not answer" in found.text and time.monotonic() - started < 4


async def test_who_asks_again_at_once_gets_the_same_answer(tmp_path):
    writes = []

    async def write() -> None:
        writes.append(1)

    waiting = ["worker w0.0: starting"]
    asked = Health(Store(tmp_path / "c"), tmp_path, write, lambda in_full: waiting)
    first = await asked.report()
    assert {name: found.state for name, found in first.items()} == {
        "storage": "ok", "journal": "ok", "disk": "ok", "memory": "ok", "worker": "problem",
    }  # fmt: skip
    waiting.clear()
    assert (await asked.report())["worker"].state == "ok" and len(writes) == 1

    async def refuse() -> None:
        raise StorageError("the disk is full")

    broken = await Health(Store(tmp_path / "c"), tmp_path, refuse, lambda in_full: []).report()
    assert broken["journal"] == Finding("problem", "the disk is full")


async def test_a_worker_that_has_missed_heartbeats_is_a_warning(tmp_path):
    async def write() -> None:
        pass

    silence = {"w0": "worker w0.0: silent for 12 s"}
    found = (await Health(Store(tmp_path / "c"), tmp_path, write, lambda in_full: [], lambda: silence).report())[
        "worker"
    ]
    assert found.state == "warning" and "silent for 12 s" in found.text and "worker_lease_ms" in found.text


async def test_an_engine_outside_that_is_not_attached_is_a_warning(tmp_path):
    async def write() -> None:
        pass

    lines = ["worker vllm-a.0 exited with code 3 (last said: other weights)", "worker vllm-b.0: starting"]
    asked = Health(Store(tmp_path / "c"), tmp_path, write, lambda in_full: [], external=lambda in_full: lines)
    assert (await asked.report())["external"] == Finding("warning", "; ".join(lines))
    lines = []
    assert (await asked.report())["external"].state == "ok"


def test_healthz_of_a_server_says_each(tiny_qwen3, tmp_path):
    with serving(tmp_path, tiny_qwen3) as server:
        healthz = f"{server.base_url}/api/v1/healthz"
        assert httpx.get(f"{healthz}?live").json() == {"status": "ok"}
        answer = httpx.get(f"{healthz}?verbose", timeout=20)
        assert answer.status_code == 200, answer.text
        checks = answer.json()["checks"]
        assert set(checks) == {"storage", "journal", "disk", "memory", "worker"}
        assert all(check["state"] in ("ok", "warning") and check["text"] for check in checks.values())


def test_doctor_warns_of_a_kernel_that_failed_its_self_test():
    uses = [("decode attention", "paged_attention", ""), ("prefill attention", "plain", "latent attention")]
    found = doctor._with_kernels("JAX, platform gpu", uses)
    assert found.state == "ok" and "prefill attention: plain (latent attention)" in found.text
    found = doctor._with_kernels("JAX, platform gpu", [*uses, ("experts", "plain", NOT_HERE)])
    assert found.state == "warning" and "experts: plain" in found.text


def test_doctor_names_folders_that_cannot_be_made(tmp_path):
    config = ServerConfig(data_dir="/proc/nope")
    for check in (doctor._disk, doctor._compilation_cache):
        found = check(config)
        assert found.state == "problem" and "/proc/nope" in found.text


@pytest.mark.parametrize(
    ("check", "settings", "named"),
    [
        (doctor._settings, {"external_inference_url": "foo"}, "external_inference_url"),
        (doctor._settings, {"tls_cert": "cert.pem"}, "tls_key"),
        (doctor._settings, {"log_level": "loud"}, "log_level"),
        (doctor._settings, {"port": 70000}, "70000"),
        (doctor._database, {"data_dir": "/proc/nope"}, "/proc/nope"),
        (doctor._storage, {"data_dir": "/proc/nope"}, "/proc/nope"),
    ],
)
def test_doctor_refuses_what_serve_refuses(check, settings, named):
    found = check(ServerConfig(**settings))
    assert found.state == "problem" and named in found.text


def test_doctor_knows_whether_journal_base_and_storage_belong_together(tiny_qwen3, tmp_path):
    """Nothing is changed by asking: neither the journal's identity nor the storage, which gets none."""
    config = ServerConfig(base_model=str(tiny_qwen3), data_dir=str(tmp_path))
    fingerprint = base_model.read(config.base_model, "", config.backend_config).fingerprint
    storage = Path(config.resolved_checkpoints_base)
    storage.mkdir()

    def found(base: str, storage_id: str) -> Finding:
        known = KnownBase(fingerprint=base, name="m", path="/models/m", since=1.0)
        stored = KnownStorage(storage_id=storage_id, address="/elsewhere")
        asyncio.run(write(IdentityRecord(journal_id="j", bases=(known,), storage=stored)))
        return doctor._identity(config)

    async def write(record: IdentityRecord) -> None:
        journal = open_journal(config)
        await journal.open()
        await journal.commit([Put(record)])
        await journal.close()

    other = found("another", "s")
    assert other.state == "problem" and "/models/m" in other.text and "--adopt" in other.text
    assert found(fingerprint, "s").text.startswith(f"{storage} is empty, or not mounted")
    assert doctor._storage(config).state == "ok" and not list(storage.iterdir())
    own = ensure_identity_sync(Store(storage))
    assert "/elsewhere" in found(fingerprint, "s").text and found(fingerprint, own).state == "ok"


def test_doctor_tries_the_storage(tmp_path, monkeypatch):
    """A bucket behind a port where nobody listens: a problem, within 15 s."""
    environ = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true",
    }  # fmt: skip
    code = "\n".join([
        "import time; from tx_async import doctor; from tx_async.config import ServerConfig; began = time.time()",
        "found = doctor._storage(ServerConfig(checkpoints_base='s3://bucket/x'))",
        "print(found.state, time.time() - began < 15, found.text)",
    ])  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environ, timeout=60
    )
    assert done.stdout.startswith("problem True it does not answer"), done.stdout + done.stderr
