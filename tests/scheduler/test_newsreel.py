"""What the log says of runs, failures and load."""

import logging

import msgspec
import pytest

from tx_async.errors import Cancelled, EngineError, InvalidRequest, TxError
from tx_async.scheduler import newsreel
from tx_async.scheduler.statistics import SchedulerStatistics
from tx_async.wire import results
from tx_async.wire.records import ModelRecord, RequestRecord, ResultRecord
from tx_async.wire.results import Failure
from tx_async.wire.worker import AdapterConfig

MODEL = ModelRecord(
    model_id="s:train:0", session_id="s", owner="o", base_model="b", lora=AdapterConfig(rank=8), created_at=0.0
)
NOTHING = {field: 0 for field in SchedulerStatistics.__struct_fields__}


@pytest.fixture(autouse=True)
def info(caplog):
    caplog.set_level(logging.INFO)


def request(kind: str) -> RequestRecord:
    return RequestRecord(
        request_id="r",
        owner="o",
        kind=kind,
        subject="s:train:0",
        seq_id=7,
        body_digest="",
        body_bytes=0,
        created_at=0.0,
    )


def result(error: TxError | None) -> ResultRecord:
    payload = results.encode_json(Failure.of(error)) if error else b"{}"
    return ResultRecord(request_id="r", finished_at=0.0, content="error" if error else "json", payload=payload)


def test_a_run_that_was_created_is_a_line(caplog):
    newsreel.result_known(request("CreateModel"), MODEL, result(None))
    copied = msgspec.structs.replace(MODEL, created_from_path="tinker://a/weights/b")
    newsreel.result_known(request("CreateModelFromCheckpoint"), copied, result(None))
    assert caplog.messages == [
        "Run s:train:0 was created: rank 8",
        "Run s:train:0 was created from tinker://a/weights/b: rank 8",
    ]


def test_a_request_that_failed_is_a_line_with_its_reason(caplog):
    newsreel.result_known(request("OptimStep"), MODEL, result(InvalidRequest("it was too large")))
    newsreel.result_known(request("OptimStep"), MODEL, result(None))
    newsreel.result_known(request("Sample"), None, result(Cancelled()))
    newsreel.result_known(None, None, result(InvalidRequest("of a request that is forgotten")))
    newsreel.result_known(request("OptimStep"), MODEL, result(EngineError("the device is gone")))
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "OptimStep of s:train:0 (seq_id 7, r) failed: it was too large"),
        ("WARNING", "OptimStep of s:train:0 (seq_id 7, r) failed: the device is gone"),
    ]


def test_the_load_is_a_line_a_minute_while_there_is_any(caplog):
    idle = SchedulerStatistics(**NOTHING)
    busy = SchedulerStatistics(**NOTHING | {"train_tokens": 1200, "sample_tokens": 600, "requests_unfinished": 3})
    report = newsreel.LoadReport(100.0, idle)
    for now in (100.5, 159.0, 161.0, 170.0):
        report.report(now, busy if now > 159 else idle)
    assert len(caplog.messages) == 1 and "3 requests open" in caplog.text and "20 tokens/s trained" in caplog.text
    report = newsreel.LoadReport(0.0, idle)
    report.report(61.0, idle)
    assert len(caplog.messages) == 1
