"""What it costs that a mesh has two processes instead of one, with the same devices in total; and commands over tcp.

    python bench/mesh.py [--repeat 20] [--seconds 2] [--json]

- micro-batch, quantum: medians of a command's round trip from the server through one real worker of two fake CPU
  devices in one process, and in two processes (fsdp 2, a Qwen3 of two layers, 64 wide): 2 rows of 32 tokens; 2
  sequences, 4 steps. On CPU the second process also pays for gloo between the devices, where one process copies memory.
- commands: empty ones to a worker that attaches over encrypted tcp, each process answering, 2 in flight; and how late
  the server's event loop was meanwhile, p99. The engine there does nothing.

All processes and the server share this machine's cores. The line at the end is the summary.
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
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import uvloop

from tx_async.config import ServerConfig
from tx_async.testing.dispatch import FAKE_ENGINE, RunningDispatch, running_dispatch
from tx_async.testing.engine_bench import micro_batch, segment
from tx_async.testing.models import make_qwen3
from tx_async.testing.server import free_port
from tx_async.wire.facts import WorkerReady
from tx_async.wire.worker import (
    AdapterConfig,
    AdmitSequences,
    CancelSequences,
    Command,
    CreateAdapter,
    EngineConfig,
    SampleQuantum,
    SequenceSpec,
)
from tx_async.worker.main import DEFAULT_ENGINE
from tx_async.worker.supervisor import WorkerProcess

TOKEN = "a token for a measurement"
NOTHING = CancelSequences(sequence_ids=())
ENGINE = EngineConfig(
    max_lora_adapters=2, max_lora_rank=4, max_sampler_adapters=2, max_context_length=256, sample_max_num_sequences=2,
    train_row_lengths=(32,), train_micro_batch_size=2, decode_steps=4, fully_sharded_data_parallel_size=2,
)  # fmt: skip
START_S = 300.0
LAG_INTERVAL_S = 0.002


async def call(running: RunningDispatch, command: Command, tensors: Sequence[np.ndarray] = ()) -> float:
    """-> milliseconds until it was answered by every process."""
    began = time.perf_counter()
    running.router.send("w0", command, tensors)
    (await running.finished(START_S)).release()
    return 1000 * (time.perf_counter() - began)


async def measure_engine(num_processes: int, repeat: int) -> dict[str, float]:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={2 // num_processes}"
    with tempfile.TemporaryDirectory() as folder:
        config = ServerConfig(
            base_model=str(make_qwen3(Path(folder) / "model")),
            data_dir=folder,
            compilation_cache_dir=os.environ.get("JAX_COMPILATION_CACHE_DIR", ""),
            local_workers=num_processes,
            backend_config=_mesh(num_processes),
            log_level="warning",
        )
        async with running_dispatch(config, engine=DEFAULT_ENGINE) as running:
            await running.next(WorkerReady, START_S)
            return {"micro_batch_ms": await train(running, repeat), "quantum_ms": await decode(running, repeat)}


def _mesh(num_processes: int) -> EngineConfig:
    return msgspec.structs.replace(ENGINE, num_processes=num_processes, coordinator_address=f"127.0.0.1:{free_port()}")


async def train(running: RunningDispatch, repeat: int) -> float:
    await call(running, CreateAdapter(slot=0, config=AdapterConfig(rank=4)))
    batch = micro_batch([(0, [segment(32, 1)]), (0, [segment(32, 2)])], 32)
    await call(running, *batch)
    return statistics.median([await call(running, *batch) for _ in range(repeat)])


async def decode(running: RunningDispatch, repeat: int) -> float:
    specs = tuple(
        SequenceSpec(
            sequence_id=number, sampler_slot=-1, adapter_version="", prompt_index=0, max_tokens=10_000, seed=number
        )
        for number in (1, 2)
    )
    quantum = SampleQuantum(decode_steps=4, prefill_tokens=64)
    await call(running, AdmitSequences(sequences=specs), [np.arange(16, dtype=np.int32)])
    for _ in range(2):
        await call(running, quantum)
    return statistics.median([await call(running, quantum) for _ in range(min(repeat, 50))])


async def measure_commands(num_processes: int, seconds: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        config = ServerConfig(
            data_dir=folder, local_workers=0, worker_address="tcp://127.0.0.1:*", worker_token=TOKEN,
            backend_config=EngineConfig(num_processes=num_processes), log_level="warning",
        )  # fmt: skip
        async with running_dispatch(config) as running, attached(running, num_processes):
            await running.next(WorkerReady, START_S)
            lags: list[float] = []
            watching = asyncio.create_task(watch_lag(lags))
            number = await flood(running, seconds)
            watching.cancel()
            return {"per_s": number / seconds, "lag_p99_ms": 1000 * sorted(lags)[int(0.99 * len(lags))]}


@contextlib.asynccontextmanager
async def attached(running: RunningDispatch, num_processes: int):
    processes = [
        WorkerProcess(
            running.router.tcp_address, process_id=number, engine=FAKE_ENGINE, environment={"TX_WORKER_TOKEN": TOKEN}
        )
        for number in range(num_processes)
    ]
    tasks = [asyncio.create_task(process.run()) for process in processes]
    try:
        yield
    finally:
        await asyncio.gather(*(process.stop(5.0) for process in processes))
        await asyncio.gather(*tasks)


async def flood(running: RunningDispatch, seconds: float, in_flight: int = 2) -> int:
    """-> commands answered within so many seconds."""
    for _ in range(in_flight):
        running.router.send("w0", NOTHING)
    number, until = 0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        await running.finished()
        running.router.send("w0", NOTHING)
        number += 1
    for _ in range(in_flight):
        await running.finished()
    return number


async def watch_lag(lags: list[float]) -> None:
    while True:
        began = time.perf_counter()
        await asyncio.sleep(LAG_INTERVAL_S)
        lags.append(time.perf_counter() - began - LAG_INTERVAL_S)


async def measure(repeat: int, seconds: float) -> dict[str, dict[str, float]]:
    results = {}
    for name, number in (("one", 1), ("two", 2)):
        engine = await measure_engine(number, repeat)
        commands = await measure_commands(number, seconds)
        results[name] = engine | {f"tcp_commands_{key}": value for key, value in commands.items()}
    return results


def report(results: dict[str, dict[str, float]]) -> str:
    one, two = results["one"], results["two"]
    return (
        f"mesh: two processes against one of as many devices: micro-batch {two['micro_batch_ms']:.1f} against "
        f"{one['micro_batch_ms']:.1f} ms, decode quantum {two['quantum_ms']:.1f} against {one['quantum_ms']:.1f} ms; "
        f"tcp: {two['tcp_commands_per_s']:.0f} commands/s to two processes, {one['tcp_commands_per_s']:.0f} to one, "
        f"the server's event loop at most {two['tcp_commands_lag_p99_ms']:.1f} ms late (p99) "
        f"({os.cpu_count()} cores, {platform.machine()})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--json", action="store_true", help="print every number, too")
    options = parser.parse_args()
    results = uvloop.run(measure(options.repeat, options.seconds))
    if options.json:
        json.dump(results, sys.stdout, indent=1)
        print()
    print(report(results))


if __name__ == "__main__":
    main()
