"""A run's history over HTTP: as JSON, as CSV, to those who may read the run."""

import csv
import io

import httpx
import pytest

from tx_async.cli import main
from tx_async.errors import ConfigError
from tx_async.runs_command import cells
from tx_async.testing.fake_scheduler import FakeScheduler

ROWS = [
    {
        "index": 0.0,
        "step": 1.0,
        "started_at": 1.5,
        "finished_at": 3.5,
        "loss:sum": 8.0,
        "weights:sum": 4.0,
        "tokens": 9.0,
    },
    {"index": 1.0, "step": 2.0, "started_at": 4.0, "finished_at": 5.0, "learning_rate": 1e-4, "gap:mean": -0.25},
]


@pytest.fixture
def run(scheduler: FakeScheduler, model_id: str) -> str:
    scheduler.histories[model_id] = ROWS
    return model_id


async def test_steps_come_oldest_first_with_every_name(client: httpx.AsyncClient, run: str):
    answer = (await client.get(f"/api/v1/training_runs/{run}/history")).json()
    assert answer["training_run_id"] == run and answer["steps"] == ROWS
    assert set(answer["columns"]) >= {name for row in ROWS for name in row}


@pytest.mark.parametrize(("query", "accept"), [("?format=csv", "*/*"), ("", "text/csv")])
async def test_csv_has_a_header_row_and_gaps(client: httpx.AsyncClient, run: str, query: str, accept: str):
    answer = await client.get(f"/api/v1/training_runs/{run}/history{query}", headers={"accept": accept})
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    header, *rows = csv.reader(io.StringIO(answer.text))
    read = [{name: float(cell) for name, cell in zip(header, row, strict=True) if cell} for row in rows]
    assert read == ROWS


@pytest.mark.parametrize(
    ("accept", "is_csv"),
    [
        ("text/csv", True),
        ("Text/CSV; header=present; Q=0.5", True),
        ("text/csv, */*", True),
        ("text/csv, application/json", True),
        ("text/csv;q=0.9, application/json;q=0.8", True),
        ("text/*", True),
        ("text/csv, application/json;q=0", True),
        ("application/json, text/csv", False),
        ("text/csv;q=0.5, application/json", False),
        ("text/csv;q=0.5, */*", False),
        ("text/csv;q=0", False),
        ("text/csv;q=0, application/json;q=0", False),
        ("text/csv;q=x", False),
        ("text/html, */*;q=0.8", False),
        ("*/*", False),
        ("", False),
        (";;,q=", False),
    ],
)
async def test_csv_comes_only_where_accept_prefers_it(client: httpx.AsyncClient, run: str, accept: str, is_csv: bool):
    answer = await client.get(f"/api/v1/training_runs/{run}/history", headers={"accept": accept})
    assert answer.headers["content-type"].startswith("text/csv" if is_csv else "application/json")


async def test_a_run_without_steps_has_a_header_only(client: httpx.AsyncClient, model_id: str):
    answer = await client.get(f"/api/v1/training_runs/{model_id}/history?format=csv")
    assert answer.status_code == 200 and answer.text.startswith("index,step,") and answer.text.count("\n") == 1


async def test_another_format_is_refused(client: httpx.AsyncClient, run: str):
    answer = await client.get(f"/api/v1/training_runs/{run}/history?format=xml")
    assert answer.status_code == 400 and "json or csv" in answer.json()["detail"]


async def test_another_tenant_does_not_learn_of_the_run(other: httpx.AsyncClient, run: str):
    assert (await other.get(f"/api/v1/training_runs/{run}/history")).status_code == 404


def test_a_step_as_a_person_reads_it():
    assert cells(ROWS[0]) == ["1", "-", "2", "-", "9", "4.5"]
    assert cells(ROWS[1])[:3] == ["2", "0.0001", "-"]


def test_the_commands_want_a_server(capsys: pytest.CaptureFixture[str]):
    assert main(["runs"]) == 2
    assert "TINKER_BASE_URL" in capsys.readouterr().err
    assert main(["run", "r", "--base-url", "http://127.0.0.1:9"]) == 2
    assert issubclass(ConfigError, Exception) and "cannot be reached" in capsys.readouterr().err
