"""What a user's loop waits for: steps per second through the SDK, heartbeats under thousands of polls, answers.

    python bench/http_roundtrip.py [--seconds 10] [--base-url URL --base-model NAME] [--json]

- steps: forward_backward + optim_step, both results awaited before the next step, on a 2-layer, 64-wide model and the
  three Pig Latin examples; with one client, and with eight, each in a process of its own.
- heartbeats: round-trip time on one connection while 2,048 retrieve_future polls are open on as many others.
- answers: from the moment a worker finished an optim_step to the moment the client's poll returned it: ZeroMQ,
  scheduler, journal commit, HTTP, parsing. The engine is a fake that stamps the time. Only for servers of our own.

Without --base-url each measurement starts a server with an empty folder; the compilation cache is kept in .cache/.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import os
import platform
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from tx_async.testing.models import make_qwen3
from tx_async.testing.server import free_port, running_server

ROOT = Path(__file__).parents[1]
NUM_POLLS = 2048
NUM_HEARTBEATS = 1000
NUM_ANSWERS = 500
WARM_UP_STEPS = 5
API_KEY = "tml-bench"
TOKEN = "a token for a measurement"


# ---- steps


def measure_steps(base_url: str, base_model: str, num_clients: int, seconds: float) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    start, queue = context.Barrier(num_clients), context.Queue()
    arguments = (base_url, base_model, seconds, start, queue)
    clients = [context.Process(target=_client, args=arguments, daemon=True) for _ in range(num_clients)]
    for client in clients:
        client.start()
    results = [queue.get(timeout=300) for _ in clients]
    for client in clients:
        client.join()
    latencies = np.concatenate([latencies for _, latencies in results])
    return {
        "steps_per_s": sum(rate for rate, _ in results),
        "median_ms": float(np.median(latencies)) * 1e3,
        "p99_ms": float(np.quantile(latencies, 0.99)) * 1e3,
    }


def _client(base_url: str, base_model: str, seconds: float, start: Barrier, queue: Any) -> None:
    os.environ |= {"TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    import tinker

    from tx_async.demo import EXAMPLES, datum_of

    with tinker.ServiceClient(base_url=base_url, api_key=API_KEY) as service:
        trainer = service.create_lora_training_client(base_model=base_model, rank=8).result()
        data = [datum_of(trainer.get_tokenizer(), *example) for example in EXAMPLES]
        adam = tinker.AdamParams(learning_rate=1e-4)

        def step() -> None:
            futures = [trainer.forward_backward(data, "cross_entropy"), trainer.optim_step(adam)]
            for future in futures:
                future.result()

        for _ in range(WARM_UP_STEPS):
            step()
        start.wait()
        latencies, began = [], time.perf_counter()
        while (before := time.perf_counter()) - began < seconds:
            step()
            latencies.append(time.perf_counter() - before)
        queue.put((len(latencies) / (time.perf_counter() - began), latencies))


# ---- heartbeats and answers, over bare connections


class Connection:
    """One keep-alive connection."""

    def __init__(self, base_url: str):
        address = urlsplit(base_url)
        self._http = http.client.HTTPConnection(address.hostname or "", address.port, timeout=120)
        self._http.connect()
        self._http.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, path: str, body: dict[str, Any]) -> None:
        headers = {"X-API-Key": API_KEY, "Content-Type": "application/json"}
        self._http.request("POST", f"/api/v1/{path}", json.dumps(body), headers)

    def receive(self) -> dict[str, Any]:
        response = self._http.getresponse()
        content = response.read()
        if response.status != 200:
            raise SystemExit(f"{response.status} {content[:300]!r}")
        return json.loads(content)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.send(path, body)
        return self.receive()

    def close(self) -> None:
        self._http.close()

    def create_model(self, base_model: str) -> tuple[str, str]:
        """-> (session_id, model_id)."""
        session = self.post("create_session", {"tags": [], "user_metadata": {}, "sdk_version": "0.38.0"})["session_id"]
        lora = {"rank": 8, "train_unembed": True, "train_mlp": True, "train_attn": True}
        body = {"session_id": session, "model_seq_id": 0, "base_model": base_model, "lora_config": lora}
        created = self.post("create_model", body)
        return session, self.post("retrieve_future", {"request_id": created["request_id"]})["model_id"]

    def optim_step(self, model_id: str, seq_id: int) -> str:
        """-> request_id."""
        body = {"model_id": model_id, "seq_id": seq_id, "adam_params": {"learning_rate": 1e-4}}
        return self.post("optim_step", body)["request_id"]


def measure_heartbeats(base_url: str, base_model: str) -> dict[str, float]:
    """The polls wait for steps whose predecessor never comes, so none is answered while we measure."""
    one = Connection(base_url)
    session, model_id = one.create_model(base_model)
    before = _heartbeats(one, session)
    request_ids = [one.optim_step(model_id, seq_id) for seq_id in range(2, NUM_POLLS + 2)]
    polls = [Connection(base_url) for _ in request_ids]
    for poll, request_id in zip(polls, request_ids, strict=True):
        poll.send("retrieve_future", {"request_id": request_id})
    time.sleep(1)
    during = _heartbeats(one, session)
    for connection in (*polls, one):
        connection.close()
    return {"polls": len(polls)} | {f"idle_{k}": v for k, v in before.items()} | during


def _heartbeats(connection: Connection, session: str) -> dict[str, float]:
    times = []
    for _ in range(NUM_HEARTBEATS):
        began = time.perf_counter()
        connection.post("session_heartbeat", {"session_id": session})
        times.append(time.perf_counter() - began)
    return _quantiles(times)


def measure_answers(base_url: str, base_model: str) -> dict[str, float]:
    """One step at a time, its poll open before it can finish."""
    submits, polls = Connection(base_url), Connection(base_url)
    _, model_id = submits.create_model(base_model)
    latencies, trips = [], []
    for seq_id in range(1, NUM_ANSWERS + 1):
        began = time.perf_counter()
        request_id = submits.optim_step(model_id, seq_id)
        answer = polls.post("retrieve_future", {"request_id": request_id})
        latencies.append(time.time() - answer["metrics"]["finished_at"])
        trips.append(time.perf_counter() - began)
    return _quantiles(latencies) | {f"round_trip_{k}": v for k, v in _quantiles(trips).items()}


def _quantiles(seconds: list[float]) -> dict[str, float]:
    return {"median_ms": float(np.median(seconds)) * 1e3, "p99_ms": float(np.quantile(seconds, 0.99)) * 1e3}


@contextlib.contextmanager
def server_with_stamping_engine(model: Path) -> Iterator[str]:
    address, environ = f"tcp://127.0.0.1:{free_port()}", {"TX_WORKER_TOKEN": TOKEN}
    command = [sys.executable, "-m", "tx_async.cli", "worker", "--connect", address]
    command += ["--engine", "stamping_engine:create"]
    paths = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "bench")))}
    with (
        running_server(model, local_workers=0, worker_address=address, environ=environ, ready=False) as server,
        subprocess.Popen(command, env=os.environ | environ | paths, stderr=subprocess.DEVNULL) as worker,
    ):
        server.wait_ready()
        yield server.base_url
        worker.terminate()


# ---- all of it


def measure(seconds: float, base_url: str, base_model: str) -> dict[str, dict[str, float]]:
    results = {}
    with contextlib.ExitStack() as stack:
        model = make_qwen3(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model" / "tiny")
        name = base_model or str(model)
        for num_clients in (1, 8):
            with _server(model, base_url) as url:
                results[f"clients_{num_clients}"] = measure_steps(url, name, num_clients, seconds)
        with _server(model, base_url) as url:
            results["heartbeats"] = measure_heartbeats(url, name)
        if not base_url:
            with server_with_stamping_engine(model) as url:
                results["answers"] = measure_answers(url, name)
    return results


@contextlib.contextmanager
def _server(model: Path, base_url: str) -> Iterator[str]:
    if base_url:
        yield base_url
        return
    with running_server(model) as server:
        yield server.base_url


def report(results: dict[str, dict[str, float]]) -> str:
    one, eight, beats = results["clients_1"], results["clients_8"], results["heartbeats"]
    text = (
        f"http_roundtrip: {one['steps_per_s']:.1f} steps/s with 1 client (median {one['median_ms']:.1f} ms, "
        f"p99 {one['p99_ms']:.1f} ms), {eight['steps_per_s']:.1f} in total with 8; "
        f"heartbeats with {beats['polls']:.0f} open polls: median {beats['median_ms']:.2f} ms, "
        f"p99 {beats['p99_ms']:.2f} ms"
    )
    if answers := results.get("answers"):
        text += f"; result to answer: median {answers['median_ms']:.2f} ms, p99 {answers['p99_ms']:.2f} ms"
    return f"{text} ({os.cpu_count()} cores, {platform.machine()})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measurement of steps")
    parser.add_argument("--base-url", default="", help="measure this server instead of one of our own")
    parser.add_argument("--base-model", default="", help="its base model's name")
    parser.add_argument("--json", action="store_true", help="print every number, too")
    options = parser.parse_args()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    results = measure(options.seconds, options.base_url, options.base_model)
    if options.json:
        json.dump(results, sys.stdout, indent=1)
        print()
    print(report(results))


if __name__ == "__main__":
    main()
