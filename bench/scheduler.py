"""How many decisions a second the scheduler's mind makes, without any I/O.

    python bench/scheduler.py [--models N] [--steps N] [--samples N]

`SchedulerState` and a worker whose mathematics costs next to nothing, in one thread: N models take turns through
forward_backward and optim_step while samples are drawn. Counted are facts (a request, an answer, …); their cost
includes packing rows, building results and msgpack of records. Processor time is that of the whole run, with its worker
and its disk in memory, for each accepted request: other programs change it less than the rate. `queued` repeats the
decision of one more request while many wait: it must not depend on how many. Prints a line for people on stderr and
JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import msgspec

from tx_async.config import ServerConfig
from tx_async.scheduler.core.facts import Fact
from tx_async.scheduler.quota import Quota

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/support is no part of the package

from tests.support.simulation import INFO
from tests.support.stage import Stage


class CountingStage(Stage):
    """Measures the time inside `SchedulerState.handle` alone."""

    num_facts = 0
    seconds = 0.0

    def handle(self, fact: Fact) -> None:
        began = time.perf_counter()
        instructions = self.state.handle(fact, self.now)
        self.seconds += time.perf_counter() - began
        self.num_facts += 1
        self._perform(instructions)


def new_stage() -> CountingStage:
    info = msgspec.structs.replace(INFO, num_training_slots=8, num_sampler_slots=8, num_sequences_max=64)
    return CountingStage(info=info)


def throughput(num_models: int, steps: int, num_samples: int) -> dict[str, float]:
    began = time.process_time()
    stage = new_stage()
    models = [stage.model(stage.new_session(f"t{i}")) for i in range(num_models)]
    samplers = [stage.sampler(f"t{i % num_models}") for i in range(num_samples)]
    for step in range(steps):
        for model in models:
            stage.train(model, 1, first_seq_id=2 * step + 1)
        for sampler in samplers:
            stage.ask(sampler, num_samples=4, max_tokens=8)
        stage.run(events_max=1_000_000)
    cpu_ms = 1e3 * (time.process_time() - began) / stage.num_requests
    rate = round(stage.num_facts / stage.seconds)
    return {"facts": stage.num_facts, "facts_per_s": rate, "cpu_ms_per_request": round(cpu_ms, 3)}


def queued(depth: int) -> float:
    """Microseconds to accept one more request while `depth` others wait."""
    stage = new_stage()
    stage.submissions.quota = Quota(ServerConfig(queued_requests_max=2 * depth + 400))  # half of it is one key's
    stage.worker = None
    stage.state.workers.clear()
    model = stage.model()
    for seq_id in range(1, depth + 1):
        stage.optim_step(model, seq_id)
    stage.seconds, stage.num_facts = 0.0, 0
    for seq_id in range(depth + 1, depth + 101):
        stage.optim_step(model, seq_id)
    return round(1e6 * stage.seconds / stage.num_facts, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--samples", type=int, default=16)
    args = parser.parse_args()
    rate = throughput(args.models, args.steps, args.samples)
    accept = {f"{depth} waiting": queued(depth) for depth in (10, 1_000, 4_000)}
    report = {
        "benchmark": "scheduler",
        "hardware": f"{os.cpu_count()} cores {platform.machine()}",
        **rate,
        "accept_us": accept,
    }
    print(
        f"{rate['facts_per_s']} decisions/s, {rate['cpu_ms_per_request']} ms of processor time for each request; "
        f"one more request costs {accept} µs",
        file=sys.stderr,
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
