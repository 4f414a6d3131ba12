"""What the durability tests share: a user's training run through the real SDK, everything that it was told, and
everything that its server has stored; and ways to kill what serves it."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tests.support import fail_points
from tx_async.testing.server import ServerProcess, _server

SERVE_FAKE = Path(__file__).parents[2] / "tests" / "durability" / "serve_fake.py"
WINDOW = 6
"""Futures that the user's program has ahead."""


@contextlib.contextmanager
def serving(
    folder: Path,
    base_model: Path,
    *,
    fake: bool = True,
    ready: bool = True,
    environ: Mapping[str, str] | None = None,
    backend: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Iterator[ServerProcess]:
    """A server on `folder`, with workers that need no JAX (`fake`) or real ones. It is stopped, however it ends.
    `ready=False`: yield it as soon as it answers at all."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = {"max_context_length": 256, "max_lora_adapters": 4, "max_lora_rank": 8, **(backend or {})}
    server = _server(folder, base_model, backend, dict(environ or {}), dict(settings))
    if fake:
        server.command[1:3] = [str(SERVE_FAKE)]
    server.start()
    try:
        if fail_points.VARIABLE not in server.environ:  # else it may die before it is ready
            server.wait_ready() if ready else server.wait_accepting()
        yield server
        server.stop()
    finally:
        if server.process and server.process.poll() is None:
            server.kill()


@dataclass
class Told:
    """All that a client was told by its run."""

    logprobs: list[list[list[float]]] = field(default_factory=list)
    steps: list[dict[str, float]] = field(default_factory=list)
    samples: list[list[int]] = field(default_factory=list)
    sample_logprobs: list[list[float]] = field(default_factory=list)


def train(
    base_url: str, base_model: Path, steps: int, pace_s: float = 0.0, at: Mapping[int, Callable[[], None]] | None = None
) -> Told:
    """A pipelined loop: forward_backward, optim_step, now and then save_state and samples; at the end gradients that no
    step has used, saved as they are. Nothing in it knows of crashes; `at` is what happens to the server after a step
    was sent."""
    import tinker

    told = Told()
    with tinker.ServiceClient(base_url=base_url, api_key="tml-dummy") as service:
        trainer = service.create_lora_training_client(base_model=str(base_model), rank=8, seed=1).result()
        ahead: list[tuple[str, Any]] = []
        for step in range(steps):
            ahead.append(("forward_backward", trainer.forward_backward(batch(step), "cross_entropy")))
            ahead.append(("optim_step", trainer.optim_step(tinker.AdamParams(learning_rate=0.01))))
            if step % 4 == 3:
                ahead.append(("save_state", trainer.save_state(f"step-{step}")))
            while len(ahead) > WINDOW:
                _take(told, *ahead.pop(0))
            time.sleep(pace_s)
            (at or {}).get(step, lambda: None)()
        for entry in ahead:
            _take(told, *entry)
        sampler = trainer.save_weights_and_get_sampling_client().result()
        params = tinker.SamplingParams(max_tokens=12, temperature=1.0, seed=5)
        result = sampler.sample(tinker.ModelInput.from_ints([1, 2, 3]), num_samples=3, sampling_params=params).result()
        told.samples = [list(sequence.tokens) for sequence in result.sequences]
        told.sample_logprobs = [list(sequence.logprobs or []) for sequence in result.sequences]
        _take(told, "forward_backward", trainer.forward_backward(batch(steps), "cross_entropy"))
        trainer.save_state("end").result()
    return told


def batch(step: int) -> list[Any]:
    import tinker

    rng = np.random.default_rng(step)
    data = []
    for length in (7, 20, 33):
        tokens = rng.integers(0, 256, length + 1)
        data.append(
            tinker.Datum(
                model_input=tinker.ModelInput.from_ints(tokens[:-1].tolist()),
                loss_fn_inputs={
                    "target_tokens": tinker.TensorData(data=tokens[1:].tolist(), dtype="int64"),
                    "weights": tinker.TensorData(data=[1.0] * length, dtype="float32"),
                },
            )
        )
    return data


def _take(told: Told, kind: str, future: Any) -> None:
    result = future.result()
    if kind == "forward_backward":
        told.logprobs.append([output["logprobs"].tolist() for output in result.loss_fn_outputs])
    elif kind == "optim_step":
        told.steps.append(dict(result.metrics or {}))


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


# ---- what is stored


def stored(server: ServerProcess) -> dict[str, str]:
    """Hashes of all adapters' numbers: every saved state by name, and the newest snapshot of the (only) run, which has
    weights, Adam's moments and accumulated gradients. Call it when the server has stopped in order."""
    base = server.data_dir / "checkpoints"
    found: dict[str, str] = {}
    for file in sorted(base.rglob("*")):
        if file.suffix not in (".safetensors", ".npz") or ".incoming" in file.parts:
            continue
        _, kind, name, filename = file.relative_to(base).parts
        if kind == "snapshots":
            continue
        found[f"{kind}/{name.partition('~')[0]}/{filename}"] = _hash(file)
    files = [file for file in newest_snapshot(server).iterdir() if file.suffix in (".safetensors", ".npz")]
    return found | {f"newest snapshot/{file.name}": _hash(file) for file in files}


def newest_snapshot(server: ServerProcess) -> Path:
    """Its folder; the server has one run."""
    return max(snapshots(server), key=lambda path: int(path.name.partition("~")[0]))


def snapshots(server: ServerProcess) -> list[Path]:
    """Folders of all snapshots of all runs, known or not, whole or in part. A folder without files is none; it is
    removed hours later."""
    folders = (server.data_dir / "checkpoints").glob("*/snapshots/*")
    return [path for path in folders if path.is_dir() and any(path.iterdir())]


def _hash(file: Path) -> str:
    """Of the arrays by name, whatever stands around them."""
    if file.suffix == ".npz":
        arrays = dict(np.load(file))
    else:
        from safetensors.numpy import load_file

        arrays = load_file(file)
    state = hashlib.sha256()
    for name in sorted(arrays):
        state.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode() + arrays[name].tobytes())
    return state.hexdigest()[:16]


