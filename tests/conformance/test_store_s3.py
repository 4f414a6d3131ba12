"""The store against a real S3 server (moto's, on loopback): what every kind of storage does, and what only a server on
the network goes through: errors of its own, keys that are wrong, a bucket that is not there, no answer at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tx_async.errors import NotFound, StorageError
from tx_async.storage import checkpoint_files as checkpoints
from tx_async.storage.identity import ensure_identity_sync
from tx_async.storage.store import Store

moto_server = pytest.importorskip("moto.server", reason="moto is not installed")

RUN = "s-12:train:0"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The address of a new bucket; the environment is what an operator would set."""
    configure(monkeypatch, endpoint)
    name = f"b{abs(hash(request.node.name)) % 10**12}"
    import urllib.request

    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT"), timeout=30).close()
    return f"s3://{name}/checkpoints"


def configure(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    settings = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


def test_put_get_list_delete(bucket: str):
    store = Store(bucket)
    store.put_many_sync({f"{RUN}/weights/a": b"12345", "other/ünï 名": b"x"})
    assert store.get_sync(f"{RUN}/weights/a") == b"12345" and store.get_sync("other/ünï 名") == b"x"
    assert [(entry.key, entry.num_bytes) for entry in store.list_sync(RUN)] == [(f"{RUN}/weights/a", 5)]
    store.copy_sync(f"{RUN}/weights/a", "b/c")
    assert store.get_sync("b/c") == b"12345"
    with pytest.raises(NotFound):
        store.get_sync("b/d")
    store.delete_sync("b/c")
    store.delete_sync("b/c")
    with pytest.raises(NotFound):
        store.get_sync("b/c")


def test_checkpoints_and_large_objects_come_back_equal(bucket: str):
    store = Store(bucket)
    data = bytes(range(256)) * 2**16  # in several parts
    checkpoints.write_checkpoint_sync(store, f"{RUN}/weights/a~1", {"adapter.bin": data}, {"kind": "training"})
    metadata, files = checkpoints.read_checkpoint_sync(store, f"{RUN}/weights/a~1")
    assert metadata == {"kind": "training"} and files == {"adapter.bin": data}
    assert b"".join(store.stream_sync(f"{RUN}/weights/a~1/adapter.bin")) == data


def test_the_bucket_has_one_identity(bucket: str):
    store = Store(bucket)
    store.storage_id = ensure_identity_sync(store)
    assert ensure_identity_sync(Store(bucket)) == store.storage_id
    with pytest.raises(NotFound):
        store.get_sync("a/b")


def test_a_missing_bucket_is_an_outage_that_says_so(endpoint: str, monkeypatch: pytest.MonkeyPatch):
    """Reading from it looks like "not found", and is not where an identity is known."""
    configure(monkeypatch, endpoint)
    store = Store("s3://nowhere-at-all/checkpoints", "known")
    with pytest.raises(StorageError, match="nowhere-at-all"):
        store.put_sync("a/b", b"x")
    for ask in (store.get_sync, lambda key: b"".join(store.stream_sync(key))):
        with pytest.raises(StorageError, match="is away"):
            ask("a/b")


# ---- servers that fail


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The statuses that the next requests are answered with; the last one stays."""
    statuses: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            self.rfile.read(length)
            status = statuses.pop(0) if len(statuses) > 1 else statuses[0]
            self.send_response(status)
            self.send_header("content-length", "0")
            self.send_header("etag", '"x"')
            self.end_headers()

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    configure(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield statuses
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_500_that_passes_is_not_noticed(failing: list[int]):
    failing += [500, 503, 200]
    Store("s3://b/c").put_sync("a/b", b"x")
    assert failing == [200]


@pytest.mark.parametrize("status", [500, 403])
def test_errors_that_stay_are_storage_errors_within_seconds(failing: list[int], status: int):
    """500: after a few tries. 403 (wrong keys): at once. Neither is "not found"."""
    failing += [status]
    store = Store("s3://b/c")
    for ask in (store.get_sync, store.list_sync, lambda key: store.put_sync(key, b"x")):
        with pytest.raises(StorageError, match="s3://b/c"):
            ask("a/b")


def test_nobody_who_answers_is_a_storage_error(monkeypatch: pytest.MonkeyPatch):
    configure(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="s3://b/c"):
        Store("s3://b/c").get_sync("a/b")
