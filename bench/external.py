"""What a server in front of vLLM costs: samples/s through it, and of vLLM alone with the same requests.

    VLLM_VENV=... python bench/external.py [--requests 8] [--samples 16] [--tokens 64] [--rounds 3] [--json]

A 512-wide Qwen3 of 8 layers on a real vLLM (`testing/vllm_process.py`). "Through the server" is the SDK: requests of
`--samples` samples, journaled before and after. "Alone" is vLLM's own HTTP with the same prompts, seeds and lengths,
all at once, over the worker's own client. Rounds take turns, so whatever else runs meets both; the share is the ratio
of the medians. A third run, through a server whose journal forgets, tells what the journal's part is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

os.environ |= {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"), "HF_HUB_OFFLINE": "1", "TINKER_TELEMETRY": "0"}

import numpy as np
from journal_cost import FORGETFUL
from machine import MODEL

from tx_async.testing.models import make_qwen3
from tx_async.testing.server import ServerProcess, running_server
from tx_async.testing.vllm_process import running_vllm
from tx_async.wire.worker import BASE_SLOT, SequenceSpec
from tx_async.worker.dialect import EncodedPrompt
from tx_async.worker.vllm_http import VllmHttp

GOAL = 0.90
PROMPT_TOKENS = 32
BACKEND = {"max_lora_adapters": 1, "max_lora_rank": 8, "max_context_length": 256}
ATTACHED_S = 600.0


def prompts(number: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, MODEL["vocab_size"], PROMPT_TOKENS).astype(np.int32) for _ in range(number)]


def alone(url: str, model: str, args: argparse.Namespace, seed: int) -> float:
    """Seconds."""

    async def run() -> float:
        client = VllmHttp(url)
        asked = [(EncodedPrompt(prompt), index) for prompt in prompts(args.requests) for index in range(args.samples)]
        started = time.perf_counter()
        await asyncio.gather(
            *(client.complete(model, prompt, _spec(args.tokens, seed, index)) for prompt, index in asked)
        )
        seconds = time.perf_counter() - started
        await client.close()
        return seconds

    return asyncio.run(run())


def _spec(tokens: int, seed: int, index: int) -> SequenceSpec:
    return SequenceSpec(
        sequence_id=0, sampler_slot=BASE_SLOT, adapter_version="", prompt_index=0, max_tokens=tokens, seed=seed,
        sample_index=index,
    )  # fmt: skip


def through(sampler: Any, args: argparse.Namespace, seed: int) -> float:
    """Seconds."""
    import tinker

    params = tinker.SamplingParams(max_tokens=args.tokens, temperature=1.0, seed=seed, stop=[])
    started = time.perf_counter()
    futures = [
        sampler.sample(tinker.ModelInput.from_ints(prompt.tolist()), num_samples=args.samples, sampling_params=params)
        for prompt in prompts(args.requests)
    ]
    for future in futures:
        assert len(future.result().sequences) == args.samples
    return time.perf_counter() - started


@contextlib.contextmanager
def serving(folder: Path, model: Path, url: str, forgetful: bool) -> Iterator[Any]:
    """A sampling client of a server whose vLLM is trusted."""
    import tinker

    with running_server(
        model, data_dir=folder, backend_config=BACKEND, external_inference_url=url, ready=False
    ) as server:
        if forgetful:
            (folder / "forgetful.py").write_text(FORGETFUL)
            server.kill()
            server.command = [sys.executable, str(folder / "forgetful.py"), *server.command[3:]]
            server.start()
        server.wait_ready()
        _wait_until_trusted(server)
        with tinker.ServiceClient(base_url=server.base_url, api_key="tml-bench") as service:
            yield service.create_sampling_client(base_model=str(model)).result()


def _wait_until_trusted(server: ServerProcess) -> None:
    deadline = time.monotonic() + ATTACHED_S
    trials = server.data_dir / "checkpoints" / "external-trials"
    while "serves" not in server.log() or list(trials.glob("*/metadata.json")):
        assert time.monotonic() < deadline, server.log_tail()
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    venv = Path(os.environ["VLLM_VENV"])
    with tempfile.TemporaryDirectory(prefix="tx-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        model = make_qwen3(folder / "model", tokenizer=True, **MODEL)
        vllm = stack.enter_context(running_vllm(venv, model, folder / "vllm.log"))
        durable = stack.enter_context(serving(folder / "sqlite", model, vllm.url, forgetful=False))
        runs: dict[str, list[float]] = {"vLLM alone": [], "through the server": []}
        alone(vllm.url, str(model), args, seed=0)  # what is computed first may wait for a compiler
        through(durable, args, seed=0)
        for seed in range(1, args.rounds + 1):
            runs["vLLM alone"].append(alone(vllm.url, str(model), args, seed))
            runs["through the server"].append(through(durable, args, seed))
        forgetful = stack.enter_context(serving(folder / "memory", model, vllm.url, forgetful=True))
        runs["through one that forgets"] = [through(forgetful, args, seed) for seed in range(1, args.rounds + 1)]
    report(args, {name: median(seconds) for name, seconds in runs.items()})


def report(args: argparse.Namespace, seconds: dict[str, float]) -> None:
    number = args.requests * args.samples
    share = seconds["vLLM alone"] / seconds["through the server"]
    journal = seconds["through the server"] / seconds["through one that forgets"] - 1
    figures = {name: number / value for name, value in seconds.items()}
    if args.json:
        print(json.dumps({"samples_per_s": figures, "share": share, "journal": journal, "goal": GOAL}))
        return
    for name, rate in figures.items():
        print(f"{name:26} {rate:8.1f} samples/s of {args.tokens} tokens")
    print(f"share of vLLM alone {share:.1%} (goal {GOAL:.0%}); the journal costs {journal:.1%}")


if __name__ == "__main__":
    main()