# ---- killing


def worker_pids(server: ServerProcess) -> list[int]:
    """The server's worker processes."""
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(server.pid).children(recursive=True)
        return [child.pid for child in children if "worker" in " ".join(child.cmdline())]
    return []


def kill_worker(server: ServerProcess) -> None:
    for pid in worker_pids(server):
        with contextlib.suppress(psutil.Error):
            psutil.Process(pid).send_signal(signal.SIGKILL)


def kill_server(server: ServerProcess) -> None:
    server.kill()
    server.start()


def kill_both(server: ServerProcess) -> None:
    pids = worker_pids(server)
    server.kill()
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            psutil.Process(pid).send_signal(signal.SIGKILL)
    server.start()


KILLS = {"worker": kill_worker, "server": kill_server, "both": kill_both}


@contextlib.contextmanager
def killing(
    server: ServerProcess, seed: int, kinds: tuple[str, ...], number: int, every_s: tuple[float, float]
) -> Iterator[list[str]]:
    """Kill something `number` times while the body runs, each kind in turn, at moments and in an order that the seed
    decides; each time, wait until the server is back. Yields what was killed so far."""
    killed: list[str] = []
    choose = random.Random(seed)
    order = itertools.cycle(choose.sample(kinds, len(kinds)))
    over = threading.Event()

    def kill_repeatedly() -> None:
        for _ in range(number):
            if over.wait(choose.uniform(*every_s)):
                return
            kind = next(order)
            killed.append(kind)
            KILLS[kind](server)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and not over.is_set() and server.get("/api/v1/healthz")[0] != 200:
                time.sleep(0.05)

    thread = threading.Thread(target=kill_repeatedly)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def reviving(server: ServerProcess) -> Iterator[None]:
    """Start the server again whenever it was killed while the body runs. One that ended by itself stays ended."""
    over = threading.Event()

    def revive() -> None:
        while not over.wait(0.02):
            if server.process is None or server.process.poll() == -signal.SIGKILL:
                server.start()

    thread = threading.Thread(target=revive)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
