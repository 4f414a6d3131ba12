"""The dashboard and the alert rules, as files. That a server has what they ask for: tests/test_metrics.py."""

import itertools
import json
from typing import Any

import pytest

from tx_async import cli
from tx_async.config import ServerConfig
from tx_async.deploy.render import DASHBOARD, Options, files

FILES = files("grafana", ServerConfig(base_model="/models/Qwen3-8B", port=8123), Options())


def panels() -> list[dict[str, Any]]:
    return json.loads(FILES[DASHBOARD])["panels"]


def rules() -> list[dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the rules")
    return [rule for group in yaml.safe_load(FILES["tx-async-alerts.yaml"])["groups"] for rule in group["rules"]]


def test_panels_fill_the_width_and_cover_none_another():
    taken = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in panels()}) == len(panels())


def test_every_rule_says_what_it_means():
    assert len({rule["alert"] for rule in rules()}) == len(rules()) > 10
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"].endswith(".")


def test_prometheus_finds_the_server():
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the configuration")
    (job,) = yaml.safe_load(FILES["tx-async-scrape.yaml"])
    assert job["job_name"] == "tx_async" and job["scheme"] == "http"
    assert job["static_configs"] == [{"targets": ["127.0.0.1:8123"], "labels": {"model": "/models/Qwen3-8B"}}]


def test_the_dashboard_is_printed_and_all_is_written(tmp_path, capsys):
    flags = ["deploy", "grafana", "--base-model", "/models/Qwen3-8B", "--port", "8123"]
    assert cli.main(flags) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "tx_async /models/Qwen3-8B"
    assert cli.main([*flags, "--output", str(tmp_path)]) == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == FILES
