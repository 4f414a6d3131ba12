"""Two hosts, as network namespaces with a cable between them: nothing of one's loopback is reachable from the other."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import xla

SCRIPT = Path(__file__).with_name("train_on_two_hosts.py")
HOSTS = {"a": "10.213.77.1", "b": "10.213.77.2"}
ENVIRON = {"TX_WORKER_TOKEN": "a-token-that-nobody-guesses"} | xla.flags(1)
WORKER_PORT, COORDINATOR_PORT = 7001, 7002
READY_S = 200
LEASE_S = 4


def name_of(host):
    return f"tx-test-{os.getpid()}-{host}"


def ip(*arguments):
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture
def hosts():
    """Two namespaces; the machine's own name resolves to each one's address, as on a real host."""
    if not shutil.which("ip"):
        pytest.skip("needs iproute2's ip")
    made = []
    try:
        for host, address in HOSTS.items():
            folder = Path("/etc/netns") / name_of(host)
            ip("netns", "add", name_of(host))
            made.append((name_of(host), folder))
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} {os.uname().nodename}\n")
        link = [f"txt{os.getpid()}{host}" for host in HOSTS]
        peers = [["netns", name_of(host)] for host in HOSTS]
        ip("link", "add", link[0], *peers[0], "type", "veth", "peer", "name", link[1], *peers[1])
        for (host, address), device in zip(HOSTS.items(), link, strict=True):
            ip("-n", name_of(host), "addr", "add", f"{address}/24", "dev", device)
            for name in (device, "lo"):
                ip("-n", name_of(host), "link", "set", name, "up")
        yield link
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"network namespaces are not allowed here: {getattr(error, 'stderr', error)}")
    finally:
        for name, folder in made:
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=20)
            shutil.rmtree(folder, ignore_errors=True)


def start(host, arguments, log, **pipes):
    command = ["ip", "netns", "exec", name_of(host), sys.executable, *arguments]
    return subprocess.Popen(command, env=os.environ | ENVIRON, stderr=log, text=True, **pipes)


def test_two_hosts_form_a_mesh_over_the_network_and_outlive_a_cut_cable(hosts, tiny_qwen3, tmp_path):
    door, coordinator = (f"{HOSTS['a']}:{port}" for port in (WORKER_PORT, COORDINATOR_PORT))
    with (tmp_path / "a.log").open("w") as log_a, (tmp_path / "b.log").open("w") as log_b:
        server = start(
            "a", [str(SCRIPT), str(tiny_qwen3), str(tmp_path / "data"), door, coordinator], log_a,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        worker = start("b", ["-m", "tx_async.cli", "worker", "--connect", f"tcp://{door}", "--process-id", "1"], log_b)
        with server, worker:
            try:
                assert server.stdout.readline() == "ready\n", (tmp_path / "a.log").read_text()
                first, _ = step(server)
                cut(hosts[1], LEASE_S + 2)
                second, tokens = step(server)
                assert second < first and len(tokens) == 8
                server.stdin.close()
                assert server.wait(60) == 0
            finally:
                for process in (server, worker):
                    end(process)
    said = (tmp_path / "data" / "server.log").read_text()
    assert "process 1 (pid" in said and "has been silent" in said
    assert "the server has been silent" in (tmp_path / "b.log").read_text()


def end(process):
    process.send_signal(signal.SIGINT)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()


def step(server):
    server.stdin.write("\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def cut(device, seconds):
    """Pull host b's cable for a while."""
    ip("-n", name_of("b"), "link", "set", device, "down")
    time.sleep(seconds)
    ip("-n", name_of("b"), "link", "set", device, "up")
