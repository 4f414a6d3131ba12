"""What open pages cost a server that trains: processor time of its process with 0 and with 50 of them, in turn.

    python bench/dashboard.py [--pages 50] [--rounds 6] [--seconds 10] [--json]

A run takes a step (forward_backward of 16 sequences of 128 tokens and optim_step) four times a second, so that every
page has news all the time. Pages are connections in one process beside the server, and do what a browser's page of this
run does: they read `/dashboard/events`, and ask for the run's newest steps as often as these say. What is compared
is the processor time of the server's process (its event loop is one thread) in rounds without pages and with them: the
pages take a training loop no more than their share of that one core, however busy the machine is, which throughput on
a shared machine does not show.
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

import httpx
import numpy as np
import psutil

from tx_async.testing.models import make_qwen3
from tx_async.testing.server import running_server

ROOT = Path(__file__).parents[1]
SEQUENCES, TOKENS = 16, 128
WARM_UP_STEPS = 5
STEPS_PER_S = 4
API_KEY = "tml-bench"


class Round(NamedTuple):
    steps: int
    cpu_share: float
    """Processor time of the server's process, of one core."""


def measure(base_url: str, base_model: str, pid: int, options: argparse.Namespace) -> dict[str, Any]:
    import tinker

    with tinker.ServiceClient(base_url=base_url, api_key=API_KEY) as service:
        trainer = service.create_lora_training_client(base_model=base_model, rank=8).result()
        step, server = _step_of(trainer), psutil.Process(pid)
        for _ in range(WARM_UP_STEPS):
            step()
        rounds = [_both(base_url, trainer.model_id, step, server, options) for _ in range(options.rounds)]
    costs = [100 * (with_pages.cpu_share - without.cpu_share) for without, with_pages, _ in rounds]
    return {
        "server_cpu_percent_without": 100 * statistics.median(without.cpu_share for without, _, _ in rounds),
        "server_cpu_percent_for_pages": statistics.median(costs),
        "costs": [round(cost, 2) for cost in costs],
        "steps": [(without.steps, with_pages.steps) for without, with_pages, _ in rounds],
        "answers": sum(answers for _, _, answers in rounds),
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


def _both(
    base_url: str, run: str, step: Callable[[], None], server: psutil.Process, options: argparse.Namespace
) -> tuple[Round, Round, int]:
    """Without pages and with them, and the events and answers that these got."""
    without = _round(step, server, options.seconds)
    with pages(base_url, run, options.pages) as num_answers:
        with_pages = _round(step, server, options.seconds)
    return without, with_pages, num_answers()


def _round(step: Callable[[], None], server: psutil.Process, seconds: float) -> Round:
    num_steps, began, cpu = 0, time.perf_counter(), _cpu(server)
    while (passed := time.perf_counter() - began) < seconds:
        step()
        num_steps += 1
        time.sleep(max(0.0, num_steps / STEPS_PER_S - (time.perf_counter() - began)))
    return Round(num_steps, (_cpu(server) - cpu) / passed)


def _cpu(server: psutil.Process) -> float:
    times = server.cpu_times()
    return times.user + times.system


# ---- pages


@contextmanager
def pages(base_url: str, run: str, number: int) -> Iterator[Callable[[], int]]:
    context = multiprocessing.get_context("spawn")
    are_open, end, queue = context.Event(), context.Event(), context.Queue()
    process = context.Process(target=_read_pages, args=(base_url, run, number, are_open, end, queue), daemon=True)
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


def _read_pages(base_url: str, run: str, number: int, are_open: Event, end: Event, queue: Any) -> None:
    queue.put(asyncio.run(_read_all(base_url, run, number, are_open, end)))


async def _read_all(base_url: str, run: str, number: int, are_open: Event, end: Event) -> int:
    counts, every_s = [0] * number, [2.5] * number
    async with httpx.AsyncClient(base_url=base_url, timeout=60, limits=httpx.Limits(max_connections=None)) as client:
        readers = [_read_events(client, counts, every_s, place) for place in range(number)]
        readers += [_read_run(client, run, counts, every_s, place) for place in range(number)]
        tasks = [asyncio.create_task(reader) for reader in readers]
        while not all(counts):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        are_open.set()
        await asyncio.to_thread(end.wait)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return sum(counts)


async def _read_events(client: httpx.AsyncClient, counts: list[int], every_s: list[float], place: int) -> None:
    async with client.stream("GET", "/dashboard/events", timeout=None) as response:
        async for line in response.aiter_lines():
            counts[place] += line.startswith("event:")
            if line.startswith("data:"):
                every_s[place] = json.loads(line[5:]).get("read_every_s", every_s[place])


async def _read_run(client: httpx.AsyncClient, run: str, counts: list[int], every_s: list[float], place: int) -> None:
    since = 0
    while True:
        await asyncio.sleep(every_s[place])
        answer = (await client.get(f"/dashboard/runs/{run}", params={"since": since})).json()
        since = int(answer["steps"][-1]["index"]) + 1 if answer["steps"] else since
        counts[place] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=10.0)
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
        f"{options.pages} pages take {result['server_cpu_percent_for_pages']:.1f} % of a core; the run alone takes "
        f"{result['server_cpu_percent_without']:.1f} % (load average {result['load_average']:.1f})"
    )


if __name__ == "__main__":
    main()
