"""The same work here and on what else a user would take, in turn: tokens per second, and ours against theirs.

    PEERS_VENV=A[:B] python bench/peers.py [--rounds 3] [--json]

Each environment that PEERS_VENV names takes part with what it has: transformers, PEFT and torch train (16 sequences of
256 tokens, or of 32 to 512) and sample; vLLM samples (16 answers of one prompt, 32 mixed prompts), with and without an
adapter. A 512-wide Qwen3 of 8 layers and 32,000 tokens, LoRA of rank 8 on every linear layer. Everybody's first round
is not counted; then they take turns, one at a time, so that whatever else runs meets all. Ours is a whole server,
asked through the SDK.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

os.environ |= {"HF_HUB_OFFLINE": "1", "TINKER_TELEMETRY": "0", "TRANSFORMERS_VERBOSITY": "error"}

import numpy as np
import peers_work as work
import psutil
from machine import MODEL, describe

from tx_async.testing.models import make_qwen3
from tx_async.testing.server import running_server
from tx_async.testing.vllm_process import running_vllm
from tx_async.wire.worker import BASE_SLOT, SequenceSpec
from tx_async.worker.dialect import EncodedPrompt
from tx_async.worker.vllm_http import VllmHttp

HERE = Path(__file__).parent
ADAPTER, OURS = "adapter", "ours"
BACKEND = {"max_lora_adapters": 2, "max_lora_rank": work.RANK, "max_context_length": 1024}
Run = Callable[[int], int]
"""round -> tokens."""


class Rate(NamedTuple):
    """Tokens per second: by the clock, and of processor time, summed over the processes of the one that is asked. The
    second suffers less from whatever else runs."""

    wall: float
    cpu: float


class Peer(NamedTuple):
    """One that takes part, and its answer to each case that it can do."""

    name: str
    pid: int
    """Of the process that does the work, with its descendants."""
    runs: dict[str, Run]

    def cpu_s(self) -> float:
        process = psutil.Process(self.pid)
        return sum(sum(one.cpu_times()[:2]) for one in (process, *process.children(recursive=True)))

    def rate(self, case: str, number: int) -> Rate:
        wall, cpu = time.perf_counter(), self.cpu_s()
        tokens = self.runs[case](number)
        return Rate(tokens / (time.perf_counter() - wall), tokens / (self.cpu_s() - cpu))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", metavar="TEXT", default="", help="the cases that begin with it: 'sample mixed', …")
    parser.add_argument("--json", action="store_true", help="on one line")
    options = parser.parse_args()
    venvs = [Path(name) for name in os.environ.get("PEERS_VENV", "").split(":") if name]
    if not venvs:
        parser.error("PEERS_VENV names no environment: one with transformers, peft and torch, or with vllm")
    with tempfile.TemporaryDirectory(prefix="tx-peers-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        model = make_qwen3(folder / "model", **MODEL)
        peers = [stack.enter_context(ours(model, folder))]
        for venv in venvs:
            peers.append(stack.enter_context((vllm if has(venv, "vllm") else peft)(venv, model, folder)))
        cases = [case for case in peers[0].runs if case.startswith(options.only)]
        report(measure(peers, cases, options.rounds), options.json)


def has(venv: Path, module: str) -> bool:
    found = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([venv / "bin/python", "-c", found], check=False).returncode == 0


def measure(peers: list[Peer], cases: list[str], rounds: int) -> dict[str, dict[str, Rate]]:
    """case -> who -> medians."""
    found: dict[str, dict[str, Rate]] = {}
    for case in cases:
        rates: dict[str, list[Rate]] = {peer.name: [] for peer in peers if case in peer.runs}
        for number in range(rounds + 1):
            for peer in peers:
                if peer.name in rates:
                    rates[peer.name].append(peer.rate(case, number))
        # What comes first may wait for a compiler.
        found[case] = {who: Rate(*map(median, zip(*of[1:], strict=True))) for who, of in rates.items()}
        told = "   ".join(f"{who} {rate.wall:.0f} ({rate.cpu:.0f} a CPU second)" for who, rate in found[case].items())
        print(f"{case:28}{told}", file=sys.stderr, flush=True)
    return found


def report(found: dict[str, dict[str, Rate]], as_json: bool) -> None:
    """Ratios say how many times as fast ours is."""
    ratios = {
        case: {
            who: Rate(rates[OURS].wall / rate.wall, rates[OURS].cpu / rate.cpu)._asdict()
            for who, rate in rates.items()
            if who != OURS
        }
        for case, rates in found.items()
    }
    rates = {case: {who: rate._asdict() for who, rate in of.items()} for case, of in found.items()}
    answer = {"machine": describe(), "tokens_per_s": rates, "ours_against": ratios}
    print(json.dumps(answer, indent=None if as_json else 1))


# ---- ours


@contextlib.contextmanager
def ours(model: Path, folder: Path) -> Iterator[Peer]:
    """Does every case. What it trained is exported for the others to sample with."""
    import tinker

    with (
        running_server(model, data_dir=folder / "server", backend_config=BACKEND) as server,
        tinker.ServiceClient(base_url=server.base_url, api_key="tml-bench") as service,
    ):
        trainer = service.create_lora_training_client(
            base_model=str(model), rank=work.RANK, train_unembed=False
        ).result()
        base = service.create_sampling_client(base_model=str(model)).result()
        _train(tinker, trainer, "uniform", 0)
        adapted = trainer.save_weights_and_get_sampling_client().result()
        trainer.save_state(ADAPTER).result()
        _export(server.data_dir / "checkpoints", folder / ADAPTER)

        runs: dict[str, Run] = {f"train {case}": partial(_train, tinker, trainer, case) for case in work.CASES["train"]}
        for case in work.CASES["sample"]:
            runs[f"sample {case}"] = partial(_sample, tinker, base, case)
            runs[f"sample {case}, adapter"] = partial(_sample, tinker, adapted, case)
        yield Peer(OURS, server.pid, runs)


def _train(tinker: Any, trainer: Any, case: str, seed: int) -> int:
    rows = work.sequences(case, seed)
    data = [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(row[:-1].tolist()),
            loss_fn_inputs={
                "target_tokens": tinker.TensorData.from_numpy(row[1:].astype(np.int64)),
                "weights": tinker.TensorData.from_numpy(np.ones(len(row) - 1, np.float32)),
            },
        )
        for row in rows
    ]
    trained = trainer.forward_backward(data, "cross_entropy")
    stepped = trainer.optim_step(tinker.AdamParams(learning_rate=1e-4))
    trained.result()
    stepped.result()
    return sum(map(len, rows))


def _sample(tinker: Any, client: Any, case: str, seed: int) -> int:
    asked = work.samples(case, seed)
    groups = [(asked[0][0], asked[0][1], len(asked))] if case == "one_prompt" else [(p, n, 1) for p, n in asked]
    futures = [
        client.sample(
            tinker.ModelInput.from_ints(prompt.tolist()),
            num_samples=times,
            sampling_params=tinker.SamplingParams(max_tokens=count, temperature=1.0, seed=seed, stop=[]),
        )
        for prompt, count, times in groups
    ]
    return sum(len(sequence.tokens) for future in futures for sequence in future.result().sequences)


def _export(checkpoints: Path, target: Path) -> None:
    """The adapter that was saved last, as a PEFT folder."""
    from tx_async.storage.checkpoint_files import ADAPTER as WEIGHTS
    from tx_async.storage.checkpoint_files import ADAPTER_CONFIG

    newest = max(checkpoints.rglob(WEIGHTS), key=lambda path: path.stat().st_mtime).parent
    target.mkdir()
    for file in (WEIGHTS, ADAPTER_CONFIG):
        (target / file).write_bytes((newest / file).read_bytes())


# ---- theirs


@contextlib.contextmanager
def peft(venv: Path, model: Path, _: Path) -> Iterator[Peer]:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(venv / "bin/python"), str(HERE / "peer_peft.py"), str(model)]
    with subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout

        def run(case: str, number: int) -> int:
            print(f"{case} {number}", file=process.stdin, flush=True)
            answer = process.stdout.readline()  # type: ignore[union-attr]
            if not answer:
                sys.exit(f"{' '.join(command)} ended: what it said is above")
            return int(answer)

        runs: dict[str, Run] = {f"train {case}": partial(run, f"train {case}") for case in work.CASES["train"]}
        runs |= {f"sample {case}, adapter": partial(run, f"sample {case}") for case in work.CASES["sample"]}
        yield Peer("PEFT", process.pid, runs)
        process.stdin.close()


@contextlib.contextmanager
def vllm(venv: Path, model: Path, folder: Path) -> Iterator[Peer]:
    with running_vllm(venv, model, folder / "vllm.log") as process:
        asyncio.run(_load(process.url, folder / ADAPTER))

        runs: dict[str, Run] = {}
        for case in work.CASES["sample"]:
            runs[f"sample {case}"] = partial(_complete, process.url, str(model), case)
            runs[f"sample {case}, adapter"] = partial(_complete, process.url, ADAPTER, case)
        yield Peer("vLLM", process.pid, runs)


async def _load(url: str, folder: Path) -> None:
    client = VllmHttp(url)
    await client.load_adapter(ADAPTER, str(folder))
    await client.close()


def _complete(url: str, name: str, case: str, seed: int) -> int:
    asked = work.samples(case, seed)

    async def run() -> None:
        client = VllmHttp(url)
        prompts = [EncodedPrompt(prompt.astype(np.int32)) for prompt, _ in asked]
        specs = [_spec(count, seed, index) for index, (_, count) in enumerate(asked)]
        await asyncio.gather(*(client.complete(name, *each) for each in zip(prompts, specs, strict=True)))
        await client.close()

    asyncio.run(run())
    return sum(count for _, count in asked)


def _spec(tokens: int, seed: int, index: int) -> SequenceSpec:
    return SequenceSpec(
        sequence_id=0, sampler_slot=BASE_SLOT, adapter_version="", prompt_index=0, max_tokens=tokens, seed=seed,
        sample_index=index,
    )  # fmt: skip


if __name__ == "__main__":
    main()
