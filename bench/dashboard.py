"""What open pages cost a training loop: tokens per second through the SDK with 0 and with 50 of them, in turn.

    python bench/dashboard.py [--pages 50] [--rounds 6] [--seconds 5] [--json]

A step is forward_backward of 16 sequences of 128 tokens and optim_step, both awaited, on a 2-layer, 64-wide model: the
server's own work is a larger part of it than with any real model. Pages are connections that read `/dashboard/events`,
in one process beside the server; a page looks at the run that trains. Rounds with and without pages alternate on one
server, so that both see the same machine; what is compared is the median of the rounds' ratios. On a machine that
others use as well the rates say little: the processor time that the server's process takes for its pages, beyond what
the same number of steps takes without them, says more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import psutil

from tx_async.testing.models import make_qwen3
from tx_async.testing.server import running_server

ROOT = Path(__file__).parents[1]
SEQUENCES, TOKENS = 16, 128
WARM_UP_STEPS = 5
API_KEY = "tml-bench"


class Rate(NamedTuple):
    tokens_per_s: float
    steps: int
    seconds: float
    cpu_s: float
    """Processor time of the server's process."""


def measure(base_url: str, base_model: str, pid: int, options: argparse.Namespace) -> dict[str, Any]:
    import tinker

    with tinker.ServiceClient(base_url=base_url, api_key=API_KEY) as service:
        trainer = service.create_lora_training_client(base_model=base_model, rank=8).result()
        step = _step_of(trainer)
        for _ in range(WARM_UP_STEPS):
            step()
        rounds = [_round(base_url, step, psutil.Process(pid), options) for _ in range(options.rounds)]
    ratios = [with_pages.tokens_per_s / without.tokens_per_s for without, with_pages, _ in rounds]
    return {
        "tokens_per_s_without": statistics.median(without.tokens_per_s for without, _, _ in rounds),
        "tokens_per_s_with": statistics.median(with_pages.tokens_per_s for _, with_pages, _ in rounds),
        "server_cpu_percent_for_pages": statistics.median(100 * _cpu_of_pages(*both) for *both, _ in rounds),
        "cost_percent": 100 * (1 - statistics.median(ratios)),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "events": sum(events for _, _, events in rounds),
        "load_average": os.getloadavg()[0],
    }


def _step_of(trainer: Any) -> Callable[[], None]:
    import tinker

    rng = np.random.default_rng(0)
    data = []
    for _ in range(SEQUENCES):
        tokens = rng.integers(0, 256, TOKENS + 1).tolist()
        inputs = {"target_tokens": tokens[1:], "weights": [1.0] * TOKENS}
        data.append(tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))

    def step() -> None:
        futures = [
            trainer.forward_backward(data, "cross_entropy"),
            trainer.optim_step(tinker.AdamParams(learning_rate=1e-4)),
        ]
        for future in futures:
            future.result()

    return step


def _cpu_of_pages(without: Rate, with_pages: Rate) -> float:
    """Of one core."""
    per_step = without.cpu_s / without.steps
    return (with_pages.cpu_s - per_step * with_pages.steps) / with_pages.seconds


def _round(
    base_url: str, step: Callable[[], None], server: psutil.Process, options: argparse.Namespace
) -> tuple[Rate, Rate, int]:
    """Without pages and with them, and the events that these got."""
    without = _rate(step, server, options.seconds)
    with pages(base_url, options.pages) as num_events:
        with_pages = _rate(step, server, options.seconds)
    return without, with_pages, num_events()


def _rate(step: Callable[[], None], server: psutil.Process, seconds: float) -> Rate:
    num_steps, began, cpu = 0, time.perf_counter(), _cpu(server)
    while time.perf_counter() - began < seconds:
        step()
        num_steps += 1
    passed = time.perf_counter() - began
    return Rate(num_steps * SEQUENCES * TOKENS / passed, num_steps, passed, _cpu(server) - cpu)


def _cpu(server: psutil.Process) -> float:
    times = server.cpu_times()
    return times.user + times.system


# ---- pages


@contextmanager
def pages(base_url: str, number: int) -> Iterator[Callable[[], int]]:
    context = multiprocessing.get_context("spawn")
    are_open, end, queue = context.Event(), context.Event(), context.Queue()
    process = context.Process(target=_read_pages, args=(base_url, number, are_open, end, queue), daemon=True)
    process.start()
    if not are_open.wait(60):
        raise SystemExit("The pages did not open.")
    counted: list[int] = []
    try:
        yield lambda: counted[0]
    finally:
        end.set()
        counted.append(queue.get(timeout=60))
        process.join()


def _read_pages(base_url: str, number: int, are_open: Event, end: Event, queue: Any) -> None:
    queue.put(asyncio.run(_read_all(base_url, number, are_open, end)))


async def _read_all(base_url: str, number: int, are_open: Event, end: Event) -> int:
    counts = [0] * number
    tasks = [asyncio.create_task(_read_page(base_url, counts, place)) for place in range(number)]
    while not all(counts):  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    are_open.set()
    await asyncio.to_thread(end.wait)
    for task in tasks:
        task.cancel()
    return sum(counts)


async def _read_page(base_url: str, counts: list[int], place: int) -> None:
    address = urlsplit(base_url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(f"GET /dashboard/events HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
    while line := await reader.readline():
        counts[place] += line.startswith(b"event:")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ |= {"TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
    with tempfile.TemporaryDirectory(prefix="tx_async-bench-") as folder:
        model = make_qwen3(Path(folder) / "model")
        with running_server(model, data_dir=Path(folder) / "server", compilation_cache_dir=cache) as server:
            result = measure(server.base_url, str(model), server.pid, options)
    if options.json:
        print(json.dumps(result))
    print(
        f"{result['tokens_per_s_without']:.0f} tokens/s without pages, {result['tokens_per_s_with']:.0f} with "
        f"{options.pages}: {result['cost_percent']:.1f} %; the pages take "
        f"{result['server_cpu_percent_for_pages']:.1f} % of a core (load average {result['load_average']:.1f})"
    )


if __name__ == "__main__":
    main()
