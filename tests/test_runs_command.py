"""`tx-async runs` and `tx-async run` against a server: one key's runs, however many, and a history as text and as
CSV."""

import csv
import io
from collections.abc import Iterator

import pytest

from tests.dashboard.test_views import new_run
from tests.support.browser import Serving, served
from tx_async import cli, server_client
from tx_async.api.owner import owner_of
from tx_async.api.routes import create_api
from tx_async.config import ServerConfig
from tx_async.testing.fake_scheduler import FakeScheduler

KEY = "tml-mine"
RUNS = [f"s{number}:train:0" for number in range(5)]
STEP = {"index": 0.0, "step": 1.0, "learning_rate": 1e-4, "loss:sum": 6.0, "tokens": 4.0, "gap:mean": -0.25}


@pytest.fixture(scope="module")
def site() -> Iterator[Serving]:
    scheduler = FakeScheduler()
    for number in range(5):
        new_run(scheduler, owner_of(KEY), f"s{number}")
    new_run(scheduler, owner_of("tml-theirs"), "theirs")
    scheduler.histories[RUNS[0]] = [STEP]
    with served(create_api(scheduler, ServerConfig(), scheduler.files)) as serving:
        yield serving


@pytest.fixture(autouse=True)
def environment(site: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", site.url)
    monkeypatch.setenv("TINKER_API_KEY", KEY)


@pytest.mark.parametrize(
    ("flags", "expected"), [([], RUNS[::-1]), (["--newest", "3"], RUNS[:1:-1]), (["--newest", "9"], RUNS[::-1])]
)
def test_runs_come_in_pages_until_none_is_left(
    flags: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(server_client, "PAGE", 2)
    assert cli.main(["runs", *flags]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == expected
    assert lines[0][1:4] == ["b", "8", "ok"]


def test_a_run_s_steps_are_a_table_or_everything_as_csv(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["run", RUNS[0]]) == 0
    header, row = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert header == ["step", "learning_rate", "loss", "grad_norm", "tokens", "tokens/s"]
    assert row == ["1", "0.0001", "1.5", "-", "4", "-"]
    assert cli.main(["run", RUNS[0], "--csv"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert {name: float(cell) for name, cell in row.items() if cell} == STEP


def test_another_key_s_run_is_not_there(capsys: pytest.CaptureFixture[str]):
    for flags in ([], ["--csv"]):
        assert cli.main(["run", "theirs:train:0", *flags]) == 2
        assert "training run does not exist" in capsys.readouterr().err
