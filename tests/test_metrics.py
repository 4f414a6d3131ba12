"""`/metrics`: a field of an actor's statistics is a metric, with its docstring as help."""

import re
import urllib.request

import pytest
from msgspec import Struct

from tx_async.dispatch.statistics import RouterStatistics
from tx_async.field_docs import field_docs
from tx_async.journal.journal import JournalStatistics
from tx_async.metrics import CONTENT_TYPE, Counter, Gauge, render
from tx_async.scheduler.statistics import SchedulerStatistics
from tx_async.testing.server import Server, running_server
from tx_async.worker.supervisor import SupervisorStatistics

LINE = re.compile(r"# HELP \S+ \S.*|# TYPE (?P<name>\S+) (counter|gauge)|(?P<sample>\S+) (?P<value>[-+.e\d]+)")


class Numbers(Struct):
    commits: Counter
    """Transactions that have
    become durable."""
    waiting: Gauge
    """Not yet."""


def values_of(text: str) -> dict[str, float]:
    """Every sample; each stands below its HELP and TYPE."""
    found, declared = {}, ""
    for line in text.splitlines():
        match = LINE.fullmatch(line)
        assert match, line
        declared = match["name"] or declared
        if match["sample"]:
            assert match["sample"] == declared and declared not in found
            found[declared] = float(match["value"])
    return found


def test_a_field_is_a_metric():
    assert render({"journal": Numbers(commits=3, waiting=0.5)}).splitlines() == [
        "# HELP tx_async_journal_commits_total Transactions that have become durable.",
        "# TYPE tx_async_journal_commits_total counter",
        "tx_async_journal_commits_total 3",
        "# HELP tx_async_journal_waiting Not yet.",
        "# TYPE tx_async_journal_waiting gauge",
        "tx_async_journal_waiting 0.5",
    ]


@pytest.mark.parametrize("struct", [SchedulerStatistics, RouterStatistics, JournalStatistics, SupervisorStatistics])
def test_every_metric_is_explained(struct):
    assert all(field.doc.endswith(".") for field in field_docs(struct))
    assert {field.type for field in field_docs(struct)} == {"Counter", "Gauge"}


def scrape(server: Server) -> dict[str, float]:
    with urllib.request.urlopen(server.base_url + "/metrics", timeout=5) as response:
        assert response.headers["content-type"] == CONTENT_TYPE
        return values_of(response.read().decode())


def submit(server: Server, path: str, **body) -> dict:
    """The result of a request."""
    _, future = server.post(f"/api/v1/{path}", **body)
    status, result = server.post("/api/v1/retrieve_future", timeout_s=60, request_id=future["request_id"])
    assert status == 200, result
    return result


def test_a_server_counts_what_it_does(tiny_qwen3, tmp_path):
    with running_server(tiny_qwen3, data_dir=tmp_path) as server:
        before = scrape(server)
        assert before["tx_async_router_workers_ready"] == before["tx_async_supervisor_processes"] == 1
        assert before["tx_async_scheduler_train_tokens_total"] == 0
        _, answer = server.post("/api/v1/create_session", tags=[], user_metadata=None, sdk_version="0.24.0")
        session_id = answer["session_id"]
        model = {"session_id": session_id, "model_seq_id": 1, "base_model": str(tiny_qwen3), "lora_config": {"rank": 8}}
        model_id = submit(server, "create_model", **model)["model_id"]
        inputs = {
            name: {"data": [1] * 5, "dtype": dtype, "shape": [5]}
            for name, dtype in (("target_tokens", "int64"), ("weights", "float32"))
        }
        prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3, 4, 5]}]}
        data = [{"model_input": prompt, "loss_fn_inputs": inputs}] * 2
        batch = {"data": data, "loss_fn": "cross_entropy"}
        submit(server, "forward_backward", model_id=model_id, seq_id=1, forward_backward_input=batch)
        sampler = {"session_id": session_id, "sampling_session_seq_id": 2, "base_model": str(tiny_qwen3)}
        _, answer = server.post("/api/v1/create_sampling_session", **sampler)
        sample = {"prompt": prompt, "sampling_params": {"max_tokens": 3, "seed": 1}, "num_samples": 1}
        submit(server, "asample", sampling_session_id=answer["sampling_session_id"], seq_id=1, **sample)
        after = scrape(server)
        assert after["tx_async_scheduler_sessions"] == after["tx_async_scheduler_models"] == 1
        assert after["tx_async_scheduler_train_tokens_total"] == 10
        assert 5 < after["tx_async_scheduler_sample_tokens_total"] <= 8
        assert after["tx_async_scheduler_train_ms_total"] > 0 and after["tx_async_scheduler_sample_ms_total"] > 0
        assert after["tx_async_journal_commits_total"] > before["tx_async_journal_commits_total"]
        assert after["tx_async_scheduler_requests_unfinished"] == 0
