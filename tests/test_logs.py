"""Log lines: one an event, with its date and the request that it belongs to."""

import json
import logging
import re
import sys

import httpx
import pytest

from tests.support.durability import serving
from tx_async import logs
from tx_async.errors import ConfigError


def record(message: str = "a\nb", **fields) -> logging.LogRecord:
    return logging.LogRecord("tx_async.x", logging.WARNING, "file", 1, message, None, fields.pop("exc_info", None))


def test_a_line_has_a_date_a_level_a_place_and_its_request():
    line = logs.TextFormatter("w0.0").format(record("it broke"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} WARNING w0\.0 tx_async\.x: it broke", line)
    token = logs.request_id.set("abc123")
    try:
        assert logs.TextFormatter().format(record("it broke")).endswith("tx_async.x: it broke [abc123]")
        event = json.loads(logs.JsonFormatter("w0.0").format(record()))
    finally:
        logs.request_id.reset(token)
    assert event.pop("time").endswith("+00:00")
    assert event == {
        "level": "warning", "logger": "tx_async.x", "process": "w0.0", "message": "a\nb", "request_id": "abc123",
    }  # fmt: skip


def test_an_exception_stays_in_its_line():
    try:
        raise ValueError("no")
    except ValueError:
        line = logs.JsonFormatter().format(record(exc_info=sys.exc_info()))
    assert "\n" not in line and "ValueError: no" in json.loads(line)["exception"]


@pytest.mark.parametrize(("level", "format"), [("loud", "text"), ("info", "xml")])
def test_what_nobody_knows_is_refused(level, format):
    with pytest.raises(ConfigError, match=f"{level if level == 'loud' else format}"):
        logs.configure(level, format)


def test_every_line_of_a_server_is_json_and_a_failure_names_its_request(tiny_qwen3, tmp_path):
    with serving(tmp_path, tiny_qwen3, log_format="json") as server:
        answer = httpx.get(f"{server.base_url}/api/v1/healthz", headers={"x-request-id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"
        made = httpx.get(f"{server.base_url}/api/v1/healthz", headers={"x-request-id": "x" * 100})
        assert re.fullmatch("[0-9a-f]{12}", made.headers["x-request-id"])
    events = [json.loads(line) for line in server.log().splitlines()]
    assert len(events) > 3 and all({"time", "level", "logger", "message"} <= set(event) for event in events)
    assert any(event.get("process") == "w0.0" for event in events)
