"""A run's history as JSON, or as CSV for plotting."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from starlette.responses import Response

from tx_async.api.context import Call
from tx_async.api.rest import readable_run
from tx_async.errors import InvalidRequest
from tx_async.wire.dashboard import TrainingRunHistory

FIRST_COLUMNS = (
    "index",
    "step",
    "started_at",
    "finished_at",
    "learning_rate",
    "loss:sum",
    "weights:sum",
    "tokens",
    "sequences",
    "num_batches",
    "grad_norm",
)
"""The first columns, in this order; others follow by name."""


async def get_training_run_history(call: Call) -> TrainingRunHistory | Response:
    """`?format=csv`, or `Accept: text/csv`: with a header row."""
    run = readable_run(call)
    as_csv = _is_csv(call)
    rows = call.scheduler.history(run.model_id)
    columns = columns_of(rows)
    if not as_csv:
        return TrainingRunHistory(training_run_id=run.model_id, columns=columns, steps=[dict(row) for row in rows])
    name = run.model_id.replace(":", "-")
    headers = {"content-disposition": f'attachment; filename="{name}.csv"'}
    return Response(to_csv(columns, rows), media_type="text/csv; charset=utf-8", headers=headers)


def _is_csv(call: Call) -> bool:
    format = call.query("format")
    if format not in ("", "json", "csv"):
        raise InvalidRequest(f"format is {format[:50]!r}; it must be json or csv.")
    return format == "csv" or (not format and "text/csv" in call.header("accept").lower())


def columns_of(rows: Sequence[Mapping[str, float]]) -> list[str]:
    names = {name for row in rows for name in row} | set(FIRST_COLUMNS)
    return [*FIRST_COLUMNS, *sorted(names - set(FIRST_COLUMNS))]


def to_csv(columns: Sequence[str], rows: Sequence[Mapping[str, float]]) -> str:
    """A cell is empty where a step has no such number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row.get(name)) for name in columns] for row in rows)
    return out.getvalue()


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
