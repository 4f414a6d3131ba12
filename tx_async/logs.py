"""One line per event, on stderr: time, level, where, what; as text, or as JSON. Rotation is left to the host.

A line about a request ends with the id of the HTTP request that brought it. The answer carries that id, too
(`X-Request-Id`), so whoever reports a failure can name its lines, even those that come long after the answer.

debug: what a developer looks for. info: what an operator wants to read over breakfast: starts and ends, workers, runs,
requests that failed by their own fault, the load. warning: something did not work and is tried again, or works worse
than it could. error: something is lost, or nothing goes on until somebody does something. critical: the process ends.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

from tx_async.errors import ConfigError

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
_CHATTY = ("httpx", "httpcore", "jax", "urllib3", "filelock", "hypercorn.access")

_LINE_BREAKS = str.maketrans({"\n": "\\n", "\r": "\\r"})
"""A message stays on one line, whatever a client has put into it."""

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request that is being handled; "" elsewhere."""


@contextmanager
def about(request: str) -> Iterator[None]:
    """Lines that are logged inside this context are about that request."""
    token = request_id.set(request)
    try:
        yield
    finally:
        request_id.reset(token)


def check(level: str, format: str) -> None:
    """Raises `ConfigError` for an unknown level or format."""
    if level.lower() not in LEVELS:
        raise ConfigError(f"log_level {level!r} is unknown; known: {', '.join(LEVELS)}.")
    if format not in FORMATS:
        raise ConfigError(f"log_format {format!r} is unknown; known: {', '.join(FORMATS)}.")


def configure(level: str = "info", format: str = "text", process: str = "") -> None:
    """Set up this process's logging. process: a worker's name. Raises `ConfigError` for an unknown level or format."""
    check(level, format)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process) if format == "json" else TextFormatter(process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)


class TextFormatter(logging.Formatter):
    """`2026-11-28 03:45:00.123 INFO    tx_async.app: what happened [request id]`"""

    def __init__(self, process: str = ""):
        where = f"{process} %(name)s" if process else "%(name)s"
        super().__init__(f"%(asctime)s.%(msecs)03d %(levelname)-7s {where}: %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record).translate(_LINE_BREAKS)
        request = request_id.get()
        return f"{line} [{request}]" if request else line


class JsonFormatter(logging.Formatter):
    """One JSON object per line, whatever the message holds."""

    def __init__(self, process: str = ""):
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        event = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self._process,
            "message": record.getMessage(),
            "request_id": request_id.get(),
            "exception": self.formatException(record.exc_info) if record.exc_info else "",
        }
        return json.dumps({name: value for name, value in event.items() if value}, ensure_ascii=False)
