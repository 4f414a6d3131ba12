"""A long run keeps memory, journal and storage flat. What is long for a server is how often its limits have let go of
something, so the limits are small here."""

import http.client
import json
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from tests.support.durability import serving, snapshots, wait_until, worker_pids
from tx_async.testing.server import ServerProcess

LIMITS: dict[str, Any] = {
    "results_kept_max": 200,
    "result_cache_bytes": 2**20,
    "retention_interval_s": 1,
    "history_steps_max": 64,
    "snapshot_every_steps": 20,
}
CLIENTS = 4
WARM_S = 12.0
"""Until then the allocator still finds its size: limits let go of things once a second, however many there are."""
OPERATIONS = 25
"""Optimizer steps, and samples, of one round."""
MEMORY_GROWTH_MAX = 1.04
SMALL_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0:glibc.malloc.arena_max=1"}
"""A worker's heap grows by pages of 2 MiB otherwise: a leak would be seen late, and one page is 4 % of it."""
JOURNAL_MIB_MAX = 8.0
"""Four of them are SQLite's log, which is written back into the database from then on."""


class Client:
    """Sends what the SDK would, over one connection."""

    def __init__(self, server: ServerProcess):
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        self.session = self.post("create_session", tags=[], sdk_version="0")["session_id"]
        self.seq_id = 0

    def post(self, route: str, **body: Any) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "X-API-Key": "tml-dummy"}
        self.connection.request("POST", f"/api/v1/{route}", json.dumps({"type": route, **body}), headers)
        with self.connection.getresponse() as response:
            content = response.read()
            assert response.status == 200, content
            return json.loads(content) if response.headers["content-type"] == "application/json" else {}

    def begin(self, model: str) -> None:
        lora = {"rank": 4, "train_unembed": True, "train_mlp": True, "train_attn": True}
        self.result(
            self.post("create_model", session_id=self.session, model_seq_id=0, base_model=model, lora_config=lora)
        )
        made = self.post(
            "create_sampling_session", session_id=self.session, sampling_session_seq_id=0, base_model=model
        )
        self.sampler = made["sampling_session_id"]

    def result(self, promise: dict[str, Any]) -> None:
        self.post("retrieve_future", request_id=promise["request_id"])

    def round(self) -> None:
        promises = []
        for _ in range(OPERATIONS):
            self.seq_id += 1
            adam = {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12}
            promises.append(
                self.post("optim_step", model_id=f"{self.session}:train:0", seq_id=self.seq_id, adam_params=adam)
            )
            promises.append(
                self.post(
                    "asample",
                    sampling_session_id=self.sampler,
                    seq_id=self.seq_id,
                    num_samples=1,
                    prompt={"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
                    sampling_params={"max_tokens": 2},
                )
            )
        for promise in promises[-2:]:
            self.result(promise)


def sizes(server: ServerProcess) -> dict[str, float]:
    """MiB of memory and files."""
    files = [file for file in server.data_dir.glob("tx_async.db*") if file.is_file()]
    return {
        "server": psutil.Process(server.pid).memory_info().rss / 2**20,
        "worker": sum(psutil.Process(pid).memory_info().rss for pid in worker_pids(server)) / 2**20,
        "journal": sum(file.stat().st_size for file in files) / 2**20,
    }


def test_memory_and_journal_are_flat_over_a_long_run(tiny_qwen3: Path, tmp_path: Path):
    with serving(tmp_path, tiny_qwen3, environ=SMALL_PAGES, **LIMITS) as server:
        clients = [Client(server) for _ in range(CLIENTS)]
        for client in clients:
            client.begin(str(tiny_qwen3))
        started, rounds = time.monotonic(), 0
        while time.monotonic() - started < WARM_S:
            run(clients, 1)
            rounds += 1
        warm = sizes(server)
        run(clients, rounds)
        hot = sizes(server)
        assert hot["server"] <= MEMORY_GROWTH_MAX * warm["server"], (warm, hot)
        assert hot["worker"] <= MEMORY_GROWTH_MAX * warm["worker"], (warm, hot)
        assert hot["journal"] <= JOURNAL_MIB_MAX, (warm, hot)
        wait_until(lambda: len(snapshots(server)) <= 2 * CLIENTS)
        time.sleep(1.5 * LIMITS["retention_interval_s"])
        for client in clients:
            client.connection.close()
    with sqlite3.connect(tmp_path / "tx_async.db") as connection:
        for table in ("result", "request", "request_body"):
            (rows,) = connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()
            # Beside the limit: what a replay may need, which is what the two newest snapshots do not cover.
            assert rows <= LIMITS["results_kept_max"] + CLIENTS * 2 * (LIMITS["snapshot_every_steps"] + 1), table
    connection.close()


def run(clients: list[Client], rounds: int) -> None:
    def go(client: Client) -> None:
        for _ in range(rounds):
            client.round()

    with ThreadPoolExecutor(len(clients)) as pool:
        list(pool.map(go, clients))
