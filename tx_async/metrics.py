"""`GET /metrics`: what the server counts, for Prometheus.

An actor's `statistics()` returns a struct of `Counter` and `Gauge` fields. The field is the metric's only declaration:
`commits: Counter` of the journal is the counter `tx_async_journal_commits_total`, and the docstring below it is its
HELP line. Metrics that are not plain numbers (histograms, numbers by label) are declared once, in `Metrics`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache

import prometheus_client
from msgspec import Struct
from prometheus_client import CollectorRegistry, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric

from tx_async.field_docs import field_docs

Counter = float
"""A number that only rises, from 0 at the server's start."""
Gauge = float
"""A number that describes the present."""

PREFIX = "tx_async"
DEVICE_KINDS = ("forward_backward", "forward", "optim_step", "save_weights", "load_weights", "sample")
"""The kinds of requests that a device works on: values of the label `kind`."""
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
COMMIT_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
LATE_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 5)
TENTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

prometheus_client.disable_created_metrics()  # it would add a line for each series, which nobody reads


class Metrics:
    """The metrics of one server. Each is fed by one owner."""

    def __init__(self):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        # The scheduler's watch
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From a sample's acceptance until its first token.", SECONDS
        )
        self.time_per_output_token = self._histogram(
            "time_per_output_token_seconds", "Average time for one token of a sample.", TOKEN_SECONDS
        )
        self.queue = self._histogram(
            "queue_seconds", "From a request's acceptance until its first dispatch to a worker.", SECONDS, "kind"
        )
        self.run = self._histogram(
            "run_seconds",
            "From a request's first dispatch until its result, or a sample's last token.",
            SECONDS,
            "kind",
        )
        self.micro_batch_fill = self._histogram(
            "micro_batch_fill",
            "Tokens of a training micro-batch, as a fraction of the positions that it computes.",
            TENTHS,
        )
        # The journal
        self.commit = self._histogram("commit_seconds", "Time to make a transaction durable.", COMMIT_SECONDS)
        # The API
        self.http_request = self._histogram(
            "http_request_seconds",
            "Time to answer over HTTP; a poll for a result that is not ready waits for at most long_poll_ms.",
            SECONDS,
            "route",
            "status",
        )
        self.http_server_errors = prometheus_client.Counter(
            f"{PREFIX}_http_server_errors", "Answers with status 500: the log says why.", registry=self.registry
        )
        # The event loop
        self.event_loop_late = self._histogram(
            "event_loop_late_seconds", "How late a timer of the event loop comes; told 50 times a second.", LATE_SECONDS
        )
        self.event_loop_held = self._histogram(
            "event_loop_held_seconds", "How much of that the loop's own work can have caused.", LATE_SECONDS
        )
        for kind in DEVICE_KINDS:
            self.queue.labels(kind)
            self.run.labels(kind)

    def _histogram(self, name: str, doc: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", doc, labels, registry=self.registry, buckets=buckets)


class Scrape:
    """The content of one answer. The statistics are those of the moment it was made; the rest is read while it is
    encoded, on whatever thread does that."""

    def __init__(self, families: Iterable[Metric], metrics: Metrics):
        self._families = list(families)
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._families
        yield from self._metrics.registry.collect()

    def encode(self, accept: str = "") -> tuple[bytes, str]:
        """(text, its content type): Prometheus's own format, or OpenMetrics for whoever accepts that."""
        try:
            encode, content_type = choose_encoder(accept)
            return encode(self), content_type  # type: ignore[arg-type]
        except (ValueError, TypeError):  # a version that is not a number
            encode, content_type = choose_encoder("")
            return encode(self), content_type  # type: ignore[arg-type]


def families_of(actor: str, statistics: Struct) -> Iterator[Metric]:
    """The metrics of a struct. actor: its name; "" for statistics of the server as a whole."""
    for field in _fields(type(statistics)):
        name, value = "_".join(filter(None, (PREFIX, actor, field.name))), getattr(statistics, field.name)
        family = CounterMetricFamily if field.type == "Counter" else GaugeMetricFamily
        yield family(name, field.doc, value=value)


def counter_by(name: str, doc: str, labels: tuple[str, ...], values: Mapping[tuple[str, ...], float]) -> Metric:
    return _labelled(CounterMetricFamily(f"{PREFIX}_{name}", doc, labels=labels), values)


def gauge_by(name: str, doc: str, labels: tuple[str, ...], values: Mapping[tuple[str, ...], float]) -> Metric:
    return _labelled(GaugeMetricFamily(f"{PREFIX}_{name}", doc, labels=labels), values)


def _labelled(family: CounterMetricFamily | GaugeMetricFamily, values: Mapping[tuple[str, ...], float]) -> Metric:
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


_fields = cache(field_docs)
