"""From kill -9 of the server (its worker ends with it) to the next completed step, with journaled steps to repeat.

    python bench/recovery_time.py [--steps N] [--repeats N] [--victim server|worker]

A tiny Qwen3 (2 layers, 64 wide) on the real engine, trained through the real SDK; no snapshot is taken, so every step
since the creation runs again. `total_s` is what a user waits; `after_ready_s` leaves aside that the worker loads its
model and comes back: the goal is under 5 s for 50 steps. Prints a line for people on stderr and JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TINKER_TELEMETRY": "0", "TRANSFORMERS_VERBOSITY": "error"}
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import tinker

from tx_async.testing.models import make_qwen3
from tx_async.testing.server import ServerProcess

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/support is no part of the package

from tests.support.durability import batch, kill_server, kill_worker, serving

GOAL_S = 5.0


def measure(server: ServerProcess, model: Path, steps: int, victim: str) -> dict[str, float]:
    with tinker.ServiceClient(base_url=server.base_url, api_key="tml-dummy") as service:
        trainer = service.create_lora_training_client(str(model), rank=8, seed=1).result()
        for step in range(steps):
            trainer.forward_backward(batch(step), "cross_entropy")
            last = trainer.optim_step(tinker.AdamParams(learning_rate=1e-3))
        last.result()
        ready: list[float] = []
        began = time.monotonic()
        kill_server(server) if victim == "server" else kill_worker(server)
        watcher = threading.Thread(target=watch, args=(server, ready))
        watcher.start()
        trainer.forward_backward(batch(steps), "cross_entropy").result()
        ended = time.monotonic()
        watcher.join()
    return {"total_s": ended - began, "ready_s": ready[0] - began, "after_ready_s": max(0.0, ended - ready[0])}


def watch(server: ServerProcess, ready: list[float]) -> None:
    """Notes when a worker is there again."""
    while server.get("/api/v1/healthz")[0] == 200:
        time.sleep(0.005)
    while server.get("/api/v1/healthz")[0] != 200:
        time.sleep(0.005)
    ready.append(time.monotonic())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--victim", choices=["server", "worker"], default="server")
    args = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory(prefix="tx_async-bench-") as folder:
        model = make_qwen3(Path(folder) / "model")
        settings = {"snapshot_every_steps": 10_000, "snapshot_idle_s": 10_000}
        cache = {"compilation_cache_dir": f"{folder}/cache"}
        for repeat in range(args.repeats):
            home = Path(folder) / f"server-{repeat}"
            with serving(home, model, fake=False, **settings, **cache) as server:
                runs.append(measure(server, model, args.steps, args.victim))
    medians = {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}
    report = {
        "benchmark": "recovery_time",
        "steps": args.steps,
        "victim": args.victim,
        "hardware": f"{os.cpu_count()} cores {platform.machine()}",
        "medians": medians,
        "runs": runs,
        "goal_after_ready_s": GOAL_S,
        "ok": medians["after_ready_s"] < GOAL_S,
    }
    print(
        f"kill -9 of the {args.victim} with {args.steps} steps to repeat: next step {medians['after_ready_s']} s after "
        f"the worker was ready ({medians['total_s']} s after the kill, {medians['ready_s']} s of them loading)",
        file=sys.stderr,
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
