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


def test_a_message_is_one_line_whatever_a_client_has_put_into_it():
    line = logs.TextFormatter().format(record("refused: no such model 'a\r\n2026-11-28 00:00:00.000 INFO forged'"))
    assert "\n" not in line and "\r" not in line and "\\r\\n2026" in line


def test_lines_about_a_request_have_its_id_and_no_others():
    with logs.about("abc123"):
        assert logs.TextFormatter().format(record("it broke")).endswith(" [abc123]")
    assert logs.TextFormatter().format(record("it broke")).endswith("it broke")


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


def fails_later(base_url: str, base_model: str, headers: dict[str, str]) -> None:
    """A request that is accepted, and fails long after its answer."""

    def post(route: str, /, **body: object) -> dict:
        return httpx.post(f"{base_url}/api/v1/{route}", json=body, headers=headers, timeout=30).json()

    session_id = post("create_session")["session_id"]
    model = {"session_id": session_id, "model_seq_id": 0, "base_model": base_model, "lora_config": {"rank": 8}}
    model_id = post("retrieve_future", request_id=post("create_model", **model)["request_id"])["model_id"]
    promise = post("load_weights", model_id=model_id, seq_id=1, path="tinker://none/weights/a", optimizer=False)
    assert post("retrieve_future", request_id=promise["request_id"])["category"] == "user"


def test_every_line_of_a_server_is_json_and_a_failure_names_its_request(tiny_qwen3, tmp_path):
    with serving(tmp_path, tiny_qwen3, log_format="json") as server:
        answer = httpx.get(f"{server.base_url}/api/v1/healthz", headers={"x-request-id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"
        made = httpx.get(f"{server.base_url}/api/v1/healthz", headers={"x-request-id": "x" * 100})
        assert re.fullmatch("[0-9a-f]{12}", made.headers["x-request-id"])
        fails_later(server.base_url, str(tiny_qwen3), {"x-api-key": "tml-a", "x-request-id": "mine-2"})
    events = [json.loads(line) for line in server.log().splitlines()]
    assert len(events) > 3 and all({"time", "level", "logger", "message"} <= set(event) for event in events)
    assert any(event.get("process") == "w0.0" for event in events)
    (failure,) = [event for event in events if "failed:" in event["message"]]
    assert failure["request_id"] == "mine-2" and failure["level"] == "info"
