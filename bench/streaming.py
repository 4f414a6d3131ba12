"""What somebody who reads along waits for: time to the first token, gaps, tokens per second, over the OpenAI-compatible
route `/oai/api/v1/completions` with `stream`.

    python bench/streaming.py --base-url URL --base-model NAME [--vocab 32000] [--cases alone streams …] [--json]

- alone: one stream of 64 tokens on an idle server, several times.
- streams: 64 streams of 32 tokens at once.
- streams_and_training: the same while a client trains all the time.
- beside_long: one stream at a time while 32 samples run through the SDK.
- beside_long_and_training: the same while a client trains all the time.

Prompts are random tokens and nothing stops early. A stream tells its tokens in pieces, one for each quantum: a gap is
the time between two pieces, a token's time that from the first piece to the last one for each token in between. Each
case runs twice, and the second run counts. loop_late is how late the timers of the server's event loop came, loop_held
how much of it the loop's own work can have caused (each the bound of a bucket of its histogram), bare the same as
loop_late in a process that does nothing else, at the same time.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from sample import Client

ROUTE = "/oai/api/v1/completions"
TIMEOUT_S = 600
REPEATS = 5
STREAM_TOKENS = 64
MANY, MANY_TOKENS = 64, 32
LONG, LONG_TOKENS = 32, 256
BARE_LOOP = """
import sys, threading, time
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
while not ended.is_set():
    due = time.monotonic() + 0.02
    time.sleep(0.02)
    print(max(0.0, time.monotonic() - due))
"""


@dataclass
class Stream:
    """When its pieces came, in seconds since it was asked for, and how many tokens each had."""

    times: list[float]
    sizes: list[int]

    @property
    def first_s(self) -> float:
        return self.times[0]

    @property
    def gaps(self) -> list[float]:
        return np.diff(self.times).tolist()

    @property
    def token_s(self) -> float:
        return (self.times[-1] - self.times[0]) / max(1, sum(self.sizes[1:]))


@dataclass
class LoopLag:
    """How late the server's event loop was, from its metrics: upper bound in seconds -> how often, for each kind."""

    counts: dict[str, dict[float, float]]

    @classmethod
    def of(cls, metrics: str) -> LoopLag:
        found = re.findall(r'^tx_async_event_loop_(\w+)_seconds_bucket\{le="([^"]+)"\} (\S+)$', metrics, re.MULTILINE)
        counts: dict[str, dict[float, float]] = {}
        for kind, bound, count in found:
            counts.setdefault(kind, {})[float(bound)] = float(count)
        return cls(counts)

    def since(self, before: LoopLag) -> dict[str, float]:
        """The bounds within which 99 % and all of the times lay, in milliseconds."""
        found = {}
        for kind, now in self.counts.items():
            new = {bound: count - before.counts[kind][bound] for bound, count in now.items()}
            total = max(new.values())
            for name, share in (("p99", 0.99), ("worst", 1.0)):
                found[f"loop_{kind}_{name}_ms"] = 1000 * min(b for b, count in new.items() if count >= share * total)
        return found


@contextmanager
def bare_loop() -> Iterator[dict[str, float]]:
    """How late the timers of a process that does nothing else come meanwhile: what the machine does to everybody."""
    found: dict[str, float] = {}
    command = [sys.executable, "-c", BARE_LOOP]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield found
        output, _ = process.communicate(b"")
    late = sorted(map(float, output.split()))
    found |= {"bare_p99_ms": 1000 * late[int(0.99 * (len(late) - 1))], "bare_worst_ms": 1000 * late[-1]}


