"""Models by their hub name: the real `huggingface_hub` against a hub of our own on loopback, which cuts connections."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tx_async.testing.models import QWEN3_TINY, make_model, random_tensors

CHUNK_BYTES = 2**14
SCRIPT = Path(__file__).with_name("fetch_from_hub.py")
DOUBLES = ("consolidated.safetensors", "the-same-once-more.safetensors", "original/model.safetensors")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


class Hub(ThreadingHTTPServer):
    """Serves the folder of a model under every name; what is wrong with a name is in the name."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        #: (method, name, file, Range) of every request for a file
        self.log: list[tuple[str, str, str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def downloads(self, name: str, file: str) -> list[str]:
        """The ranges of a file that were asked for."""
        return [range_ for method, *what, range_ in self.log if method == "GET" and what == [name, file]]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/").split("/")
        if "absent" in path:
            return self.refuse(404, "RepoNotFound")
        if path[0] == "api":
            return self.api(path[2], path[3])
        return self.file(path[0], path[-1])

    do_HEAD = do_GET

    def api(self, name: str, what: str) -> None:
        files = [file for file in self.server.files if (name, file) != ("lacking", SHARDS[1])]
        if what == "revision":
            return self.answer({"id": name, "sha": "a" * 40, "siblings": [{"rfilename": file} for file in files]})
        sizes = {file: len(self.server.files[file]) for file in files}
        return self.answer([{"type": "file", "path": f, "size": n, "oid": etag(f)} for f, n in sizes.items()])

    def file(self, name: str, file: str) -> None:
        self.server.log.append((self.command, name, file, self.headers.get("Range", "")))
        first = len(self.server.downloads(name, file)) == 1
        if name == "gated":
            return self.refuse(403, "GatedRepo")
        if name == "failing" and file == SHARDS[1] and self.command == "GET" and first:
            return self.refuse(500, "")
        content = self.server.files[file]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.headers_of(len(content) - start, {"ETag": f'"{etag(file)}"', "X-Repo-Commit": "a" * 40})
        if self.command == "GET":
            cut = name == "cut" and file == SHARDS[1] and first
            self.wfile.write(content[start : len(content) // 2 if cut else None])
            self.close_connection = cut

    def answer(self, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.headers_of(len(content), {"Content-Type": "application/json"})
        self.wfile.write(content)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.headers_of(0, {"X-Error-Code": code})

    def headers_of(self, length: int, headers: dict[str, str]) -> None:
        for name, value in ({"Content-Length": str(length)} | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def etag(file: str) -> str:
    return hashlib.sha1(file.encode()).hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model in two shards."""
    from safetensors.numpy import save_file

    folder = make_model(tmp_path_factory.mktemp("hub") / "model", QWEN3_TINY, tokenizer=False)
    (folder / "model.safetensors").unlink()
    tensors = random_tensors(QWEN3_TINY)
    weight_map = {name: SHARDS[i % 2] for i, name in enumerate(tensors)}
    for shard in SHARDS:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def hub(folder):
    with Hub(folder) as hub:
        hub.files |= dict.fromkeys(DOUBLES, b"the same weights once more")
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def found(hub, folder, tmp_path_factory) -> dict[str, dict]:
    """What one process found under each name, and another one without the hub."""
    cache = tmp_path_factory.mktemp("cache")
    names = ["cut", "failing", "failing", "absent", "gated", "lacking"]
    online = run(cache, hub.url, str(folder), *names)
    offline = run(cache, "http://127.0.0.1:9", "cut", "never-seen")
    keys = ["folder", "cut", "failing", "failing, again", "absent", "gated", "lacking", "cut, offline", "unreachable"]
    return dict(zip(keys, online + offline, strict=True))


def run(cache: Path, endpoint: str, *names: str) -> list[dict]:
    hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment = os.environ | hub | {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, str(SCRIPT), str(CHUNK_BYTES), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_download_that_was_cut_off_goes_on_where_it_stopped(hub, found):
    first, second = hub.downloads("cut", SHARDS[1])
    assert first == "" and second.startswith("bytes=")
    served = len(hub.files[SHARDS[1]]) // 2
    assert served - CHUNK_BYTES < int(second.removeprefix("bytes=").removesuffix("-")) <= served
    assert found["cut"] == found["folder"] and "digest" in found["cut"]


def test_the_next_start_fetches_only_what_is_missing(hub, found):
    assert "Complete files are kept" in found["failing"]["error"]
    assert found["failing, again"] == found["folder"]
    assert len(hub.downloads("failing", SHARDS[0])) == len(hub.downloads("failing", "config.json")) == 1
    assert len(hub.downloads("failing", SHARDS[1])) == 2


def test_of_the_weights_only_the_files_of_the_index_are_fetched(hub, found):
    assert "digest" in found["cut"]
    fetched = {file for method, name, file, _ in hub.log if (method, name) == ("GET", "cut")}
    assert {file for file in fetched if file.endswith(".safetensors")} == set(SHARDS)


def test_what_is_in_the_cache_loads_without_the_hub(found):
    assert found["cut, offline"] == found["folder"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "absent is neither a folder here nor a model on http://127.0.0.1:"),
        ("gated", "gated is gated: accept its terms on http://127.0.0.1:"),
        ("lacking", f"lacks {SHARDS[1]}"),
        (
            "unreachable",
            "never-seen is not a folder here, nor complete in the cache, and http://127.0.0.1:9 cannot be reached",
        ),
    ],
)
def test_errors_say_what_is_missing(found, name, message):
    assert message in found[name]["error"]
    assert "\n" not in found[name]["error"]
