"""What a rollout loop waits for: tokens per second and answer times through the SDK, on any Tinker-compatible server.

    python bench/sample.py --base-url URL --base-model NAME [--vocab 32000] [--cases one_prompt mixed …] [--json]

- one_prompt: 16 samples of 128 tokens of one prompt.
- mixed: 32 different prompts at once, max_tokens 16 to 256.
- short_alone, short_beside_long: a sample of 8 tokens on an idle server, and while 32 samples of 256 tokens run.
- short_beside_training, train_and_sample: the same sample, and mixed, while a client trains all the time.
- conversation: 8 turns, each with all that was said before and 24 new tokens.

Prompts are random tokens and nothing stops early (`stop=[]`): every server has the same work. The base model samples.
Each case runs twice, and the second run counts: the first one pays for compilation.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import numpy as np

os.environ |= {"TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
import tinker

TIMEOUT_S = 600
SHORT_REPEATS = 5
TRAIN_LENGTH = 256
TRAIN_ROWS = 4


class Client:
    """One user of the server: samples the base model, and trains an adapter where a case asks for it."""

    def __init__(self, base_url: str, base_model: str, api_key: str, vocab: int):
        self.service = tinker.ServiceClient(base_url=base_url, api_key=api_key)
        sampler: Any = self.service.create_sampling_client(base_model=base_model)
        self.sampler = sampler.result() if hasattr(sampler, "result") else sampler
        self.base_model, self.vocab = base_model, vocab
        self.random = np.random.default_rng(0)

    def prompt(self, length: int) -> list[int]:
        return self.random.integers(0, self.vocab, length).tolist()

    def sample(self, prompt: list[int], max_tokens: int, num_samples: int = 1) -> Future:
        params = tinker.SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=1, stop=[])
        model_input = tinker.ModelInput.from_ints(prompt)
        return self.sampler.sample(prompt=model_input, num_samples=num_samples, sampling_params=params)

    @contextmanager
    def training(self):
        """Trains in the background without a pause; yields the times at which steps have ended so far."""
        trainer: Any = self.service.create_lora_training_client(base_model=self.base_model, rank=8)
        trainer = trainer.result() if hasattr(trainer, "result") else trainer
        data = [self.datum() for _ in range(TRAIN_ROWS)]
        ended: list[float] = []
        stop = threading.Event()

        def loop() -> None:
            while not stop.is_set():
                step = trainer.forward_backward(data, "cross_entropy")
                update = trainer.optim_step(tinker.AdamParams(learning_rate=1e-5))
                step.result(timeout=TIMEOUT_S)
                update.result(timeout=TIMEOUT_S)
                ended.append(time.perf_counter())

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        try:
            while not ended:  # compilation is not what is measured
                time.sleep(0.05)
                if not thread.is_alive():
                    raise RuntimeError("training failed; its error is above")
            yield ended
        finally:
            stop.set()
            thread.join(TIMEOUT_S)

    def datum(self) -> tinker.Datum:
        tokens = self.prompt(TRAIN_LENGTH + 1)
        inputs = {
            "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64", shape=[TRAIN_LENGTH]),
            "weights": tinker.TensorData(data=[1.0] * TRAIN_LENGTH, dtype="float32", shape=[TRAIN_LENGTH]),
        }
        return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def num_tokens(futures: list[Future]) -> int:
    return sum(len(s.tokens) for future in futures for s in future.result(timeout=TIMEOUT_S).sequences)


def rate(run: Callable[[], list[Future]]) -> dict[str, float]:
    start = time.perf_counter()
    count = num_tokens(run())
    seconds = time.perf_counter() - start
    return {"tokens": count, "seconds": seconds, "tokens_per_s": count / seconds}


def one_prompt(client: Client) -> dict[str, float]:
    return rate(lambda: [client.sample(client.prompt(32), 128, num_samples=16)])


def mixed(client: Client) -> dict[str, float]:
    lengths = np.random.default_rng(1).integers(16, 257, 32)
    return rate(lambda: [client.sample(client.prompt(16 + 2 * i), int(n)) for i, n in enumerate(lengths)])


def short_alone(client: Client) -> dict[str, float]:
    times = []
    for _ in range(SHORT_REPEATS):
        start = time.perf_counter()
        client.sample(client.prompt(16), 8).result(timeout=TIMEOUT_S)
        times.append(time.perf_counter() - start)
    return {"seconds": float(np.median(times)), "worst_seconds": max(times)}


def short_beside_long(client: Client) -> dict[str, float]:
    running = [client.sample(client.prompt(32), 256) for _ in range(32)]
    time.sleep(0.5)
    answer = short_alone(client)
    num_tokens(running)
    return answer


def short_beside_training(client: Client) -> dict[str, float]:
    with client.training():
        return short_alone(client)


def train_and_sample(client: Client) -> dict[str, float]:
    """Training counts from the first step that ended meanwhile to the last one: whole steps, and their own time."""
    with client.training() as ended:
        first, answer = len(ended), mixed(client)
        times = ended[first:]
    steps_per_s = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    return answer | {"trained_tokens_per_s": steps_per_s * TRAIN_ROWS * TRAIN_LENGTH}


def conversation(client: Client) -> dict[str, float]:
    said, times = client.prompt(128), []
    for _ in range(8):
        said = said + client.prompt(24)
        start = time.perf_counter()
        (sequence,) = client.sample(said, 32).result(timeout=TIMEOUT_S).sequences
        times.append(time.perf_counter() - start)
        said = said + list(sequence.tokens)
    return {"seconds": sum(times), "first_turn_seconds": times[0], "last_turn_seconds": times[-1]}


CASES: dict[str, Callable[[Client], dict[str, float]]] = {
    case.__name__: case
    for case in (
        one_prompt,
        mixed,
        short_alone,
        short_beside_long,
        short_beside_training,
        train_and_sample,
        conversation,
    )
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
    client = Client(options.base_url, options.base_model, options.api_key, options.vocab)
    results: dict[str, Any] = {}
    for name in options.cases:
        try:
            CASES[name](client)
            results[name] = CASES[name](client)
        except Exception as error:  # this server cannot do this one; the others still count
            results[name] = {"failed": repr(error)[:300]}
        print(f"{name:24s} {_line(results[name])}", file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.json:
        answer = {"benchmark": "sample", "server": options.base_url, "sdk": version("tinker"), "results": results}
        print(json.dumps(answer, indent=2))
    if any("failed" in result for result in results.values()):
        sys.exit(1)


def _line(result: dict[str, Any]) -> str:
    return "  ".join(f"{key} {value:.3f}" if key != "failed" else f"failed: {value}" for key, value in result.items())


if __name__ == "__main__":
    main()
