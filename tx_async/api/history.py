"""A run's history as JSON, or as CSV for plotting."""

from __future__ import annotations

import csv
import io
import re
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
_WEIGHT = re.compile(r"[01](\.\d{0,3})?", re.ASCII)


async def get_training_run_history(call: Call) -> TrainingRunHistory | Response:
    """`?format=csv`, or an `Accept` that prefers `text/csv` to JSON: with a header row."""
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
    return format == "csv" or (not format and prefers_csv(call.header("accept")))


def prefers_csv(accept: str) -> bool:
    """Whether an Accept header wants CSV more than JSON; where it wants both the same, whether it names CSV first."""
    ranges = [_media_range(entry) for entry in accept.split(",")]
    (csv_weight, csv_place), (json_weight, json_place) = (
        _wanted(ranges, kind) for kind in ("text/csv", "application/json")
    )
    return csv_weight > json_weight or (csv_weight == json_weight > 0 and csv_place < json_place)


def _media_range(entry: str) -> tuple[str, float]:
    """(media range, weight); a weight that is no number is none."""
    name, *parameters = (part.strip().lower() for part in entry.split(";"))
    weight = next((part[2:] for part in parameters if part.startswith("q=")), "1")
    return name, float(weight) if _WEIGHT.fullmatch(weight) else 0.0


def _wanted(ranges: Sequence[tuple[str, float]], kind: str) -> tuple[float, int]:
    """(the weight of a media type, where it is named): the range that says most about it counts."""
    for name in (kind, kind.partition("/")[0] + "/*", "*/*"):
        if places := [place for place, (given, _) in enumerate(ranges) if given == name]:
            return ranges[places[0]][1], places[0]
    return 0.0, len(ranges)


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
