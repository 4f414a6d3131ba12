"""Traces over OTLP/HTTP, received by a server of our own and decoded as OpenTelemetry defines them."""

import gzip
import http.server
import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.support.durability import serving
from tx_async.errors import ConfigError
from tx_async.testing.server import free_port
from tx_async.tracing import open_tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
LIVE_TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
STATIONS = ["accept", "queue", "run", "commit"]


class Receiver:
    """Keeps every span that it is sent."""

    def __init__(self):
        self.spans: list[Span] = []
        self.services: set[str] = set()

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.services |= {a.value.string_value for a in resource.resource.attributes if a.key == "service.name"}
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]

    def of_trace(self, trace_id: str) -> list[Span]:
        return sorted(
            (span for span in self.spans if span.trace_id.hex() == trace_id), key=lambda span: span.start_time_unix_nano
        )


@pytest.fixture
def receiver() -> Iterator[tuple[Receiver, str]]:
    received = Receiver()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
            received.take(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield received, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def attributes_of(span: Span) -> dict[str, str]:
    return {a.key: a.value.string_value or str(a.value.int_value) for a in span.attributes}


def test_a_request_is_one_trace_from_http_to_the_device_and_back(tiny_qwen3, tmp_path, receiver):
    received, endpoint = receiver
    with (
        serving(tmp_path, tiny_qwen3, otlp_endpoint=endpoint) as server,
        httpx.Client(base_url=f"{server.base_url}/api/v1/", headers={"x-api-key": "tml-a"}, timeout=30) as client,
    ):
        session_id = client.post("create_session", json={}).json()["session_id"]
        body = {"session_id": session_id, "sampling_session_seq_id": 1, "base_model": str(tiny_qwen3)}
        sampler_id = client.post("create_sampling_session", json=body).json()["sampling_session_id"]
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}
        body = {"sampling_session_id": sampler_id, "prompt": prompt, "sampling_params": {"max_tokens": 3}}
        told = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        request_ids = [
            client.post("asample", json=body | {"seq_id": seq_id}, headers=headers).json()["request_id"]
            for seq_id, headers in ((1, told), (2, {}))
        ]
        for request_id in request_ids:
            assert client.post("retrieve_future", json={"request_id": request_id}).status_code == 200
        live = {"model": str(tiny_qwen3), "prompt": [1, 2, 3], "max_tokens": 3, "stream": True, "ignore_eos": True}
        told = {"traceparent": f"00-{LIVE_TRACE}-{PARENT}-01"}
        assert client.post(f"{server.base_url}/oai/api/v1/completions", json=live, headers=told).status_code == 200
    assert received.services == {"tx_async"}

    spans = {span.name: span for span in received.of_trace(TRACE)}
    assert set(spans) == {"POST /api/v1/asample", "sample", *STATIONS, "POST /api/v1/retrieve_future", "fetch"}
    submitted, request = spans["POST /api/v1/asample"], spans["sample"]
    assert submitted.parent_span_id.hex() == PARENT and submitted.kind == Span.SPAN_KIND_SERVER
    assert attributes_of(submitted)["http.response.status_code"] == "200"
    assert request.parent_span_id == submitted.span_id
    assert attributes_of(request)["tx_async.request_id"] == request_ids[0]
    assert spans["POST /api/v1/retrieve_future"].parent_span_id == request.span_id
    stations = [spans[name] for name in (*STATIONS, "fetch")]
    assert {station.parent_span_id for station in stations} == {request.span_id}
    for before, after in itertools.pairwise(stations):
        assert before.start_time_unix_nano <= before.end_time_unix_nano == after.start_time_unix_nano
    assert attributes_of(spans["run"])["tx_async.worker"] == "w0"
    assert [event.name for event in spans["run"].events] == ["first token"]

    spans = {span.name: span for span in received.of_trace(LIVE_TRACE)}
    assert set(spans) == {"POST /oai/api/v1/completions", "sample", "queue", "run"}, "nothing of it is journaled"
    answer, request, queue, run = (spans[name] for name in ("POST /oai/api/v1/completions", "sample", "queue", "run"))
    assert request.parent_span_id == answer.span_id and queue.parent_span_id == run.parent_span_id == request.span_id
    assert queue.end_time_unix_nano == run.start_time_unix_nano and run.end_time_unix_nano == request.end_time_unix_nano
    assert attributes_of(request).keys() == {"tx_async.request_id"} and attributes_of(run)["tx_async.worker"] == "w0"
    assert [event.name for event in run.events] == ["first token"]

    others = {span.trace_id for span in received.spans if span.name == "sample"}
    assert len(others) == 3, "a client that says nothing gets a trace of its own"


def test_a_receiver_that_is_away_costs_nothing_but_its_spans(tiny_qwen3, tmp_path):
    with serving(tmp_path, tiny_qwen3, otlp_endpoint=f"http://127.0.0.1:{free_port()}") as server:
        assert httpx.post(f"{server.base_url}/api/v1/create_session", json={}).status_code == 200


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "ftp://somewhere", "http://"])
def test_an_endpoint_that_is_none_is_refused(endpoint):
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        open_tracing(endpoint)


def test_without_the_extra_the_setting_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"tx-async\[otel\]"):
        open_tracing("http://127.0.0.1:4318")


def test_tracing_that_is_off_loads_nothing():
    code = "import sys, tx_async.app; print([name for name in sys.modules if name.startswith('opentelemetry')])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
    assert open_tracing("") is None
