"""`running_server()`: a real server process for a test, a benchmark or the demo.

It runs `python -m tx_async.cli serve …` on a free loopback port, with everything durable in one folder, and is stopped
as an operator would stop it: SIGINT, then a bounded wait.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from tx_async.private import opener

HEALTHZ = "/api/v1/healthz"
READY_S = 180.0
STOP_S = 30.0
LOG_TAIL_LINES = 40

Waiting = Callable[[str], None]
"""Told what the server is waiting for, while it starts."""


class ServerFailed(AssertionError):
    """The server ended, or never became ready; the message carries the tail of its log."""


@dataclass
class ServerProcess:
    """One server process. After `kill()` or `stop()`, `start()` brings it back on the same port and folder."""

    base_url: str
    port: int
    data_dir: Path
    log_path: Path
    command: list[str]
    environ: dict[str, str]
    #: the newest process; None before the first start
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    #: trusts the server's own certificate, where it has one
    tls: ssl.SSLContext | None = field(default=None, repr=False)

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    def start(self) -> None:
        with open(self.log_path, "ab", opener=opener) as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self.environ
            )

    def get(self, path: str, timeout_s: float = 5.0) -> tuple[int, Any]:
        """(status, decoded JSON) of a GET; status 0 while nobody listens."""
        try:
            with urllib.request.urlopen(self.base_url + path, timeout=timeout_s, context=self.tls) as response:
                return response.status, msgspec.json.decode(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, msgspec.json.decode(error.read())
        except OSError:
            return 0, None

    def post(self, path: str, /, timeout_s: float = 10.0, **body: Any) -> tuple[int, Any]:
        """(status, decoded JSON) of a POST of JSON, sent once; status 0 when there was no answer."""
        headers = {"Content-Type": "application/json", "X-API-Key": "tml-dummy"}
        request = urllib.request.Request(self.base_url + path, msgspec.json.encode(body), headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s, context=self.tls) as response:
                return response.status, msgspec.json.decode(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, msgspec.json.decode(error.read())
        except (OSError, http.client.HTTPException):
            return 0, None

    def wait_accepting(self, timeout_s: float = READY_S) -> None:
        """Until the server answers at all. Raises `ServerFailed`."""
        self._wait(lambda status: status > 0, timeout_s, None)

    def wait_ready(self, timeout_s: float = READY_S, waiting: Waiting | None = None) -> None:
        """Until healthz answers 200. Raises `ServerFailed`."""
        self._wait(lambda status: status == 200, timeout_s, waiting)

    def _wait(self, enough: Callable[[int], bool], timeout_s: float, waiting: Waiting | None) -> None:
        deadline = time.monotonic() + timeout_s
        status, answer = 0, None
        while time.monotonic() < deadline:
            if self.process and self.process.poll() is not None:
                raise ServerFailed(f"The server ended with exit code {self.process.returncode}.\n{self.log_tail()}")
            status, answer = self.get(HEALTHZ)
            if enough(status):
                return
            if waiting:
                waiting(_waiting_for(answer))
            time.sleep(0.05)
        raise ServerFailed(f"healthz answered {status} {answer} after {timeout_s} s.\n{self.log_tail()}")

    def stop(self, timeout_s: float = STOP_S) -> int:
        """SIGINT and wait; returns the exit code. Raises `ServerFailed` (and kills it) when it does not end in time."""
        assert self.process
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ServerFailed(f"The server did not stop within {timeout_s} s.\n{self.log_tail()}") from None

    def kill(self) -> None:
        """kill -9: what a crash looks like."""
        assert self.process
        self.process.kill()
        self.process.wait()

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def log_tail(self) -> str:
        return "\n".join(self.log().splitlines()[-LOG_TAIL_LINES:])


@contextlib.contextmanager
def running_server(
    base_model: str | Path,
    *,
    data_dir: str | Path | None = None,
    backend_config: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    ready: bool = True,
    waiting: Waiting | None = None,
    **settings: Any,
) -> Iterator[ServerProcess]:
    """Start a server, yield it once healthz answers 200 (`ready=False`: as soon as the process exists), stop it.

    `settings` are fields of `ServerConfig`. Without `data_dir` everything lives in a temporary folder. The compilation
    cache is the one that JAX_COMPILATION_CACHE_DIR names, when it is set.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(data_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="tx_async-")))
        folder.mkdir(parents=True, exist_ok=True)
        server = _server(Path(folder), base_model, dict(backend_config or {}), dict(environ or {}), settings)
        server.start()
        try:
            if ready:
                server.wait_ready(waiting=waiting)
            yield server
        except BaseException:
            _end(server)
            raise
        code = server.stop()
        if code not in (0, -signal.SIGKILL):
            raise ServerFailed(f"The server ended with exit code {code}.\n{server.log_tail()}")


def _server(
    folder: Path, base_model: str | Path, backend: dict[str, Any], environ: dict[str, str], settings: dict[str, Any]
) -> ServerProcess:
    port = settings.pop("port", None) or free_port()
    if cache := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        settings = {"compilation_cache_dir": cache} | settings
    settings = {"base_model": str(base_model), "data_dir": str(folder), "port": port} | settings
    if backend:
        settings["backend_config"] = msgspec.json.encode(backend).decode()
    flags = [part for name, value in settings.items() for part in ("--" + name.replace("_", "-"), str(value))]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TX_")}
    cert = settings.get("tls_cert")
    return ServerProcess(
        base_url=f"http{'s' if cert else ''}://127.0.0.1:{port}",
        tls=ssl.create_default_context(cafile=cert) if cert else None,
        port=port,
        data_dir=folder,
        log_path=folder / "server.log",
        command=[sys.executable, "-m", "tx_async.cli", "serve", *flags],
        environ=inherited | environ,
    )


def _end(server: ServerProcess) -> None:
    """Something else failed already: stop, and let that be the error."""
    with contextlib.suppress(ServerFailed):
        server.stop()


def _waiting_for(answer: Any) -> str:
    if not isinstance(answer, dict):
        return "the server"
    reasons = answer.get("waiting_for") or answer.get("status") or answer
    return ", ".join(map(str, reasons)) if isinstance(reasons, list) else str(reasons)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
