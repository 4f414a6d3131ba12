"""`tx-async demo` as a newcomer runs it: no settings, no network, no leftovers."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tx_async import cli, demo
from tx_async.errors import ConfigError


def test_the_demo_teaches_three_answers_and_cleans_up(tmp_path: Path):
    environ = os.environ | {"TMPDIR": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9"}
    command = [sys.executable, "-W", "error::FutureWarning", "-m", "tx_async.cli", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("✓ right") == len(demo.EXAMPLES)
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_demo_on_a_model_that_is_none_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cli.main(["demo", "--base-model", "/nowhere/model"]) == cli.EXIT_OPERATOR
    error = capsys.readouterr().err
    assert "/nowhere/model" in error and "Traceback" not in error


def test_the_demo_without_the_sdk_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tx-async\[demo\]"):
        demo.run()


@pytest.mark.parametrize(
    ("values", "drawn"), [([4.0, 2.0, 0.0], "█▄▁"), ([1.0], "█"), ([1.0, 1.0], "██")], ids=["falling", "one", "flat"]
)
def test_a_sparkline_spans_from_the_highest_to_the_lowest(values, drawn):
    assert demo.sparkline(values) == drawn
