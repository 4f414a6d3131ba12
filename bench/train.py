"""What a training loop waits for: tokens per second through the SDK, on any Tinker-compatible server.

    python bench/train.py --base-url URL --base-model NAME [--vocab 32000] [--rank 8] [--cases uniform mixed …] [--json]

- uniform: 16 sequences of 256 tokens a batch; forward: the same, forward only;
- mixed: 16 sequences of 32 to 512 tokens, other lengths in every batch; the first pass is reported by itself, for what
  compiling costs there;
- tenants4, tenants8: uniform, split among as many clients that train at the same time;
- single: one sequence of 256 tokens from each of eight clients at the same time.

Every batch is a forward_backward (or forward) and an optim_step. A warm-up batch comes first, except for mixed. Each
case ends after --seconds, with the batch that is running then.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import numpy as np

os.environ |= {"TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
import tinker

TIMEOUT_S = 900
CASES = {"uniform": 1, "mixed": 1, "tenants4": 4, "tenants8": 8, "single": 8, "forward": 1}
"""Clients of each case."""
FIRST_PASS_BATCHES = 3


class Trainer:
    """One tenant with an adapter of its own."""

    def __init__(self, options: argparse.Namespace, seed: int):
        service = tinker.ServiceClient(base_url=options.base_url, api_key=options.api_key)
        client: Any = service.create_lora_training_client(base_model=options.base_model, rank=options.rank, seed=seed)
        self.client = client.result() if hasattr(client, "result") else client
        self.random, self.vocab = np.random.default_rng(seed), options.vocab

    def batch(self, lengths: list[int], forward_only: bool = False) -> int:
        """Train (or only look at) one batch, wait for it. Returns its tokens."""
        data = [self._datum(length) for length in lengths]
        if forward_only:
            self.client.forward(data, "cross_entropy").result(timeout=TIMEOUT_S)
        else:
            trained = self.client.forward_backward(data, "cross_entropy")
            stepped = self.client.optim_step(tinker.AdamParams(learning_rate=1e-4))
            trained.result(timeout=TIMEOUT_S)
            stepped.result(timeout=TIMEOUT_S)
        return sum(lengths)

    def _datum(self, length: int) -> tinker.Datum:
        tokens = self.random.integers(0, self.vocab, length + 1)
        inputs = {"target_tokens": tokens[1:].astype(np.int64), "weights": np.ones(length, np.float32)}
        return tinker.Datum(
            model_input=tinker.ModelInput.from_ints(tokens[:-1].tolist()),
            loss_fn_inputs={name: tinker.TensorData.from_numpy(value) for name, value in inputs.items()},
        )

    def lengths(self, case: str) -> list[int]:
        if case == "mixed":
            return self.random.integers(32, 513, 16).tolist()
        return [256] * (1 if case == "single" else 16 // CASES[case])


def run(case: str, trainers: list[Trainer], seconds: float) -> dict[str, float]:
    """All trainers of a case at once, each for `seconds`."""
    found: dict[str, float] = {}
    if case == "mixed":
        start = time.perf_counter()
        tokens = sum(trainers[0].batch(trainers[0].lengths(case)) for _ in range(FIRST_PASS_BATCHES))
        found["first_pass_s"] = time.perf_counter() - start
        found["first_pass_tokens_per_s"] = tokens / found["first_pass_s"]

    def train(trainer: Trainer, until: float) -> tuple[int, int]:
        batches = tokens = 0
        while time.perf_counter() < until or not batches:
            tokens += trainer.batch(trainer.lengths(case), case == "forward")
            batches += 1
        return batches, tokens

    with ThreadPoolExecutor(len(trainers)) as threads:
        if case != "mixed":
            list(threads.map(lambda trainer: train(trainer, 0), trainers))
        start = time.perf_counter()
        done = list(threads.map(lambda trainer: train(trainer, start + seconds), trainers))
        elapsed = time.perf_counter() - start
    batches, tokens = (sum(column) for column in zip(*done, strict=True))
    found |= {"tokens_per_s": tokens / elapsed, "batches": batches, "elapsed_s": elapsed}
    return found | {"slowest_share": min(t for _, t in done) * len(done) / tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--base-model", required=True, help="its name on the server")
    parser.add_argument("--api-key", default="tml-dummy")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20, help="of each case, after its warm-up")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--json", action="store_true", help="JSON only")
    options = parser.parse_args()
    trainers = [Trainer(options, seed) for seed in range(max(CASES[case] for case in options.cases))]
    results: dict[str, dict[str, Any]] = {}
    for case in options.cases:
        try:
            results[case] = run(case, trainers[: CASES[case]], options.seconds)
        except Exception as error:  # this server cannot do this one; the others still count
            results[case] = {"failed": repr(error)[:300]}
        print(_line(case, results[case]), file=sys.stderr, flush=True)
    answer = {"benchmark": "train", "server": options.base_url, "sdk": version("tinker"), "results": results}
    print(json.dumps(answer, indent=None if options.json else 1))
    if not options.json:
        print(", ".join(_line(case, result) for case, result in results.items()))
    if any("failed" in result for result in results.values()):
        sys.exit(1)


def _line(case: str, result: dict[str, Any]) -> str:
    return f"{case}: {result['failed'] if 'failed' in result else format(result['tokens_per_s'], '.0f') + ' tokens/s'}"


if __name__ == "__main__":
    main()
