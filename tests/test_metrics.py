"""`/metrics`: a field of an actor's statistics is a metric, with its docstring as help."""

import json
import urllib.request
from typing import Any

import promql_parser
import pytest
from msgspec import Struct
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as text_format

from tests.support.promql import matches, selectors
from tx_async.config import ServerConfig
from tx_async.deploy.render import DASHBOARD, Options, files
from tx_async.dispatch.statistics import RouterStatistics, WorkerStatistics
from tx_async.field_docs import field_docs
from tx_async.journal.journal import JournalStatistics
from tx_async.metrics import Counter, Gauge, Metrics, Scrape, families_of
from tx_async.scheduler.statistics import SamplingStatistics, SchedulerStatistics
from tx_async.testing.server import ServerProcess, running_server
from tx_async.worker.supervisor import SupervisorStatistics


class Numbers(Struct):
    commits: Counter
    """Transactions that have
    become durable."""
    waiting: Gauge
    """Not yet."""


def test_a_field_is_a_metric():
    text, content_type = Scrape(families_of("journal", Numbers(commits=3, waiting=0.5)), Metrics()).encode()
    assert content_type.startswith("text/plain; version=0.0.4")
    assert text.decode().splitlines()[:6] == [
        "# HELP tx_async_journal_commits_total Transactions that have become durable.",
        "# TYPE tx_async_journal_commits_total counter",
        "tx_async_journal_commits_total 3.0",
        "# HELP tx_async_journal_waiting Not yet.",
        "# TYPE tx_async_journal_waiting gauge",
        "tx_async_journal_waiting 0.5",
    ]


@pytest.mark.parametrize(
    "struct",
    [
        SchedulerStatistics,
        SamplingStatistics,
        RouterStatistics,
        WorkerStatistics,
        JournalStatistics,
        SupervisorStatistics,
    ],
)
def test_every_metric_is_explained(struct):
    assert all(field.doc.endswith(".") for field in field_docs(struct))
    assert {field.type for field in field_docs(struct)} == {"Counter", "Gauge"}


@pytest.mark.parametrize("accept", ["application/openmetrics-text; version=loud", "*/*, ;;", ""])
def test_whatever_is_accepted_something_is_answered(accept):
    text, content_type = Scrape((), Metrics()).encode(accept)
    assert text and content_type


Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(server: ServerProcess, accept: str = "") -> Samples:
    """Every sample, read by Prometheus's own parser."""
    request = urllib.request.Request(server.base_url + "/metrics", headers={"accept": accept})
    with urllib.request.urlopen(request, timeout=5) as response:
        is_open = response.headers["content-type"].startswith("application/openmetrics-text")
        assert is_open == bool(accept)
        text = response.read().decode()
    families = list((openmetrics if is_open else text_format)(text))
    assert len({family.name for family in families}) == len(families)
    assert all(family.documentation.endswith(".") for family in families if family.name.startswith("tx_async"))
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def of(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"tx_async_{name}", tuple(sorted(labels.items()))]


def submit(server: ServerProcess, path: str, /, **body) -> Any:
    """The result of a request."""
    _, future = server.post(f"/api/v1/{path}", **body)
    status, result = 408, None
    while status == 408:  # programs are compiled first
        status, result = server.post("/api/v1/retrieve_future", timeout_s=60, request_id=future["request_id"])
    assert status == 200, result
    return result


def run_a_client(server: ServerProcess, base_model: str) -> str:
    """One forward_backward of ten tokens, a save, and a sample of up to three; the session."""
    _, answer = server.post("/api/v1/create_session", tags=[], user_metadata=None, sdk_version="0.24.0")
    session_id = answer["session_id"]
    model = {"session_id": session_id, "model_seq_id": 1, "base_model": base_model, "lora_config": {"rank": 8}}
    model_id = submit(server, "create_model", **model)["model_id"]
    inputs = {
        name: {"data": [1] * 5, "dtype": dtype, "shape": [5]}
        for name, dtype in (("target_tokens", "int64"), ("weights", "float32"))
    }
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3, 4, 5]}]}
    data = [{"model_input": prompt, "loss_fn_inputs": inputs}] * 2
    batch = {"data": data, "loss_fn": "cross_entropy"}
    submit(server, "forward_backward", model_id=model_id, seq_id=1, forward_backward_input=batch)
    submit(server, "save_weights", model_id=model_id, seq_id=2, path="a")
    sampler = {"session_id": session_id, "sampling_session_seq_id": 2, "base_model": base_model}
    _, answer = server.post("/api/v1/create_sampling_session", **sampler)
    sample = {"prompt": prompt, "sampling_params": {"max_tokens": 3, "seed": 1}, "num_samples": 1}
    submit(server, "asample", sampling_session_id=answer["sampling_session_id"], seq_id=1, **sample)
    return session_id


