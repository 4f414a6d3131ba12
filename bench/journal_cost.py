"""What the journal costs training: the same batches through a server on SQLite, and through one that forgets.

    python bench/journal_cost.py [--batches 6] [--tokens 4096] [--json]

Two servers with the same 512-wide Qwen3 of 8 layers, one on SQLite (WAL, synchronous=FULL), one whose journal lives in
memory. Each batch is a forward_backward of 256-token sequences and an optim_step through the SDK, waited for; the
servers take turns, so whatever else runs meets both. The cost is the ratio of the medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

os.environ |= {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"), "HF_HUB_OFFLINE": "1", "TINKER_TELEMETRY": "0"}

from train import Trainer
from train_floor import MODEL

from tx_async.testing.models import make_qwen3
from tx_async.testing.server import running_server

FORGETFUL = """
import sys, tx_async.app
from tx_async import cli
from tx_async.journal.journal import Journal
from tx_async.testing.memory_journal import MemoryJournal
tx_async.app.open_journal = lambda config: Journal(MemoryJournal())
sys.exit(cli.main(sys.argv[1:]))
"""
"""`tx-async serve` with nothing durable."""
SEQUENCE_TOKENS = 256
GOAL = 0.10


@contextlib.contextmanager
def trainers(folder: Path):
    """Name of the journal -> a tenant of its server."""
    model = make_qwen3(folder / "model", tokenizer=False, **MODEL)
    launcher = folder / "forgetful.py"
    launcher.write_text(FORGETFUL)
    with contextlib.ExitStack() as stack:
        servers = {}
        for name in ("sqlite", "memory"):
            server = stack.enter_context(running_server(model, data_dir=folder / name, ready=False))
            if name == "memory":
                server.kill()
                server.command = [sys.executable, str(launcher), *server.command[3:]]
                server.start()
            server.wait_ready()
            servers[name] = server
        options = {"api_key": "tml-bench", "base_model": str(model), "rank": 8, "vocab": MODEL["vocab_size"]}
        yield {
            name: Trainer(SimpleNamespace(base_url=server.base_url, **options), seed=0)  # type: ignore[arg-type]
            for name, server in servers.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=6, help="of each server, after a warm-up")
    parser.add_argument("--tokens", type=int, default=4096, help="of a batch")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lengths = [SEQUENCE_TOKENS] * max(1, options.tokens // SEQUENCE_TOKENS)
    with tempfile.TemporaryDirectory() as folder, trainers(Path(folder)) as of_journal:
        times: dict[str, list[float]] = {name: [] for name in of_journal}
        for turn in range(options.batches + 1):
            for name, trainer in of_journal.items():
                start = time.perf_counter()
                trainer.batch(lengths)
                if turn:
                    times[name].append(time.perf_counter() - start)
    medians = {name: median(values) for name, values in times.items()}
    cost = medians["sqlite"] / medians["memory"] - 1
    answer = {"benchmark": "journal_cost", "medians_s": medians, "cost": cost, "goal": GOAL, "runs_s": times}
    print(json.dumps(answer))
    if not options.json:
        print(f"journaling costs {100 * cost:+.1f} % of a batch of {sum(lengths)} tokens (goal: at most {GOAL:.0%})")


if __name__ == "__main__":
    main()
