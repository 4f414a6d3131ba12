"""`GET /metrics`: what the actors count, in Prometheus's text format.

An actor's `statistics()` returns a struct of `Counter` and `Gauge` fields. The field is the metric's only declaration,
as its source says it: `commits: Counter` of the journal is the counter `tx_async_journal_commits_total`, the docstring
below it is its HELP line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

from msgspec import Struct

from tx_async.field_docs import field_docs

Counter = float
"""Only rises, from 0 at the server's start."""
Gauge = float
"""What is the case now."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(statistics: Mapping[str, Struct]) -> str:
    """statistics: of each actor, by its name."""
    return "".join(line + "\n" for actor, struct in statistics.items() for line in _lines(actor, struct))


def _lines(actor: str, statistics: Struct) -> Iterator[str]:
    for field in _fields(type(statistics)):
        kind = field.type.lower()
        name = f"tx_async_{actor}_{field.name}" + ("_total" if kind == "counter" else "")
        yield f"# HELP {name} {field.doc}"
        yield f"# TYPE {name} {kind}"
        yield f"{name} {getattr(statistics, field.name):.12g}"


_fields = cache(field_docs)
