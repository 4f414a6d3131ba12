"""The server as others reach it: over TLS, with keys that come and go, by names and from pages."""

import json
import os
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
import pytest

from tests.support.chat_templates import QWEN3, make_chat_tokenizer
from tests.support.durability import serving
from tx_async import keys
from tx_async.api.key_file import read_keys
from tx_async.config import ServerConfig
from tx_async.errors import ConfigError
from tx_async.scheduler.scheduler import STOPPING
from tx_async.serve import _hypercorn_settings

needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificates")


def make_certificate(folder: Path, *options: str) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = [
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2",
        "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert,
    ]  # fmt: skip
    subprocess.run([*command, *(options or ("-nodes",))], check=True, capture_output=True)
    return cert, key


@needs_openssl
def test_a_server_speaks_https_and_follows_its_keys(tiny_qwen3, tmp_path):
    """Over TLS, and with a file of keys that changes while it runs."""
    cert, key = make_certificate(tmp_path / "tls")
    file = tmp_path / "keys"
    alice, ops = keys.add(file, "alice"), keys.add(file, "ops", "admin")
    settings = {"tls_cert": cert, "tls_key": key, "api_keys_file": file}
    with serving(tmp_path / "data", tiny_qwen3, **settings) as server:
        assert server.base_url.startswith("https://") and server.tls
        with httpx.Client(base_url=server.base_url, verify=server.tls) as http:

            def status(path: str, key: str = "", **headers: str) -> int:
                return http.get(path, headers={"x-api-key": key, **headers}).status_code

            assert status("/api/v1/training_runs", alice) == 200
            assert status("/api/v1/training_runs", authorization=f"Bearer {alice}") == 200
            assert status("/metrics") == 200  # this machine
            assert status("/metrics", host="api.example") == 401
            assert status("/metrics", alice, host="api.example") == 403
            assert status("/metrics", ops, host="api.example") == 200
            bob = keys.add(file, "bob")
            assert status("/api/v1/training_runs", bob) == 200
            keys.revoke(file, "alice")
            assert status("/api/v1/training_runs", alice) == 401
            assert status("/api/v1/training_runs", bob) == 200
            me = http.get("/api/v1/auth/apikey/me", headers={"x-api-key": bob}).json()
            assert me["name"] == "bob"
            new_cert, new_key = make_certificate(tmp_path / "renewed")
            os.replace(new_key, key)  # a renewal replaces one file after the other
            assert httpx.get(f"{server.base_url}/metrics", verify=server.tls).status_code == 200
            trusts_new = ssl.create_default_context(cafile=new_cert)
            os.replace(new_cert, cert)
            assert httpx.get(f"{server.base_url}/metrics", verify=trusts_new).status_code == 200
            with pytest.raises(httpx.ConnectError, match="certificate"):
                httpx.get(f"{server.base_url}/metrics", verify=server.tls)
            assert status("/api/v1/training_runs", bob) == 200  # on its open connection
        with pytest.raises(httpx.HTTPError):  # no plain HTTP on the same port
            httpx.get(server.base_url.replace("https", "http") + "/api/v1/healthz")
    assert "BEGIN" not in server.log() and bob not in server.log()
    assert "the previous certificate stays" in server.log() and "were read again" in server.log()
    assert [key.name for key in read_keys(file).values()] == ["ops", "bob"]


@needs_openssl
def test_certificates_that_cannot_be_used_are_refused_at_start(tmp_path):
    cert, key = make_certificate(tmp_path / "one")
    _, other = make_certificate(tmp_path / "two")
    _, locked = make_certificate(tmp_path / "three", "-passout", "pass:secret")
    refusals = [
        ({"tls_cert": cert}, "belong together"),
        ({"tls_key": key}, "belong together"),
        ({"tls_cert": cert, "tls_key": other}, "cannot be used"),
        ({"tls_cert": cert, "tls_key": locked}, "passphrase"),
        ({"tls_cert": tmp_path / "none", "tls_key": key}, "No such file"),
        ({"tls_cert": key, "tls_key": cert}, "cannot be used"),
    ]
    for settings, reason in refusals:
        with pytest.raises(ConfigError, match=reason):
            _hypercorn_settings(msgspec.convert({name: str(path) for name, path in settings.items()}, ServerConfig))
    assert _hypercorn_settings(ServerConfig(tls_cert=str(cert), tls_key=str(key))).ssl_enabled


