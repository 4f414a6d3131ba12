"""`tx-async runs` and `tx-async run`: show what a running server says about its training runs."""

from __future__ import annotations

import urllib.parse

import msgspec

from tx_async import server_client
from tx_async.wire.dashboard import TrainingRunHistory
from tx_async.wire.tinker import TrainingRun

PAGE = 1000


def everything(base_url: str, api_key: str) -> list[TrainingRun]:
    """All runs, most recently used first."""
    found: list[TrainingRun] = []
    while True:
        path = f"/api/v1/training_runs?limit={PAGE}&offset={len(found)}"
        page = server_client.call(base_url, api_key, "GET", path).get("training_runs", [])
        found += msgspec.convert(page, list[TrainingRun])
        if len(page) < PAGE:
            return found


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


def mean_loss(row: dict[str, float]) -> float | None:
    """The mean loss of a token, weighted if the loss has weights."""
    count = row.get("weights:sum", row.get("tokens", 0.0))
    return row["loss:sum"] / count if count and "loss:sum" in row else None


def _path(run: str) -> str:
    return f"/api/v1/training_runs/{urllib.parse.quote(run, safe=':')}/history"
