"""Messages per second and bytes per second between the server and a worker in a process of its own.

    python bench/dispatch.py [--seconds 2] [--json]

Round trips: a command without tensors, answered at once, with 1 and with 2 in flight (the server's default). Data: a
command with one float32 tensor that comes back the same way, so each round trip moves twice its size; through shared
memory, as frames over the socket file, and as frames over tcp (encrypted, as between hosts). The line at the end is the
summary.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time

import numpy as np
import uvloop

from tx_async.config import ServerConfig
from tx_async.dispatch import router as router_module
from tx_async.testing.dispatch import RunningDispatch, running_dispatch
from tx_async.wire.worker import CancelSequences, TrainMicroBatch
from tx_async.worker.supervisor import WorkerProcess

ENGINE = "tx_async.testing.echo_engine:create"
TOKEN = "a token for a measurement"
SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 8 << 20, 32 << 20)
NOTHING = CancelSequences(sequence_ids=())
ECHO = TrainMicroBatch(slots=(), row_length=0, targets_per_token=0, forward_only=True)


async def round_trips(running: RunningDispatch, in_flight: int, seconds: float, command=NOTHING, tensors=()) -> dict:
    """Keep `in_flight` commands on their way for so long."""
    latencies, sent_at = [], []
    for _ in range(in_flight):
        sent_at.append(time.perf_counter())
        running.router.send("w0", command, tensors)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        finished = await running.finished()
        finished.release()
        latencies.append(time.perf_counter() - sent_at.pop(0))
        sent_at.append(time.perf_counter())
        running.router.send("w0", command, tensors)
    elapsed = time.perf_counter() - started
    for _ in range(in_flight):
        (await running.finished()).release()
    num_bytes = 2 * sum(tensor.nbytes for tensor in tensors)
    return {
        "per_s": len(latencies) / elapsed,
        "gigabytes_per_s": len(latencies) * num_bytes / elapsed / 1e9,
        "median_us": 1e6 * statistics.median(latencies),
        "p99_us": 1e6 * sorted(latencies)[int(0.99 * len(latencies))],
    }


@contextlib.asynccontextmanager
async def dispatch(transport: str):
    """A server and one worker that attaches over this transport."""
    with tempfile.TemporaryDirectory() as folder:
        config = ServerConfig(
            data_dir=folder,
            shared_memory_bytes=(256 << 20) if transport == "shared_memory" else 0,
            local_workers=int(transport != "tcp"),
            worker_address="tcp://127.0.0.1:*" if transport == "tcp" else "",
            worker_token=TOKEN,
            log_level="warning",
        )
        async with running_dispatch(config, engine=ENGINE) as running:
            if transport != "tcp":
                await running.ready()
                yield running
                return
            process = WorkerProcess(
                running.router.tcp_address, engine=ENGINE, environment={"TX_WORKER_TOKEN": TOKEN}, log_level="warning"
            )
            task = asyncio.create_task(process.run())
            await running.ready()
            yield running
            await process.stop(5.0)
            await task


async def measure(seconds: float) -> dict:
    results: dict = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"}
    for transport in ("shared_memory", "frames", "tcp"):
        async with dispatch(transport) as running:
            results[f"{transport}_messages_1"] = await round_trips(running, 1, seconds)
            results[f"{transport}_messages_2"] = await round_trips(running, 2, seconds)
            for size in SIZES:
                tensors = [np.random.default_rng(0).random(size // 4, np.float32)]
                results[f"{transport}_{size}"] = await round_trips(running, 2, seconds / 2, ECHO, tensors)
    return results


def report(results: dict) -> str:
    best = {
        transport: max(results[f"{transport}_{size}"]["gigabytes_per_s"] for size in SIZES)
        for transport in ("shared_memory", "frames", "tcp")
    }
    one, two = results["frames_messages_1"], results["frames_messages_2"]
    return (
        f"dispatch: {one['per_s']:.0f} round trips/s with 1 in flight (median {one['median_us']:.0f} us, "
        f"p99 {one['p99_us']:.0f} us), {two['per_s']:.0f}/s with 2; GB/s both ways: shared memory "
        f"{best['shared_memory']:.1f}, frames {best['frames']:.1f}, tcp {best['tcp']:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each measurement")
    parser.add_argument("--json", action="store_true", help="print every number, too")
    options = parser.parse_args()
    router_module.SMALL_BLOCK_BYTES = 0  # every size takes the road that is measured
    results = uvloop.run(measure(options.seconds))
    if options.json:
        json.dump(results, sys.stdout, indent=1)
        print()
    print(report(results))


if __name__ == "__main__":
    main()
