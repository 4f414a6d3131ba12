"""The command line: what the operator can change is one line and exit code 2; a server starts and stops cleanly."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
import pytest

from tx_async import cli, keys, serve
from tx_async.api.key_file import ID_DIGITS, KeyFile, read_keys
from tx_async.api.owner import Owners, hash_key, is_loopback, owner_of
from tx_async.config import ServerConfig
from tx_async.errors import ConfigError, Unauthorized
from tx_async.testing.server import free_port, running_server
from tx_async.worker import supervisor
from tx_async.worker.exit_codes import ExitCode


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tx_async.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | environ)


# ---- what the operator got wrong


@pytest.mark.parametrize(
    ("arguments", "environ", "named"),
    [
        (["serve"], {}, "--base-model"),
        (["serve", "--base-model", "/nowhere/model"], {}, "/nowhere/model"),
        (["serve", "--base-model", "/", "--port", "99999"], {}, "99999"),
        (["serve", "--backend-config", '{"max_lora_rnk": 1}'], {}, "max_lora_rnk"),
        (["serve", "--host", "0.0.0.0"], {}, "api_keys_file"),
        (["serve", "--log-level", "loud"], {}, "loud"),
        (["serve", "--config", "/nowhere/tx.toml"], {}, "/nowhere/tx.toml"),
        (["serve"], {"TX_PROT": "80"}, "TX_PROT"),
        (["serve", "--database-url", "mysql://x"], {}, "database_url"),
        (["keys", "--file", "/nowhere/keys", "list"], {}, "/nowhere/keys"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(arguments, environ, named, tiny_qwen3, tmp_path):
    if "--database-url" in arguments:
        arguments = [*arguments, "--base-model", str(tiny_qwen3)]
    if arguments[0] == "serve" and "--port" not in arguments:
        arguments = [*arguments, "--port", str(free_port())]
    done = run(*arguments, TX_DATA_DIR=str(tmp_path), **environ)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith("tx-async: ")
    assert named in last_line


def test_an_occupied_port_is_named_before_anything_starts(tiny_qwen3, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", "--base-model", str(tiny_qwen3), "--port", str(port), "--data-dir", str(tmp_path))
    assert done.returncode == 2
    assert f"127.0.0.1:{port}" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [("demo", "--steps", "-1"), ("demo", "--steps", "0"), ("runs", "--newest", "-1")])
def test_numbers_below_1_are_refused_by_argparse(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(flags)
    assert f"{flags[1]}: {flags[2]!r} is not a whole number from 1 on" in capsys.readouterr().err


def test_unknown_commands_and_flags_are_refused_by_argparse():
    assert run("sevre").returncode == 2
    assert "--prot" in run("serve", "--prot", "80").stderr


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        *((host, True) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")),
        *((host, False) for host in ("0.0.0.0", "::", "192.168.1.1", "example.org", "")),
    ],
)
def test_only_loopback_may_do_without_keys(host, is_local):
    assert is_loopback(host) == is_local
    serve.check_exposure(ServerConfig(host=host, api_keys_file="/some/file"))
    if not is_local:
        with pytest.raises(ConfigError, match="api_keys_file"):
            serve.check_exposure(ServerConfig(host=host))


# ---- flags


def test_every_setting_is_a_flag_and_reaches_the_config():
    args = cli.parser().parse_args(["serve", "--base-model", "m", "--long-poll-ms", "7", "--train-share", "0.5"])
    config = cli._load_config(args)
    assert (config.base_model, config.long_poll_ms, config.train_share) == ("m", 7, 0.5)
    text = cli.parser().format_help() + "".join(flags for _, _, flags in cli.command_docs())
    assert "every setting" in text


def test_the_flags_of_similar_servers_keep_their_names():
    flags = ["--base-model", "m", "--host", "::1", "--port", "1", "--backend-config", '{"max_lora_adapters": 4}']
    flags += ["--checkpoints-base", "/c", "--database-url", "sqlite:////d"]
    config = cli._load_config(cli.parser().parse_args(["serve", *flags]))
    assert (config.host, config.port, config.backend_config.max_lora_adapters) == ("::1", 1, 4)
    assert (config.checkpoints_base, config.database_url) == ("/c", "sqlite:////d")


# ---- keys


def test_a_key_is_shown_once_and_only_its_hash_is_kept(tmp_path):
    file = tmp_path / "keys"
    done = run("keys", "--file", str(file), "add", "alice")
    key = done.stdout.strip()
    assert key.startswith("tml-")
    assert key not in file.read_text()
    (registered,) = read_keys(file).values()
    assert (registered.digest, registered.name, registered.owner) == (hash_key(key), "alice", owner_of(key))
    assert file.stat().st_mode & 0o077 == 0
    assert run("keys", "--file", str(file), "list").stdout == f"{hash_key(key)[:8]}  alice\n"
    assert "alice" in run("keys", "--file", str(file), "revoke", "alice").stdout
    assert read_keys(file) == {}


def test_a_revoked_key_is_refused_and_the_others_are_not(tmp_path):
    file = tmp_path / "keys"
    alice, bob = keys.add(file, "alice"), keys.add(file, "bob")
    keys.revoke(file, hash_key(alice)[:ID_DIGITS])
    owners = Owners(KeyFile(str(file)).current)
    assert owners.authenticate(bob)
    with pytest.raises(Unauthorized):
        owners.authenticate(alice)


@pytest.mark.parametrize("name", ["", " ", "a\nb", "a#b", " a", "a  b", "a role=admin"])
def test_a_name_that_the_file_cannot_hold_is_refused(tmp_path, name):
    with pytest.raises(ConfigError):
        keys.add(tmp_path / "keys", name)
    assert not (tmp_path / "keys").exists()


def test_a_taken_name_and_an_unknown_one_are_refused(tmp_path):
    keys.add(tmp_path / "keys", "alice")
    with pytest.raises(ConfigError, match="alice"):
        keys.add(tmp_path / "keys", "alice")
    with pytest.raises(ConfigError, match="0 keys called 'bob'"):
        keys.revoke(tmp_path / "keys", "bob")
    assert [key.name for key in keys.listed(tmp_path / "keys")] == ["alice"]


def test_a_key_may_have_a_role_and_an_end(tmp_path):
    file = str(tmp_path / "keys")
    assert run("keys", "--file", file, "add", "ops", "--role", "admin", "--expires", "90d").returncode == 0
    (key,) = keys.listed(tmp_path / "keys")
    assert key.role == "admin" and abs((key.expires_at or 0) - time.time() - 90 * 24 * 3600) < 100
    listed = run("keys", "--file", file, "list").stdout
    assert "ops  admin  until 20" in listed
    ends = ("soon", "2020-01-01", "0d", "99999999999999d")
    for arguments in (["--role", "root"], *(["--expires", end] for end in ends)):
        done = run("keys", "--file", file, "add", "other", *arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(keys.listed(tmp_path / "keys")) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("30", 130), ("2m", 220), ("1.5h", 5500), ("1d", 86500), ("1w", 604900), ("2000-01-01", 946684800)],
)
def test_an_expiry_is_a_duration_or_a_time(text, expected):
    assert keys.parse_expiry(text, 100.0) == expected


# ---- worker


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--engine", "mars"], "--engine 'mars'"),
        (["--engine", "mars:make"], "--engine 'mars:make'"),
        (["--capabilities", "sample,fly"], "--capabilities 'fly'"),
        (["--num-processes", "2", "--process-id", "5"], "--process-id is 5"),
        (["--process-id", "-1"], "--process-id is -1"),
        (["--vllm-url", "http://127.0.0.1:8001"], "--vllm-url needs --engine vllm"),
    ],
)
def test_flags_with_which_a_worker_would_wait_for_ever_are_refused(flags, named, capsys, monkeypatch):
    monkeypatch.setattr(supervisor, "attach_forever", lambda *arguments, **settings: pytest.fail("it waits"))
    assert cli.main(["worker", "--connect", "ipc:///nowhere", *flags]) == 2
    line = capsys.readouterr().err
    assert named in line and line.count("\n") == 1


# ---- migrate, doctor, schemas


def test_migrate_makes_the_journal_and_serve_would_find_it(tmp_path):
    done = run("migrate", "--data-dir", str(tmp_path / "data"))
    assert "0 records" in done.stdout, done.stderr
    assert (tmp_path / "data/tx_async.db").exists()
    assert run("migrate", "--data-dir", str(tmp_path / "data")).returncode == 0


def test_doctor_finds_nothing_wrong_with_a_good_machine(tiny_qwen3, tmp_path):
    flags = ("--base-model", str(tiny_qwen3), "--data-dir", str(tmp_path / "data"), "--port", str(free_port()))
    done = run("doctor", *flags)
    assert done.returncode == 0, done.stdout
    assert "Qwen3ForCausalLM" in done.stdout
    assert "platform cpu" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("devices", "backend", "code", "said"),
    [
        ("1", {}, 0, "usable"),
        ("8", {"tensor_parallel_size": 8}, 0, "8 × 79.1 GiB"),
        ("1", {"tensor_parallel_size": 8}, 2, "asks for 8 devices, there are 1"),
        ("1", {"kv_cache_tokens": 10**12}, 2, "kv_cache_tokens"),
    ],
)
def test_doctor_plans_for_devices_that_are_not_here(devices, backend, code, said, tiny_qwen3, tmp_path):
    """From config.json alone: neither weights nor a tokenizer lie in the folder."""
    shutil.copy(tiny_qwen3 / "config.json", tmp_path)
    flags = ("--base-model", str(tmp_path), "--backend-config", json.dumps(backend))
    done = run("doctor", "--device", "h100", "--devices", devices, *flags)
    assert (done.returncode, said in done.stdout) == (code, True), done


def test_doctor_names_the_devices_that_it_knows(tmp_path):
    done = run("doctor", "--device", "abacus", "--base-model", str(tmp_path))
    assert done.returncode == 2 and "h100" in done.stderr


def test_doctor_says_what_is_wrong(tmp_path):
    flags = ("--host", "0.0.0.0", "--port", str(free_port()), "--shared-memory-bytes", str(2**60))
    done = run("doctor", "--base-model", str(tmp_path), *flags, TX_DATA_DIR=str(tmp_path / "data"))
    assert done.returncode == 1
    problems = [line for line in done.stdout.splitlines() if line.startswith("problem")]
    assert len(problems) == 3
    assert "config.json" in done.stdout and "api_keys_file" in done.stdout and "shared_memory_bytes" in done.stdout


# ---- a running server


def test_ctrl_c_stops_everything_within_seconds_and_leaves_nothing_behind(tiny_qwen3, tmp_path):
    with running_server(tiny_qwen3, data_dir=tmp_path) as server:
        pid = server.pid
        assert _shared_memory(pid)
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        assert len(family) > 1
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 15
    assert not [process for process in family if _is_alive(process)]
    assert not _shared_memory(pid)
    assert not [path for path in tmp_path.rglob("*") if path.is_socket()]
    assert "Traceback" not in server.log()


def test_open_polls_do_not_hold_up_the_end(tiny_qwen3, tmp_path):
    """A poll for a step whose predecessor never came would wait for 25 s."""
    with running_server(tiny_qwen3, data_dir=tmp_path) as server, ThreadPoolExecutor() as pool:
        session = post(server, "create_session", {"tags": [], "user_metadata": {}, "sdk_version": "0.38.0"})[
            "session_id"
        ]
        lora = {"rank": 8, "train_unembed": True, "train_mlp": True, "train_attn": True}
        model = {"session_id": session, "model_seq_id": 0, "base_model": str(tiny_qwen3), "lora_config": lora}
        created = post(server, "create_model", model)
        model_id = post(server, "retrieve_future", {"request_id": created["request_id"]})["model_id"]
        step = post(server, "optim_step", {"model_id": model_id, "seq_id": 2, "adam_params": {"learning_rate": 1e-4}})
        polls = [pool.submit(post, server, "retrieve_future", {"request_id": step["request_id"]}) for _ in range(4)]
        time.sleep(0.5)
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 15
        assert all(poll.exception(timeout=5) for poll in polls)
        for words in ("Traceback", "is lost", "Unable to initialize backend", "PyTorch was not found"):
            assert words not in server.log(), "an orderly stop has nothing to complain of"


def post(server, path: str, body: dict) -> dict:
    headers = {"X-API-Key": "tml-test", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.base_url}/api/v1/{path}", msgspec.json.encode(body), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return msgspec.json.decode(response.read())


def test_a_worker_ends_when_its_server_is_killed_and_the_next_start_cleans_up(tiny_qwen3, tmp_path):
    with running_server(tiny_qwen3, data_dir=tmp_path) as server:
        pids = [server.pid]
        workers = psutil.Process(server.pid).children(recursive=True)
        assert _shared_memory(*pids), "there is something to clean up"
        server.kill()
        psutil.wait_procs(workers, timeout=15)
        assert not [process for process in workers if _is_alive(process)]
        server.start()
        server.wait_ready()
        pids.append(server.pid)
        assert not _shared_memory(pids[0])
    assert not _shared_memory(*pids)


def test_sigterm_while_it_starts_stops_it_too(tiny_qwen3, tmp_path):
    with running_server(tiny_qwen3, data_dir=tmp_path, ready=False) as server:
        server.wait_accepting()
        family = psutil.Process(server.pid).children(recursive=True)
        assert server.process
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(15) == 0
        psutil.wait_procs(family, timeout=5)
        assert not [process for process in family if _is_alive(process)]


def test_without_a_worker_healthz_says_what_is_missing(tiny_qwen3, tmp_path):
    with running_server(tiny_qwen3, data_dir=tmp_path, local_workers=0, ready=False) as server:
        server.wait_accepting()
        status, answer = server.get("/api/v1/healthz")
        assert status == 503
        assert any("worker" in reason for reason in answer["waiting_for"])


@contextmanager
def server_for_workers(model, folder):
    """A server without workers, its door for them, and the environment that they need."""
    address, environ = f"tcp://127.0.0.1:{free_port()}", {"TX_WORKER_TOKEN": "a-token-that-nobody-guesses"}
    with running_server(
        model, data_dir=folder, local_workers=0, worker_address=address, environ=environ, ready=False
    ) as server:
        yield server, address, os.environ | environ


def test_a_worker_started_by_hand_attaches(tiny_qwen3, tmp_path):
    with server_for_workers(tiny_qwen3, tmp_path) as (server, address, environ):
        command = [sys.executable, "-m", "tx_async.cli", "worker", "--connect", address]
        with subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL) as worker:
            server.wait_ready(60)
            worker.send_signal(signal.SIGINT)
            assert worker.wait(15) == 0


def test_a_worker_that_sees_another_storage_is_refused_with_the_reason_on_both_sides(tiny_qwen3, tmp_path):
    with server_for_workers(tiny_qwen3, tmp_path) as (server, address, environ):
        server.wait_accepting()
        shutil.rmtree(tmp_path / "checkpoints" / "probes")
        command = [sys.executable, "-m", "tx_async.worker.main", "--connect", address]
        worker = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
        assert worker.returncode == ExitCode.CONFIGURATION
        assert "is not the place that the server writes its checkpoints to" in worker.stderr
        assert "is not the place that the server writes its checkpoints to" in server.log()


def test_hypercorn_serves_the_app_as_any_other(tiny_qwen3, tmp_path):
    port = free_port()
    environ = {"TX_BASE_MODEL": str(tiny_qwen3), "TX_DATA_DIR": str(tmp_path), "TX_LOCAL_WORKERS": "0"}
    command = [sys.executable, "-m", "hypercorn", "-k", "uvloop", "-b", f"127.0.0.1:{port}", "tx_async.app:app"]
    with subprocess.Popen(command, env=os.environ | environ, stderr=subprocess.DEVNULL) as server:
        _wait_for_port(port)
        server.send_signal(signal.SIGTERM)
        assert server.wait(15) == 0


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def _shared_memory(*pids: int) -> list[Path]:
    """What these servers have there; other tests' servers come and go beside them."""
    return [path for pid in pids for path in Path("/dev/shm").glob(f"tx_async-{os.getuid()}-{pid}-*")]


def _is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
