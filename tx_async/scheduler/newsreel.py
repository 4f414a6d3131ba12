"""News for an operator, as lines of the log: runs that were created, requests that failed, and the load once a
minute."""

from __future__ import annotations

import logging

import msgspec

from tx_async.errors import Cancelled
from tx_async.scheduler.statistics import SchedulerStatistics
from tx_async.wire.records import ModelRecord, RequestRecord, ResultRecord
from tx_async.wire.results import Failure

LOAD_S = 60.0
CREATIONS = ("CreateModel", "CreateModelFromCheckpoint")

_log = logging.getLogger(__name__)


def result_known(request: RequestRecord | None, model: ModelRecord | None, result: ResultRecord) -> None:
    """A request's end is durable."""
    if request is None:
        return
    if result.content == "error":
        failure = msgspec.json.decode(result.payload, type=Failure)
        level = _level_of(failure)
        where = (request.kind, request.subject, request.seq_id, request.request_id)
        _log.log(level, "%s of %s (seq_id %d, %s) failed: %s", *where, failure.error)
    elif request.kind in CREATIONS and model is not None:
        source = f" from {model.created_from_path}" if model.created_from_path else ""
        _log.info("Run %s was created%s: rank %d", model.model_id, source, model.lora.rank)


def _level_of(failure: Failure) -> int:
    """A client's own mistake is information; ours is a warning or worse."""
    if failure.error == Cancelled.default_message():
        return logging.DEBUG
    return logging.INFO if failure.category == "user" else logging.WARNING


class LoadReport:
    """Logs one line a minute while there is anything to say."""

    def __init__(self, now: float, statistics: SchedulerStatistics):
        self._before = (now, statistics)

    def report(self, now: float, statistics: SchedulerStatistics) -> None:
        """now: monotonic seconds. Called often."""
        then, before = self._before
        if now - then < LOAD_S:
            return
        self._before = (now, statistics)
        trained = (statistics.train_tokens - before.train_tokens) / (now - then)
        sampled = (statistics.sample_tokens - before.sample_tokens) / (now - then)
        if not (trained or sampled or statistics.requests_unfinished):
            return
        _log.info(
            "Load: %d requests open, %d samples open, %.0f tokens/s trained, %.0f tokens/s sampled, %d workers ready",
            statistics.requests_unfinished, statistics.samples_open, trained, sampled, statistics.workers_ready,
        )  # fmt: skip
