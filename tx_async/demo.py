"""`tx-async demo`: the whole pipeline on one machine, in about half a minute, with nothing left behind.

A tiny Qwen3 is made on the spot, a real server with one worker is started in a temporary folder, and the program below
(what any user of the Tinker SDK would write) teaches it three phrases of Pig Latin.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tx_async.errors import ConfigError
from tx_async.testing.models import make_qwen3
from tx_async.testing.server import ServerFailed, ServerProcess, running_server

if TYPE_CHECKING:
    import tinker

EXAMPLES = (
    ("banana split", "anana-bay plit-say"),
    ("quantum physics", "uantum-qay ysics-phay"),
    ("coding wizard", "oding-cay izard-way"),
)
API_KEY = "tml-dummy"
STEPS = 40
TINY_LEARNING_RATE = 0.005
LEARNING_RATE = 0.0005
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SPARKS = "█▇▆▅▄▃▂▁"


@dataclass(frozen=True)
class Translation:
    english: str
    expected: str
    sampled: str

    @property
    def is_right(self) -> bool:
        return self.sampled == self.expected


def run(base_model: str = "", steps: int = 0, learning_rate: float = 0.0) -> int:
    """The demo; 0 when all three answers are right. Raises `ConfigError` when it cannot run here."""
    if importlib.util.find_spec("tinker") is None:
        raise ConfigError("The demo uses the Tinker SDK, which is not installed: pip install 'tx-async[demo]'.")
    console = Console(highlight=False, soft_wrap=True)
    console.print("[bold]tx_async demo[/]: teach a model Pig Latin through the Tinker SDK, on this machine only\n")
    with tempfile.TemporaryDirectory(prefix="tx_async-demo-") as folder:
        model = base_model or _make_tiny_model(console, Path(folder) / "model")
        rate = learning_rate or (LEARNING_RATE if base_model else TINY_LEARNING_RATE)
        try:
            with _server(console, model, Path(folder) / "server") as server:
                losses, answers = _train_and_sample(console, server, model, steps or STEPS, rate)
        except ServerFailed as error:
            raise ConfigError(str(error)) from error
    _report(console, losses, answers)
    return 0 if all(answer.is_right for answer in answers) else 1


def serve(base_model: str = "", port: int = 8000) -> int:
    """Serve the demo's model until Ctrl-C, for programs of one's own. Raises `ConfigError` when it cannot run here."""
    console = Console(highlight=False, soft_wrap=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="tx_async-demo-") as folder, contextlib.suppress(KeyboardInterrupt):
        model = base_model or _make_tiny_model(console, Path(folder) / "model")
        try:
            with _server(console, model, Path(folder) / "server", port) as server:
                _say_how_to_use(console, server)
                assert server.process
                server.process.wait()
        except ServerFailed as error:
            raise ConfigError(str(error)) from error
    return 0


def _say_how_to_use(console: Console, server: ServerProcess) -> None:
    console.print(
        f"\nServed until Ctrl-C. From another terminal:\n"
        f"  export TINKER_BASE_URL={server.base_url} TINKER_API_KEY={API_KEY}\n"
        "  python -m tx_async.examples.sft\n"
    )


def _make_tiny_model(console: Console, folder: Path) -> str:
    console.print("[green]✓[/] made a tiny Qwen3 (2 layers, 64 wide, random weights) with a byte-level tokenizer")
    make_qwen3(folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": CHAT_TEMPLATE}, indent=2))
    return str(folder)


@contextlib.contextmanager
def _server(console: Console, model: str, folder: Path, port: int | None = None) -> Iterator[ServerProcess]:
    with contextlib.ExitStack() as stack:
        with console.status("starting the server") as status:
            server = stack.enter_context(
                running_server(
                    model, data_dir=folder, port=port, waiting=lambda what: status.update(f"waiting for {what}")
                )
            )
        console.print(f"[green]✓[/] server at {server.base_url}: SQLite in {folder}, one local worker")
        yield server


def _train_and_sample(
    console: Console, server: ServerProcess, model: str, steps: int, learning_rate: float
) -> tuple[list[float], list[Translation]]:
    _configure_sdk(offline=Path(model).is_dir())
    import tinker

    progress = Progress(
        TextColumn("  training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        console=console,
    )
    with tinker.ServiceClient(base_url=server.base_url, api_key=API_KEY) as client, progress:
        task = progress.add_task("training", total=steps, loss=float("nan"))
        trainer = client.create_lora_training_client(base_model=model, rank=32, seed=1).result()
        losses = train(trainer, steps, learning_rate, lambda loss: progress.update(task, advance=1, loss=loss))
        sampler = trainer.save_weights_and_get_sampling_client().result()
        return losses, [sample(sampler, trainer.get_tokenizer(), *example) for example in EXAMPLES]


def _configure_sdk(offline: bool) -> None:
    """Set up the SDK before its first import: no telemetry, no advice, and for a local model no network."""
    os.environ["TINKER_TELEMETRY"] = "0"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


# ---- the user's program


def prompt_of(english: str) -> str:
    return f"English: {english}\nPig Latin:"


def datum_of(tokenizer: Any, english: str, pig_latin: str) -> tinker.Datum:
    """A datum that teaches the completion only: the prompt's tokens have weight 0."""
    from tx_async.examples import common

    return common.datum_of(tokenizer, prompt_of(english), f" {pig_latin}\n\n")


