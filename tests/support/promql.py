"""What a query asks for, by Prometheus's own grammar."""

from __future__ import annotations

from typing import Any

import promql_parser


def selectors(query: str) -> list[promql_parser.VectorSelector]:
    found: list[promql_parser.VectorSelector] = []

    def note(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(query), note)
    assert found, query
    return found


def matches(selector: promql_parser.VectorSelector, labels: dict[str, str]) -> bool:
    for matcher in selector.matchers.matchers:
        value = labels.get(matcher.name, "")
        assert matcher.op in (promql_parser.MatchOp.Equal, promql_parser.MatchOp.NotEqual)
        if (value == matcher.value) != (matcher.op == promql_parser.MatchOp.Equal):
            return False
    return True
