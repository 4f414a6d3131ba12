"""Connections that are kept: what one request leaves unread does not hold up the next one."""

import json
import os
import socket
import time

import pytest

from tx_async.testing.server import running_server


@pytest.fixture(scope="module")
def server(tiny_qwen3):
    with running_server(tiny_qwen3, ready=False) as server:
        server.wait_accepting()
        yield server


@pytest.mark.parametrize("path", ["client/dynamic_config", "client/config", "no_such_route"])
def test_a_connection_goes_on_after_a_small_body_that_nobody_reads(server, path):
    """The SDK's first request over its pool has a body that its answer does not depend on; the next one, on the same
    connection, creates its session."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        for _ in range(3):
            post(connection, path, {"sdk_version": "0.38.0"})
            answer = post(connection, "create_session", {"tags": [], "user_metadata": {}, "sdk_version": "0.38.0"})
            assert answer["session_id"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="descriptors are counted in /proc")
def test_a_connection_that_its_client_has_closed_leaves_no_descriptor(server):
    def descriptors() -> int:
        return len(os.listdir(f"/proc/{server.pid}/fd"))

    before = descriptors()
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            post(connection, "client/config", {})
        socket.create_connection(("127.0.0.1", server.port), timeout=20).close()
    deadline = time.monotonic() + 20
    while descriptors() > before + 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert descriptors() <= before + 5


def post(connection: socket.socket, path: str, body: dict) -> dict:
    """Head and body in one packet."""
    content = json.dumps(body).encode()
    head = f"POST /api/v1/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(65536) or pytest.fail("the connection was closed")
    fields, _, rest = answer.partition(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in fields.split(b"\r\n") if line.startswith(b"content-length:"))
    while len(rest) < length:
        rest += connection.recv(65536) or pytest.fail("the connection was closed")
    return json.loads(rest)