@pytest.fixture(scope="session")
def scraped(tiny_qwen3, tmp_path_factory) -> tuple[Samples, Samples]:
    """Of a server with the real engine on a CPU: before its first client, and after one."""
    with running_server(tiny_qwen3, data_dir=tmp_path_factory.mktemp("scraped")) as server:
        before = scrape(server)
        run_a_client(server, str(tiny_qwen3))
        return before, scrape(server, "application/openmetrics-text; version=1.0.0")


def test_a_server_counts_what_it_does(scraped):
    """Everything is there from the start, and moves."""
    before, after = scraped
    assert of(before, "router_workers_ready") == of(before, "supervisor_processes") == 1
    assert of(before, "scheduler_train_tokens_total") == of(before, "time_to_first_token_seconds_count") == 0
    assert of(after, "scheduler_sessions") == of(after, "scheduler_models") == 1
    assert of(after, "scheduler_train_tokens_total") == 10
    assert 5 < of(after, "scheduler_sample_tokens_total") <= 8
    assert of(after, "scheduler_train_ms_total") > 0 and of(after, "scheduler_sample_ms_total") > 0
    assert of(after, "journal_commits_total") > of(before, "journal_commits_total")
    assert of(after, "scheduler_requests_unfinished") == 0

    assert of(after, "time_to_first_token_seconds_count") == of(after, "time_per_output_token_seconds_count") == 1
    assert 0 < of(after, "time_per_output_token_seconds_sum") < of(after, "time_to_first_token_seconds_sum")
    for kind in ("forward_backward", "save_weights", "sample"):
        assert of(after, "queue_seconds_count", kind=kind) == of(after, "run_seconds_count", kind=kind) == 1
        assert of(after, "run_seconds_sum", kind=kind) > 0
    assert of(after, "queue_seconds_count", kind="optim_step") == 0
    assert of(after, "micro_batch_fill_count") == 1 and 0 < of(after, "micro_batch_fill_sum") <= 1
    assert of(after, "commit_seconds_count") >= of(after, "journal_commits_total") > 0
    asked = {"route": "/api/v1/asample", "status": "200"}
    assert of(after, "http_request_seconds_count", **asked) == 1
    assert (
        of(after, "http_server_errors_total") == of(after, "workers_lost_total") == of(after, "preemptions_total") == 0
    )
    assert of(after, "prefix_cache_lookup_tokens_total") == 5 and of(after, "prefix_cache_hit_tokens_total") == 0
    assert of(after, "kv_cache_tokens") > 0 and of(after, "device_memory_used_bytes") > 0
    assert of(after, "compilations_total") > 0 and of(after, "compile_seconds_total") > 0
    assert 0 <= of(after, "worker_lease_age_seconds") < of(after, "worker_lease_seconds")
    assert of(after, "failed_total", operation="save", cause="no_space") == 0
    assert of(after, "key_bytes", of="checkpoints", role="any", key="") > 0


def queries() -> list[str]:
    """All that comes with the wheel."""
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the rules")
    rendered = files("grafana", ServerConfig(base_model="/models/m"), Options())
    panels = json.loads(rendered[DASHBOARD])["panels"]
    groups = yaml.safe_load(rendered["tx-async-alerts.yaml"])["groups"]
    asked = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    asked += [rule["expr"] for group in groups for rule in group["rules"]]
    return [query.replace("$__rate_interval", "1m") for query in asked]


def is_there(selector: promql_parser.VectorSelector, samples: Samples) -> bool:
    return any(name == selector.name and matches(selector, dict(labels)) for name, labels in samples)


def test_every_series_that_dashboard_and_alerts_name_is_there_from_the_start(scraped):
    """Before the first request, so that an alert sees the first time, too."""
    first, _ = scraped
    named = [selector for query in queries() for selector in selectors(query)]
    assert len(named) > 50
    assert not [str(selector) for selector in named if not is_there(selector, first) and selector.name != "up"]
    (unknown,) = selectors('rate(tx_async_failed_total{operation="save",cause="bad luck"}[1m])')
    assert not is_there(unknown, first)
