"""What an operator says of an external engine: flags that are wrong or missing are one line and exit code 2."""

import pytest

from tx_async import cli
from tx_async.worker.external_settings import ExternalSettings

WORKER = ["worker", "--connect", "tcp://127.0.0.1:1", "--engine", "vllm"]
URL = ["--vllm-url", "http://127.0.0.1:8001"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--vllm-url is ''"),
        (["--vllm-url", "localhost:8001"], "must look like http://127.0.0.1:8001"),
        (URL, "--vllm-lora-dir is missing"),
        ([*URL, "--vllm-lora-dir", "/loras", "--vllm-api-key-file", "/nothing"], "which cannot be read"),
    ],
)
def test_a_flag_that_is_wrong_or_missing_is_named(flags, said, capsys):
    assert cli.main([*WORKER, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_an_empty_key_file_is_named(tmp_path, capsys):
    (tmp_path / "key").write_text("\n")
    flags = [*URL, "--vllm-lora-dir", "/loras", "--vllm-api-key-file", str(tmp_path / "key")]
    assert cli.main([*WORKER, *flags]) == 2
    assert "which is empty" in capsys.readouterr().err


def test_a_worker_is_called_by_where_its_engine_listens():
    assert ExternalSettings(url="https://gpu-1.lan:8001/v1", lora_dir="/l").name == "vllm-gpu-1.lan-8001"
    assert ExternalSettings(url="http://[::1]:8001", lora_dir="/l").name == "vllm--1-8001"
    assert ExternalSettings(url="http://h:1", lora_dir="/l", worker_name="mine").name == "mine"
