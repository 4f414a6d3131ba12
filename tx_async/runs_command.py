"""`tx-async runs` and `tx-async run`: show what a running server says about its training runs."""

from __future__ import annotations

import urllib.parse

import msgspec

from tx_async import server_client
from tx_async.wire.dashboard import TrainingRunHistory, mean_loss
from tx_async.wire.tinker import TrainingRun


def newest(base_url: str, api_key: str, number: int = 0) -> list[TrainingRun]:
    """As many runs, most recently used first; all with 0."""
    found = server_client.everything(base_url, api_key, "/api/v1/training_runs", "training_runs", TrainingRun, number)
    # A run that is used between two pages moves to the front, and pushes another one onto the next page once more.
    return list({run.training_run_id: run for run in found}.values())


def history(base_url: str, api_key: str, run: str) -> list[dict[str, float]]:
    answer = server_client.call(base_url, api_key, "GET", _path(run))
    return msgspec.convert(answer, TrainingRunHistory).steps


def history_csv(base_url: str, api_key: str, run: str) -> str:
    return server_client.fetch(base_url, api_key, "GET", _path(run) + "?format=csv").decode()


def cells(row: dict[str, float]) -> list[str]:
    """The cells of one step for a person to read; - where nothing is known."""
    seconds = row.get("finished_at", 0.0) - row.get("started_at", 0.0)
    shown = {
        "step": row.get("step"),
        "learning_rate": row.get("learning_rate"),
        "loss": mean_loss(row),
        "grad_norm": row.get("grad_norm"),
        "tokens": row.get("tokens"),
        "tokens/s": row.get("tokens", 0.0) / seconds if seconds > 0 else None,
    }
    return ["-" if value is None else f"{value:.6g}" for value in shown.values()]


def _path(run: str) -> str:
    return f"/api/v1/training_runs/{urllib.parse.quote(run, safe=':')}/history"
