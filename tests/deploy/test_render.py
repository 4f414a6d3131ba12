"""Files that start a server elsewhere: filled in with what was given, and accepted by the tools that read them."""

import json
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tx_async import cli
from tx_async.config import ServerConfig
from tx_async.deploy.render import TEMPLATES, Options, files
from tx_async.errors import ConfigError
from tx_async.wire.worker import EngineConfig

KINDS = ("docker", "systemd", "slurm", "kubernetes")
"""Those that run a server; `grafana` watches one: tests/deploy/test_grafana.py."""
ODD = '/models/it\'s 100% $odd "name"'


def text_of(kind: str, nodes: int = 0, **settings: Any) -> str:
    config = ServerConfig(**{"base_model": "/models/Qwen3-8B", "port": 8123} | settings)
    return "".join(files(kind, config, Options(nodes=nodes)).values())  # type: ignore[arg-type]


def documents(text: str) -> dict[tuple[str, str], dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="PyYAML reads the manifests")
    return {(item["kind"], item["metadata"]["name"]): item for item in yaml.safe_load_all(text)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_holds_the_model_and_the_port(kind):
    text = text_of(kind)
    assert "/models/Qwen3-8B" in text and "8123" in text and "@{" not in text
    assert "deploy/templates" not in text


@pytest.mark.parametrize("kind", KINDS)
def test_settings_that_were_given_are_in_the_command_and_no_other(kind):
    text = text_of(kind, train_share=2.5, backend_config=EngineConfig(tensor_parallel_size=4))
    assert "--train-share" in text and "2.5" in text and "tensor_parallel_size" in text
    assert "--sample-share" not in text and "max_lora_adapters" not in text


@pytest.mark.parametrize("kind", ["docker", "systemd", "slurm"])
def test_secrets_are_on_no_command_line(kind):
    text = text_of(kind, worker_token="s3cret-token-of-16", database_url="postgresql://tx:hunter2@db/tx")
    assert "hunter2" not in text and "s3cret" not in text


# ---- the command


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_prints_or_writes(kind, tmp_path, capsys):
    flags = ["deploy", kind, "--base-model", "/models/Qwen3-8B", "--port", "8123"]
    assert cli.main(flags) == 0
    printed = capsys.readouterr().out
    assert "/models/Qwen3-8B" in printed and "8123" in printed
    assert cli.main([*flags, "--output", str(tmp_path / "out")]) == 0
    (written,) = (tmp_path / "out").iterdir()
    assert capsys.readouterr().out == f"{written}\n"
    mode = stat.S_IMODE(written.stat().st_mode)
    assert mode == {"slurm": 0o755, "kubernetes": 0o600}.get(kind, 0o644)
    if kind != "kubernetes":  # whose token is made anew
        assert written.read_text() == printed


def test_a_kind_that_nobody_knows_and_a_folder_that_cannot_be_written_are_exit_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["deploy", "floppy"])
    assert ended.value.code == 2
    (tmp_path / "file").touch()
    assert cli.main(["deploy", "docker", "--base-model", "m/n", "--output", str(tmp_path / "file/x")]) == 2
    assert cli.main(["deploy", "slurm", "--base-model", "m/n", "--nodes", "-1"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_templates_come_with_the_wheel():
    assert {path.name for path in TEMPLATES.iterdir()} >= {"Dockerfile", "tx-async.service", "kubernetes.yaml"}
    assert TEMPLATES.parent.name == "deploy" and (TEMPLATES.parents[1] / "cli.py").exists()


# ---- docker


def test_an_image_listens_beyond_loopback_with_keys():
    text = text_of("docker")
    entrypoint = json.loads(text.splitlines()[-1].removeprefix("ENTRYPOINT "))
    assert entrypoint[:2] == ["tx-async", "serve"]
    assert "0.0.0.0" in entrypoint and "/data/api_keys" in entrypoint and "EXPOSE 8123" in text
    odd = json.loads(text_of("docker", base_model=ODD).splitlines()[-1].removeprefix("ENTRYPOINT "))
    assert ODD in odd


# ---- systemd


@pytest.mark.parametrize("model", ["/models/Qwen3-8B", ODD])
def test_systemd_accepts_the_unit(model, tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "tx-async.service"
    program = tmp_path / "tx-async"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    text = text_of("systemd", base_model=model, checkpoints_base="/mnt/check points")
    unit.write_text(text.replace(str(Path(sys.executable).with_name("tx-async")), str(program)))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "tx-async" in line]
    assert done.returncode == 0 and not complaints, done.stderr


def test_a_unit_keeps_its_data_and_starts_again_unless_an_operator_must_act():
    text = text_of("systemd", data_dir="/srv/tx")
    assert "RestartPreventExitStatus=2" in text and "ReadWritePaths=/srv/tx" in text and "UMask=0077" in text
    assert "--data-dir /var/lib/tx-async" in text_of("systemd") and "ReadWritePaths" not in text_of("systemd")


# ---- slurm


def run_script(script: str, tmp_path: Path) -> list[str]:
    """With programs that only say how they were called."""
    log = tmp_path / "calls"
    for name in ("tx-async", "srun"):
        program = tmp_path / name
        program.write_text(
            f'#!/bin/bash\nprintf "%s\\n" "$0 $*" >> {log}\necho "$TX_WORKER_TOKEN" >> {log}\nsleep 0.3\n'
        )
        program.chmod(0o755)
    script = script.replace(str(Path(sys.executable).with_name("tx-async")), str(tmp_path / "tx-async"))
    script = script.replace("srun --", f"{tmp_path}/srun --")
    (tmp_path / "job").write_text(script)
    done = subprocess.run(["bash", tmp_path / "job"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return log.read_text().splitlines()


def test_a_job_starts_a_server_and_its_workers_on_every_node(tmp_path):
    text = text_of("slurm", nodes=4, base_model=ODD)
    assert text.startswith("#!/bin/bash\n") and "#SBATCH --nodes=4" in text
    calls = run_script(text, tmp_path)
    server = next(line for line in calls if " serve " in line)
    workers = next(line for line in calls if "srun" in line)
    assert ODD in server and "--local-workers 0" in server and "--worker-address tcp://0.0.0.0:7001" in server
    assert "worker --connect tcp://" in workers and workers.endswith(":7001")
    tokens = {line for line in calls if "tx" not in line and "srun" not in line}
    assert len(tokens) == 1 and len(tokens.pop()) == 64


def test_a_job_of_one_node_and_shellcheck(tmp_path):
    text = text_of("slurm")
    assert "#SBATCH --nodes=1" in text
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", "-"], input=text, text=True, check=True)


def test_a_server_of_a_job_is_not_told_what_its_workers_find_out():
    backend = EngineConfig(num_processes=2, coordinator_address="node0:7777", tensor_parallel_size=4)
    text = text_of("slurm", backend_config=backend)
    assert "#SBATCH --nodes=2" in text and "node0" not in text and "num_processes" not in text
    assert shlex.quote('{"tensor_parallel_size": 4}') in text


# ---- kubernetes


def test_manifests_are_one_stream_of_yaml_with_a_service():
    found = documents(text_of("kubernetes", nodes=2))
    service = found["Service", "tx-async"]
    assert service["spec"]["ports"] == [{"name": "http", "port": 8123, "targetPort": 8123}]
    server = found["StatefulSet", "tx-async"]["spec"]["template"]["spec"]
    (container,) = server["containers"]
    assert container["command"][:2] == ["tx-async", "serve"] and "/models/Qwen3-8B" in container["command"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["path"].startswith("/api/v1/healthz")
    # Variables that Kubernetes makes of a service's name would be settings that nobody knows.
    assert server["enableServiceLinks"] is False
    job = found["Job", "tx-async-workers"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 2, 2)
    worker = job["template"]["spec"]
    assert worker["subdomain"] == found["Service", "tx-async-mesh"]["metadata"]["name"]
    assert worker["containers"][0]["command"][:4] == [
        "tx-async",
        "worker",
        "--connect",
        "tcp://tx-async-0.tx-async-mesh:7001",
    ]


def test_every_volume_and_secret_that_is_mounted_is_there():
    for settings in ({}, {"base_model": "Qwen/Qwen3-8B", "checkpoints_base": "s3://bucket/x"}):
        found = documents(text_of("kubernetes", **settings))  # type: ignore[arg-type]
        for kind, name in (("StatefulSet", "tx-async"), ("Job", "tx-async-workers")):
            pod = found[kind, name]["spec"]["template"]["spec"]
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            assert {m["name"] for m in pod["containers"][0]["volumeMounts"]} == set(volumes)
            claims = [v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v]
            assert all(("PersistentVolumeClaim", claim) in found for claim in claims)
        assert (("PersistentVolumeClaim", "tx-async-checkpoints") in found) == (not settings)
        assert found["Secret", "tx-async-keys"]["stringData"]["api_keys"].startswith("#")


def test_secrets_of_kubernetes_are_secrets():
    found = documents(text_of("kubernetes", database_url='postgresql://tx:hun"ter@db/tx', worker_token="t" * 16))
    secret = found.pop(("Secret", "tx-async"))["stringData"]
    assert secret == {"TX_WORKER_TOKEN": "t" * 16, "TX_DATABASE_URL": 'postgresql://tx:hun"ter@db/tx'}
    assert "hun" not in json.dumps(list(found.values()))
    made = documents(text_of("kubernetes"))["Secret", "tx-async"]["stringData"]["TX_WORKER_TOKEN"]
    assert len(made) == 64 and made not in text_of("kubernetes")


@pytest.mark.parametrize("model", ["x # y: {z}", "Qwen/Qwen3-0.6B", ODD])
def test_a_name_keeps_its_place(model):
    found = documents(text_of("kubernetes", base_model=model))
    (container,) = found["StatefulSet", "tx-async"]["spec"]["template"]["spec"]["containers"]
    assert model in container["command"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_line_break_cannot_begin_a_line_of_a_file(kind):
    with pytest.raises(ConfigError, match="base_model"):
        text_of(kind, base_model="a\nENV X=y")