class Server:
    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.address = urllib.parse.urlsplit(options.base_url)
        #: the SDK's side: long samples and training
        self.client = Client(options.base_url, options.base_model, options.api_key, options.vocab)

    def stream(self, prompt: list[int], max_tokens: int) -> Stream:
        assert self.address.hostname is not None
        connection = http.client.HTTPConnection(self.address.hostname, self.address.port, timeout=TIMEOUT_S)
        body = {
            "model": self.options.base_model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 1.0,
            "seed": 1,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
        }
        headers = {"Authorization": f"Bearer {self.options.api_key}", "Content-Type": "application/json"}
        began, stream = time.perf_counter(), Stream([], [])
        connection.request("POST", ROUTE, json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {response.read()[:300]!r}")
        for line in response:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            tokens = sum(len(choice.get("token_ids") or ()) for choice in json.loads(line[6:])["choices"])
            if tokens:
                stream.times.append(time.perf_counter() - began)
                stream.sizes.append(tokens)
        connection.close()
        if sum(stream.sizes) != max_tokens:
            raise RuntimeError(f"{sum(stream.sizes)} tokens came of {max_tokens}")
        return stream

    def loop(self) -> LoopLag:
        with urllib.request.urlopen(f"{self.options.base_url}/metrics", timeout=TIMEOUT_S) as response:
            return LoopLag.of(response.read().decode())

    def one_by_one(self) -> list[Stream]:
        return [self.stream(self.client.prompt(16), STREAM_TOKENS) for _ in range(REPEATS)]

    @contextmanager
    def long_samples(self) -> Iterator[None]:
        """So many run, all the time."""
        stop, slots = threading.Event(), threading.Semaphore(LONG)
        running: list[Future] = []

        def keep_up() -> None:
            while not stop.is_set():
                if slots.acquire(timeout=0.05):
                    sample = self.client.sample(self.client.prompt(32), LONG_TOKENS).future()
                    sample.add_done_callback(lambda _: slots.release())
                    running.append(sample)

        thread = threading.Thread(target=keep_up, daemon=True)
        thread.start()
        time.sleep(2.0)
        try:
            yield
        finally:
            stop.set()
            thread.join()
            for sample in running:
                sample.result(timeout=TIMEOUT_S)


def summary(streams: list[Stream]) -> dict[str, float]:
    gaps = [gap for stream in streams for gap in stream.gaps]
    return {
        "first_s": float(np.median([stream.first_s for stream in streams])),
        "first_worst_s": max(stream.first_s for stream in streams),
        "gap_ms": 1000 * float(np.median(gaps)),
        "gap_p99_ms": 1000 * float(np.quantile(gaps, 0.99)),
        "token_ms": 1000 * float(np.median([stream.token_s for stream in streams])),
    }


def alone(server: Server) -> dict[str, float]:
    return summary(server.one_by_one())


def streams(server: Server) -> dict[str, float]:
    began = time.perf_counter()
    with ThreadPoolExecutor(MANY) as pool:
        prompts = [server.client.prompt(16) for _ in range(MANY)]
        found = list(pool.map(lambda prompt: server.stream(prompt, MANY_TOKENS), prompts))
    tokens_per_s = MANY * MANY_TOKENS / (time.perf_counter() - began)
    return summary(found) | {"tokens_per_s": tokens_per_s}


def streams_and_training(server: Server) -> dict[str, float]:
    with server.client.training():
        return streams(server)


def beside_long(server: Server) -> dict[str, float]:
    with server.long_samples():
        return summary(server.one_by_one())


def beside_long_and_training(server: Server) -> dict[str, float]:
    with server.client.training() as ended, server.long_samples():
        before, began = len(ended), time.perf_counter()
        found = summary(server.one_by_one())
        return found | {"steps_per_s": (len(ended) - before) / (time.perf_counter() - began)}


CASES: dict[str, Callable[[Server], dict[str, float]]] = {
    case.__name__: case for case in (alone, streams, streams_and_training, beside_long, beside_long_and_training)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--base-model", required=True, help="its name on the server")
    parser.add_argument("--api-key", default="tml-bench")
    parser.add_argument("--vocab", type=int, default=32_000, help="random tokens lie below this")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    server, results = Server(options), {}
    for name in options.cases:
        CASES[name](server)
        before = server.loop()
        with bare_loop() as bare:
            results[name] = CASES[name](server)
            results[name] |= server.loop().since(before)
        results[name] |= bare
        line = "  ".join(f"{key} {value:.3f}" for key, value in results[name].items())
        print(f"{name:26s} {line}", file=sys.stderr if options.json else sys.stdout, flush=True)
    ratios = compared(results)
    if ratios:
        print("  ".join(f"{key} {value:.2f}" for key, value in ratios.items()), file=sys.stderr)
    if options.json:
        answer: dict[str, Any] = {"benchmark": "streaming", "server": options.base_url, "results": results | ratios}
        print(json.dumps(answer, indent=2))


def compared(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """What is promised: the first token beside everything against alone (3 at most), and gaps with training against
    gaps without (2 at most)."""
    if not {"alone", "beside_long", "beside_long_and_training"} <= results.keys():
        return {}
    everything = results["beside_long_and_training"]
    return {
        "first_to_alone": everything["first_s"] / results["alone"]["first_s"],
        "gap_to_without_training": everything["gap_ms"] / results["beside_long"]["gap_ms"],
        "token_to_without_training": everything["token_ms"] / results["beside_long"]["token_ms"],
    }


if __name__ == "__main__":
    main()
