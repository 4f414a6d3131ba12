"""The programs that a newcomer starts from run as they are, against `tx-async demo --serve`."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.browser import served
from tx_async import keys
from tx_async.api.routes import create_api
from tx_async.config import ServerConfig
from tx_async.testing.fake_scheduler import FakeScheduler
from tx_async.testing.server import free_port

READY_S = 180


@pytest.fixture(scope="module")
def demo_server(tmp_path_factory) -> Iterator[str]:
    """Address of a demo that serves until Ctrl-C, which is how it ends here."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "tx_async.cli", "demo", "--serve", "--port", str(free_port())]
    environ = os.environ | {"TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"TINKER_BASE_URL=(\S+)", line):
            yield found[1]
            break
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=READY_S)[0]
    assert process.returncode == 0, "".join(lines) + rest
    assert "Traceback" not in rest
    assert list(folder.iterdir()) == []


def run(server: str, name: str, *arguments: str) -> str:
    environ = os.environ | {"TINKER_BASE_URL": server, "TINKER_API_KEY": "tml-example", "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, "-m", "tests.support.example", name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=READY_S, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FutureWarning" not in done.stderr
    return done.stdout


def numbers(output: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf"{name} +(-?[\d.]+)", output)]


def test_supervised_fine_tuning_teaches_its_phrases(demo_server):
    output = run(demo_server, "sft")
    assert "banana split -> anana-bay plit-say" in output
    assert re.search(r"saved tinker://\S+/sampler_weights/pig-latin", output)


def test_the_reinforcement_learning_loop_raises_its_reward(demo_server):
    rewards = numbers(run(demo_server, "rl_loop"), "reward")
    assert sum(rewards[-3:]) / 3 > 1.5 * sum(rewards[:3]) / 3


@pytest.mark.torch
def test_preferences_move_apart(demo_server):
    margins = numbers(run(demo_server, "dpo"), "margin")
    assert abs(margins[0]) < 1e-3 and margins[-1] > 0.5


def test_tenants_train_together_as_they_would_alone(demo_server):
    output = run(demo_server, "many_tenants", "8")
    assert len(re.findall(r"loss [\d.]+ -> [\d.]+", output)) == 3
    assert "alice alone: the same numbers" in output


def test_a_loop_that_was_ended_goes_on_where_it_was(demo_server):
    first = numbers(run(demo_server, "resume", "10"), "loss")
    again = run(demo_server, "resume", "12")
    assert "going on after step 10" in again
    assert numbers(again, "loss")[0] < first[-1]


def test_every_example_has_a_row_in_the_readme():
    folder = Path(__file__).parents[2] / "tx_async" / "examples"
    rows = set(re.findall(r"^\| `(\w+\.py)` \|", (folder / "README.md").read_text(), re.MULTILINE))
    assert rows == {path.name for path in folder.glob("*.py")} - {"__init__.py"}


def test_the_demo_s_model_can_chat(demo_server):
    (model,) = httpx.get(f"{demo_server}/v1/models", timeout=READY_S).json()["data"][:1]
    body = {"model": model["id"], "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    answer = httpx.post(f"{demo_server}/v1/chat/completions", json=body, timeout=READY_S)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] > 0


# ---- what a newcomer may lack


def test_made_up_keys_are_one_line_where_there_is_a_keys_file(tmp_path):
    keys.add(tmp_path / "keys", "alice")
    scheduler = FakeScheduler()
    with served(create_api(scheduler, ServerConfig(api_keys_file=str(tmp_path / "keys")), scheduler.files)) as site:
        environ = os.environ | {"TINKER_BASE_URL": site.url}
        command = [sys.executable, "-m", "tx_async.examples.many_tenants", "1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=READY_S, env=environ)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "keys file" in done.stderr


def test_preferences_without_torch_are_one_line():
    program = "import runpy, sys; sys.modules['torch'] = None; runpy.run_module('tx_async.examples.dpo')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=READY_S)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].endswith("pip install torch")
    assert "Traceback" not in done.stderr
