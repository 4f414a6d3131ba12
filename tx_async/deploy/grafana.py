"""A Grafana dashboard over `/metrics`: rows of panels, each with its Prometheus queries. Pure.

The alert rules stand in `templates/alerts.yaml`. A test asks a running server for every metric that
either of them names.
"""

from __future__ import annotations

import json
from typing import Any

from msgspec import Struct

WIDTH = 24
"""The width of a dashboard in columns."""
PANEL_WIDTH, PANEL_HEIGHT = 8, 7
PERCENTILES = (0.5, 0.95, 0.99)


class Panel(Struct, frozen=True):
    title: str
    unit: str
    """The unit by Grafana's name for it."""
    queries: dict[str, str]
    """Legend -> PromQL."""
    is_stacked: bool = False


def percentiles(metric: str) -> dict[str, str]:
    return {
        f"{100 * p:.0f} %": f"histogram_quantile({p}, sum by (le) (rate({metric}_bucket[$__rate_interval])))"
        for p in PERCENTILES
    }


def by_kind(metric: str) -> dict[str, str]:
    return {
        "{{kind}}": f"histogram_quantile(0.95, sum by (le, kind) (rate({metric}_bucket[$__rate_interval])))",
    }


def rate(metric: str, by: str = "") -> str:
    grouped = f"sum by ({by}) " if by else "sum"
    return f"{grouped}(rate({metric}[$__rate_interval]))"


ROWS: dict[str, tuple[Panel, ...]] = {
    "Work": (
        Panel(
            "Tokens a second",
            "short",
            {
                "trained": rate("tx_async_scheduler_train_tokens_total"),
                "sampled": rate("tx_async_scheduler_sample_tokens_total"),
            },
        ),
        Panel(
            "What the device's time goes to",
            "percentunit",
            {
                "train": f"{rate('tx_async_scheduler_train_ms_total')} / 1000",
                "sample": f"{rate('tx_async_scheduler_sample_ms_total')} / 1000",
            },
            is_stacked=True,
        ),
        Panel(
            "Open requests",
            "short",
            {
                "all": "sum(tx_async_scheduler_requests_unfinished)",
                "samples": "sum(tx_async_scheduler_samples_open)",
                "run again after a loss": "sum(tx_async_scheduler_operations_to_replay)",
            },
        ),
        Panel("Waiting for a turn, 95 %", "s", by_kind("tx_async_queue_seconds")),
        Panel("Running, 95 %", "s", by_kind("tx_async_run_seconds")),
        Panel("How full micro-batches are", "percentunit", {
            "mean": f"{rate('tx_async_micro_batch_fill_sum')} / {rate('tx_async_micro_batch_fill_count')}",
        }),
    ),
    "Sampling": (
        Panel("Time to first token", "s", percentiles("tx_async_time_to_first_token_seconds")),
        Panel("Time per output token", "s", percentiles("tx_async_time_per_output_token_seconds")),
        Panel("KV cache in use", "percentunit", {
            "in use": "sum(tx_async_kv_cache_used_tokens) / sum(tx_async_kv_cache_tokens)",
        }),
        Panel("Prompt tokens from the prefix cache", "percentunit", {
            "found": f"{rate('tx_async_prefix_cache_hit_tokens_total')}"
            f" / {rate('tx_async_prefix_cache_lookup_tokens_total')}",
        }),
        Panel("Preemptions a second", "short", {"preemptions": rate("tx_async_preemptions_total")}),
    ),
    "Workers": (
        Panel("Workers", "short", {
            "ready": "sum(tx_async_router_workers_ready)",
            "attaching": "sum(tx_async_router_workers_attaching)",
            "lost in an hour": "sum(increase(tx_async_workers_lost_total[1h]))",
        }),
        Panel("Lease: longest silence", "s", {
            "silent": "max(tx_async_worker_lease_age_seconds)",
            "lost after": "max(tx_async_worker_lease_seconds)",
        }),
        Panel("Device memory", "bytes", {
            "in use": "max(tx_async_device_memory_used_bytes)",
            "planned": "max(tx_async_device_memory_planned_bytes)",
            "limit": "max(tx_async_device_memory_limit_bytes)",
        }),
        Panel("Programs compiled", "short", {"programs": "sum(increase(tx_async_compilations_total[5m]))"}),
        Panel("Time spent compiling", "percentunit", {"compiling": rate("tx_async_compile_seconds_total")}),
    ),
    "Durability": (
        Panel("Commits", "s", percentiles("tx_async_commit_seconds")),
        Panel("Waiting for the disk", "bytes", {"bytes": "sum(tx_async_journal_waiting_bytes)"}),
        Panel("Failures", "short", {
            "{{operation}}: {{cause}}": "sum by (operation, cause) (increase(tx_async_failed_total[5m]))",
            "commits": "sum(increase(tx_async_journal_failed_commits_total[5m]))",
        }),
        Panel("Bytes of keys", "bytes", {"{{of}} {{role}} {{key}}": "sum by (of, role, key) (tx_async_key_bytes)"}),
    ),
    "HTTP": (
        Panel("Answers a second", "reqps", {
            "{{status}}": rate("tx_async_http_request_seconds_count", "status"),
        }, is_stacked=True),
        Panel("Answers, 95 %", "s", {
            "{{route}}": "histogram_quantile(0.95, sum by (le, route)"
            " (rate(tx_async_http_request_seconds_bucket[$__rate_interval])))",
        }),
        Panel("Polls that wait", "short", {"polls": "sum(tx_async_scheduler_polls_waiting)"}),
        Panel("Memory of the server", "bytes", {"resident": "sum(process_resident_memory_bytes)"}),
    ),
}  # fmt: skip


def dashboard(name: str) -> str:
    """The dashboard, as JSON, of a server that calls itself `name`."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append(
            {"type": "row", "title": title, "collapsed": False, "gridPos": _place(0, y, WIDTH, 1), "panels": []}
        )
        for index, panel in enumerate(row):
            column, line = index % (WIDTH // PANEL_WIDTH), index // (WIDTH // PANEL_WIDTH)
            place = _place(column * PANEL_WIDTH, y + 1 + line * PANEL_HEIGHT, PANEL_WIDTH, PANEL_HEIGHT)
            panels.append(_panel(panel, place))
        y += 1 + PANEL_HEIGHT * -(-len(row) // (WIDTH // PANEL_WIDTH))
    return json.dumps(_frame(name, [panel | {"id": number} for number, panel in enumerate(panels, 1)]), indent=1) + "\n"


def _frame(name: str, panels: list[dict[str, Any]]) -> dict[str, Any]:
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
    return {
        "title": f"tx_async {name}".strip(),
        "uid": "tx-async",
        "tags": ["tx_async"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source]},
        "panels": panels,
    }


def _panel(panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    custom: dict[str, Any] = {"lineWidth": 1, "fillOpacity": 20 if panel.is_stacked else 5}
    if panel.is_stacked:
        custom["stacking"] = {"mode": "normal"}
    return {
        "type": "timeseries",
        "title": panel.title,
        "datasource": source,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": source, "expr": query, "legendFormat": legend}
            for index, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def _place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}
