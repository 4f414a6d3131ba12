"""What a tenant's heartbeat waits for while another one posts large bodies.

    python bench/heartbeat.py [--posts 208] [--at-once 64] [--bytes 3350000] [--json]

The processes: the server; one that posts forward_backward bodies of that size with one key, so many at a time; one
that sends heartbeats with another key on a connection of its own and notes each round trip; and the floor, a bare
asyncio process that sends back what it gets: it is asked after each heartbeat, and shows what the machine itself makes
everybody wait for. Every post must be accepted; how fast they are is the machine's. There is no worker: a device would
take cores from what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing
import os
import platform
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from tx_async.testing.models import make_qwen3
from tx_async.testing.server import free_port, running_server
from tx_async.wire import protobuf

ROOT = Path(__file__).parents[1]
HEARTBEAT_INTERVAL_S = 0.01
DATUM_TOKENS = 1000
TOKEN_BYTES = 16
"""int32 token, int64 target, float32 weight."""


class Connection:
    """One keep-alive connection of one key."""

    def __init__(self, base_url: str, key: str):
        address = urlsplit(base_url)
        self._key = key
        self._http = http.client.HTTPConnection(address.hostname or "", address.port, timeout=300)
        self._http.connect()
        self._http.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def post(self, path: str, body: bytes, content_type: str = "application/json") -> dict[str, Any]:
        self._http.request("POST", f"/api/v1/{path}", body, {"X-API-Key": self._key, "Content-Type": content_type})
        response = self._http.getresponse()
        content = response.read()
        if response.status != 200:
            raise SystemExit(f"{path}: {response.status} {content[:300]!r}")
        return json.loads(content)

    def post_json(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self.post(path, json.dumps(body).encode())


def forward_backward(model_id: str, seq_id: int, num_bytes: int) -> bytes:
    """About so many bytes of whole datums."""
    message = protobuf.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id, loss_fn="cross_entropy")
    for _ in range(max(1, num_bytes // (DATUM_TOKENS * TOKEN_BYTES))):
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = np.ones(DATUM_TOKENS, "<i4").tobytes()
        targets, weights = datum.loss_fn_inputs["target_tokens"], datum.loss_fn_inputs["weights"]
        targets.dtype, targets.dense = 2, np.ones(DATUM_TOKENS, "<i8").tobytes()
        weights.dtype, weights.dense = 1, np.ones(DATUM_TOKENS, "<f4").tobytes()
    return message.SerializeToString()


def post_bodies(base_url: str, base_model: str, posts: int, at_once: int, num_bytes: int, ready: Any, go: Any) -> None:
    """The heavy tenant: a process of its own. It says when it is ready, and ends when everything is accepted."""
    connection = Connection(base_url, "tml-heavy")
    session = connection.post_json("create_session", {})["session_id"]
    body = {"session_id": session, "model_seq_id": 0, "base_model": base_model}
    model_id = connection.post_json("create_model", body)["model_id"]
    content = forward_backward(model_id, 1, num_bytes)
    tail = content[len(protobuf.ForwardBackwardRequest(model_id=model_id, seq_id=1).SerializeToString()) :]
    left, lock = iter(range(1, posts + 1)), threading.Lock()

    def post_some() -> None:
        own = Connection(base_url, "tml-heavy")
        while True:
            with lock:
                seq_id = next(left, None)
            if seq_id is None:
                return
            head = protobuf.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id).SerializeToString()
            own.post("forward_backward", head + tail, protobuf.CONTENT_TYPE)

    threads = [threading.Thread(target=post_some) for _ in range(at_once)]
    ready.set()
    go.wait()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def send_back(port: int) -> None:
    """The floor: a process of its own."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)

    async def serve() -> None:
        async with await asyncio.start_server(answer, "127.0.0.1", port) as server:
            await server.serve_forever()

    asyncio.run(serve())


def send_heartbeats(base_url: str, floor_port: int, stop: Any, times: Any) -> None:
    """The light tenant: a process of its own."""
    connection = Connection(base_url, "tml-light")
    session = connection.post_json("create_session", {})["session_id"]
    floor = _connect(floor_port)
    taken = []
    while not stop.is_set():
        began = time.perf_counter()
        connection.post_json("session_heartbeat", {"session_id": session})
        beaten = time.perf_counter()
        floor.sendall(b"?\n")
        floor.recv(2)
        taken.append((beaten - began, time.perf_counter() - beaten))
        time.sleep(HEARTBEAT_INTERVAL_S)
    times.put(taken)


def _connect(port: int) -> socket.socket:
    """A connection to a process that is about to listen."""
    deadline = time.monotonic() + 30
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection


def measure(base_url: str, base_model: str, posts: int, at_once: int, num_bytes: int) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    ready, go, stop, times = context.Event(), context.Event(), context.Event(), context.Queue()
    heavy = context.Process(target=post_bodies, args=(base_url, base_model, posts, at_once, num_bytes, ready, go))
    floor_port = free_port()
    floor = context.Process(target=send_back, args=(floor_port,), daemon=True)
    light = context.Process(target=send_heartbeats, args=(base_url, floor_port, stop, times))
    floor.start()
    heavy.start()
    ready.wait()
    light.start()
    time.sleep(1.0)  # it has begun
    began = time.perf_counter()
    go.set()
    heavy.join()
    seconds = time.perf_counter() - began
    stop.set()
    taken = np.array(times.get(timeout=60)) * 1e3
    light.join()
    floor.terminate()
    if heavy.exitcode:
        raise SystemExit("not every body was accepted")
    return {
        "seconds": seconds,
        "mb_per_s": posts * num_bytes / seconds / 1e6,
        "heartbeats": len(taken),
        **_quantiles("", taken[:, 0]),
        **_quantiles("floor_", taken[:, 1]),
        "load": os.getloadavg()[0],
    }


def _quantiles(prefix: str, taken: np.ndarray) -> dict[str, float]:
    return {
        f"{prefix}median_ms": float(np.median(taken)),
        f"{prefix}p99_ms": float(np.quantile(taken, 0.99)),
        f"{prefix}max_ms": float(taken.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posts", type=int, default=208, help="bodies in all")
    parser.add_argument("--at-once", type=int, default=64, help="bodies that are under way at the same time")
    parser.add_argument("--bytes", type=int, default=3_350_000, help="size of each")
    parser.add_argument("--json", action="store_true", help="print every number, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_qwen3(Path(folder) / "model" / "tiny")
        with running_server(model, ready=False, local_workers=0) as server:
            server.wait_accepting()
            result = measure(server.base_url, str(model), options.posts, options.at_once, options.bytes)
            server.kill()
    if options.json:
        json.dump(result, sys.stdout, indent=1)
        print()
    print(
        f"heartbeat: median {result['median_ms']:.1f} ms, p99 {result['p99_ms']:.1f} ms, max {result['max_ms']:.1f} ms "
        f"(floor {result['floor_median_ms']:.1f}, {result['floor_p99_ms']:.1f}, {result['floor_max_ms']:.1f} ms; "
        f"{result['heartbeats']:.0f} of each; load {result['load']:.1f}) "
        f"beside {options.posts} bodies of {options.bytes / 1e6:.2f} MB, "
        f"{options.at_once} at a time, {result['mb_per_s']:.0f} MB/s ({os.cpu_count()} cores, {platform.machine()})"
    )


if __name__ == "__main__":
    main()