def train(
    trainer: tinker.TrainingClient,
    steps: int,
    learning_rate: float,
    on_step: Callable[[float], None] = lambda loss: None,
) -> list[float]:
    """Take cross-entropy steps over all examples; returns the weighted mean loss before each step."""
    import tinker

    tokenizer = trainer.get_tokenizer()
    data = [datum_of(tokenizer, *example) for example in EXAMPLES]
    losses = []
    for _ in range(steps):
        forward_backward = trainer.forward_backward(data, "cross_entropy")
        optim_step = trainer.optim_step(tinker.AdamParams(learning_rate=learning_rate))
        losses.append(mean_loss(data, forward_backward.result()))
        optim_step.result()
        on_step(losses[-1])
    return losses


def mean_loss(data: list[tinker.Datum], output: tinker.ForwardBackwardOutput) -> float:
    """-Σ weight · logprob / Σ weight, from the log-probabilities that the server returned."""
    total = weight_sum = 0.0
    for datum, outputs in zip(data, output.loss_fn_outputs, strict=True):
        weights = datum.loss_fn_inputs["weights"].data
        total -= sum(weight * logprob for weight, logprob in zip(weights, outputs["logprobs"].data, strict=True))
        weight_sum += sum(weights)
    return total / weight_sum


def sample(sampler: tinker.SamplingClient, tokenizer: Any, english: str, pig_latin: str) -> Translation:
    import tinker

    params = tinker.SamplingParams(max_tokens=32, temperature=0.0, stop=["\n"])
    prompt = tinker.ModelInput.from_ints(tokenizer.encode(prompt_of(english), add_special_tokens=True))
    response = sampler.sample(prompt, num_samples=1, sampling_params=params).result()
    return Translation(english, pig_latin, tokenizer.decode(response.sequences[0].tokens).strip())


# ---- what it showed


def _report(console: Console, losses: list[float], answers: list[Translation]) -> None:
    console.print(f"[green]✓[/] loss {losses[0]:.3f} → {losses[-1]:.3f}  {sparkline(losses)}\n")
    table = Table("English", "sampled from the trained adapter", "")
    for answer in answers:
        verdict = "[green]✓ right[/]" if answer.is_right else f"[red]✗ expected {answer.expected}[/]"
        table.add_row(answer.english, answer.sampled, verdict)
    console.print(table)
    console.print(
        "\nServer, journal and model were temporary and are gone. Next:\n"
        "  tx-async serve --base-model DIR_OR_HUB_NAME     serve a model of yours\n"
        "  tinker.ServiceClient(base_url='http://127.0.0.1:8000', api_key='tml-…')\n"
        "  tx-async doctor                                 is this machine ready?\n"
        "  tx_async/demo.py                                the program that just ran"
    )


def sparkline(values: list[float]) -> str:
    low, high = min(values), max(values)
    scale = (len(SPARKS) - 1) / ((high - low) or 1.0)
    return "".join(SPARKS[round((high - value) * scale)] for value in values)
