"""An unreliable network between the SDK and the server: an HTTP proxy that repeats, delays and reorders requests, and
cuts connections before or after the server has answered."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from tx_async.testing.server import free_port

HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}
POLLS = ("/retrieve_future", "/session_heartbeat")
RENUMBERED = "/save_weights_for_sampler"
"""The SDK gives it another sampling session in each attempt: the first answer is always lost."""


@dataclass
class Mischief:
    """How often each thing happens to a request that changes something; and how often it has."""

    seed: int
    repeat: float = 0.2
    delay: float = 0.3
    delay_s: float = 0.2
    cut_before: float = 0.1
    cut_after: float = 0.1
    done: dict[str, int] = field(default_factory=dict)
    has_lost_save: bool = False

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.lock = threading.Lock()

    def happens(self, name: str) -> bool:
        with self.lock:
            happens = self.random.random() < getattr(self, name)
            self.done[name] = self.done.get(name, 0) + happens
            return happens


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    target_port: int
    mischief: Mischief

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        mischief = self.mischief
        is_poll = self.path.endswith(POLLS)
        if not is_poll and mischief.happens("delay"):
            time.sleep(mischief.random.random() * mischief.delay_s)  # others overtake it
        if not is_poll and mischief.happens("cut_before"):
            return self._cut()
        answer = self._forward(body)
        if not is_poll and mischief.happens("repeat"):
            answer = self._forward(body) or answer
        is_first = self.path.endswith(RENUMBERED) and not mischief.has_lost_save
        mischief.has_lost_save |= is_first and answer is not None
        if answer is None or is_first or mischief.happens("cut_after"):
            return self._cut()
        self._answer(*answer)

    do_GET = do_POST

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes] | None:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_HEADERS}
        connection = http.client.HTTPConnection("127.0.0.1", self.target_port, timeout=60)
        try:
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        with contextlib.suppress(OSError):
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in HOP_HEADERS:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        pass  # connections that were cut


@contextlib.contextmanager
def unreliable(target_port: int, mischief: Mischief) -> Iterator[str]:
    """The proxy's base URL."""
    handler = type("Handler", (_Handler,), {"target_port": target_port, "mischief": mischief})
    port = free_port()
    with _Server(("127.0.0.1", port), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.shutdown()
            thread.join()