def test_a_page_from_elsewhere_cannot_use_a_keyless_server(tiny_qwen3, tmp_path):
    with serving(tmp_path, tiny_qwen3) as server:
        for path in ("/api/v1/training_runs", "/metrics", "/api/v1/healthz", "/nowhere"):
            assert httpx.get(server.base_url + path, headers={"host": "evil.example"}).status_code == 403
        create = server.base_url + "/api/v1/create_session"
        body = {"tags": [], "user_metadata": {}}
        assert httpx.post(create, json=body, headers={"origin": "https://evil.example"}).status_code == 403
        assert httpx.post(create, content=b'{"tags": []}', headers={"content-type": "text/plain"}).status_code == 200


def test_ctrl_c_with_open_polls_prints_no_traceback(tiny_qwen3, tmp_path):
    """Polls are cut, the worker leaves in order, and the log says only what happened."""
    with serving(tmp_path, tiny_qwen3) as server:
        _, session = server.post("/api/v1/create_session", tags=[])
        model = {"session_id": session["session_id"], "model_seq_id": 0, "base_model": str(tiny_qwen3)}
        _, created = server.post("/api/v1/create_model", **model, lora_config={"rank": 8})
        # Its predecessors never come, so its result does not either.
        _, promise = server.post("/api/v1/save_weights", model_id=created["model_id"], seq_id=5, path="one")
        with ThreadPoolExecutor(5) as threads:
            polls = [threads.submit(poll, server.base_url, promise["request_id"]) for _ in range(5)]
            wait_until(lambda: b"scheduler_polls_waiting 5" in httpx.get(f"{server.base_url}/metrics").content)
            assert server.stop() == 0
        assert not [end.result() for end in polls if end.result() in (200, 400, 404, 410)], "none has a result"
    log = server.log()
    assert "Traceback" not in log and "is lost" not in log and "ERROR" not in log, log


def poll(base_url: str, request_id: str) -> int:
    """The status; 0 when the connection was cut."""
    headers = {"x-api-key": "tml-dummy"}
    try:
        answer = httpx.post(
            f"{base_url}/api/v1/retrieve_future", json={"request_id": request_id}, headers=headers, timeout=30
        )
    except httpx.HTTPError:
        return 0
    return answer.status_code


def wait_until(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


LIVE_REQUESTS = [
    ("/v1/completions", {"prompt": "Hi", "n": 3}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}]}),
]


def test_live_answers_end_at_the_signal_and_say_to_try_again(tiny_qwen3, tmp_path):
    """Streams by an event, the others by a 503, all in the form of their API."""
    model = make_chat_tokenizer(shutil.copytree(tiny_qwen3, tmp_path / "model"), QWEN3)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": []}))  # no answer ends by itself
    slow, num_begun = {"FAKE_ENGINE": '{"command_ms": 500}'}, threading.Semaphore(0)
    with serving(tmp_path / "data", model, environ=slow) as server, ThreadPoolExecutor(8) as threads:
        fields = {"model": str(model), "max_tokens": 200}
        streamed = threads.map(lambda ask: listen(server.base_url + ask[0], ask[1] | fields, num_begun), LIVE_REQUESTS)
        whole = threads.map(lambda ask: server.post(ask[0], 60, **ask[1], **fields), LIVE_REQUESTS)
        assert num_begun.acquire(timeout=30) and num_begun.acquire(timeout=30)
        wait_until(lambda: b"scheduler_samples_open 4" in httpx.get(f"{server.base_url}/metrics").content)
        assert server.process is not None
        server.process.terminate()
        for status, answer in whole:
            assert status == 503 and "Try again" in answer["error"]["message"], answer
        openai, anthropic = streamed
        assert server.process.wait(30) == 0
    error = json.loads(openai[-1].removeprefix("data: "))["error"]
    assert error["message"] == STOPPING
    name, data = anthropic[-2:]
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"] == {"type": "overloaded_error", "message": STOPPING}
    assert "Traceback" not in server.log() and "ERROR" not in server.log(), server.log()


def listen(url: str, body: dict[str, object], num_begun: threading.Semaphore) -> list[str]:
    """The lines of a stream that ends in order."""
    with httpx.stream("POST", url, json=body | {"stream": True}, headers={"x-api-key": "tml-a"}, timeout=60) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        num_begun.release()
        return [line for line in (first, *lines) if line]
