"""`GET /metrics`: what the actors count, in Prometheus's text format.

An actor's `statistics()` returns a struct of `Counter` and `Gauge` fields. The field is the metric's only declaration:
`commits: Counter` of the journal is `tx_async_journal_commits_total`, the docstring below it is its HELP line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, NamedTuple, get_type_hints

from msgspec import Meta, Struct

from tx_async.field_docs import field_docs

Counter = Annotated[float, Meta(extra={"kind": "counter"})]
"""Only rises, from 0 at the server's start."""
Gauge = Annotated[float, Meta(extra={"kind": "gauge"})]
"""What is the case now."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(statistics: Mapping[str, Struct]) -> str:
    """statistics: of each actor, by its name."""
    return "".join(line + "\n" for actor, struct in statistics.items() for line in _lines(actor, struct))


def _lines(actor: str, statistics: Struct) -> Iterator[str]:
    for metric in _declared(type(statistics)):
        name = f"tx_async_{actor}_{metric.field}" + ("_total" if metric.kind == "counter" else "")
        yield f"# HELP {name} {metric.help}"
        yield f"# TYPE {name} {metric.kind}"
        yield f"{name} {getattr(statistics, metric.field):.12g}"


class _Metric(NamedTuple):
    field: str
    kind: str
    help: str


@cache
def _declared(struct: type[Struct]) -> list[_Metric]:
    kinds = get_type_hints(struct, include_extras=True)
    return [_Metric(field.name, _kind(kinds[field.name]), field.doc) for field in field_docs(struct)]


def _kind(annotation: Any) -> str:
    (meta,) = (meta for meta in annotation.__metadata__ if isinstance(meta, Meta))
    return (meta.extra or {})["kind"]
