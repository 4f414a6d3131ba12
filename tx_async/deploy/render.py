"""Fill in the templates with the settings given. Pure: `tx-async deploy` prints or writes what comes out.

A template's placeholders are `@{name}`, because shell, systemd and Kubernetes all use `$` themselves. Secrets never
appear on a command line: Kubernetes gets them as a Secret, the others read them from a file or the environment.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
from msgspec import Struct

from tx_async.config import ServerConfig
from tx_async.deploy import grafana
from tx_async.errors import ConfigError

Kind = Literal["docker", "systemd", "slurm", "kubernetes", "grafana"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DASHBOARD = "tx-async-dashboard.json"
TEMPLATES = Path(__file__).parent / "templates"
WORKER_PORT = 7001
SECRET_SETTINGS = ("worker_token", "database_url")
ANY_HOST = "0.0.0.0"
MODEL_PLACEHOLDER = "/models/your-model"
STOP_MARGIN_S = 10
_PLACE = re.compile(r"@\{(\w+)\}")


class Options(Struct, frozen=True, kw_only=True):
    nodes: int = 0
    """How many hosts run workers; 0 = as many as `backend_config.num_processes`."""
    gpus: int = 8
    """GPUs of each host."""
    image: str = "tx-async"


def files(kind: Kind, config: ServerConfig, options: Options) -> dict[str, str]:
    """The files of a kind, by name. Raises `ConfigError` for settings that cannot be deployed this way."""
    if not config.base_model:
        config = msgspec.structs.replace(config, base_model=MODEL_PLACEHOLDER)
    if options.nodes < 0 or options.gpus < 0:
        raise ConfigError("--nodes and --gpus cannot be negative.")
    for name, text in (_given(config) | {"image": options.image}).items():
        if not text.isprintable():
            raise ConfigError(f"{name} is {text!r}: a line break, or what nobody can see, has no place in these files.")
    kinds = {"docker": _docker, "systemd": _systemd, "slurm": _slurm, "kubernetes": _kubernetes, "grafana": _grafana}
    return kinds[kind](config, options)


def in_one_stream(rendered: dict[str, str]) -> str:
    """The text to print. Files in different languages make no stream: then it is the dashboard alone."""
    return rendered.get(DASHBOARD) or "".join(rendered.values())


def write(path: Path, text: str) -> None:
    """Write a file, for its owner alone if it holds secrets; a script becomes executable."""
    mode = 0o600 if "stringData" in text else 0o755 if text.startswith("#!") else 0o644
    with open(path, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        os.fchmod(file.fileno(), mode)
        file.write(text)


def _fill(template: str, **values: Any) -> str:
    """Fill every placeholder. A template and values that do not match are our mistake."""
    text = (TEMPLATES / template).read_text()
    assert {match[1] for match in _PLACE.finditer(text)} == set(values), template
    return _PLACE.sub(lambda match: str(values[match[1]]), text)


# ---- the command, with every setting that is not the default


def _given(config: ServerConfig) -> dict[str, str]:
    """Setting -> its text, without secrets."""
    defaults = ServerConfig()
    given: dict[str, str] = {}
    for name in config.__struct_fields__:
        value, default = getattr(config, name), getattr(defaults, name)
        if value != default and name not in SECRET_SETTINGS:
            given[name] = _text(value, default)
    return given


def _text(value: Any, default: Any) -> str:
    if isinstance(value, Struct):
        built, usual = msgspec.to_builtins(value), msgspec.to_builtins(default)
        return json.dumps({key: item for key, item in built.items() if item != usual[key]})
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value)


def _serve(config: ServerConfig, program: str = "tx-async") -> list[str]:
    given = {"base_model": config.base_model, "port": str(config.port)} | _given(config)
    return [program, "serve", *(part for name, text in given.items() for part in (f"--{name.replace('_', '-')}", text))]


def _with_defaults(config: ServerConfig, **values: Any) -> ServerConfig:
    """The configuration with `values`, which this kind needs, wherever a setting was not given."""
    usual = ServerConfig()
    missing = {name: value for name, value in values.items() if getattr(config, name) == getattr(usual, name)}
    return msgspec.structs.replace(config, **missing)


def _nodes(config: ServerConfig, options: Options) -> int:
    return options.nodes or config.backend_config.num_processes


def _led_by_workers(config: ServerConfig) -> ServerConfig:
    """Workers find the number of processes and the coordinator themselves, so the server is told neither."""
    backend = msgspec.structs.replace(config.backend_config, num_processes=1, coordinator_address="")
    config = msgspec.structs.replace(config, backend_config=backend, local_workers=0)
    return _with_defaults(config, worker_address=f"tcp://{ANY_HOST}:{WORKER_PORT}")


def _worker_port(config: ServerConfig) -> str:
    return config.worker_address.rpartition(":")[2]


def _stop_s(config: ServerConfig) -> int:
    return config.shutdown_ms // 1000 + STOP_MARGIN_S


def _is_folder(base_model: str) -> bool:
    return base_model.startswith("/")


# ---- docker


def _docker(config: ServerConfig, options: Options) -> dict[str, str]:
    config = _with_defaults(config, host=ANY_HOST, api_keys_file="/data/api_keys", data_dir="/data")
    model = config.base_model
    mount = f"-v {shlex.quote(f'{model}:{model}:ro')} " if _is_folder(model) else ""
    text = _fill(
        "Dockerfile",
        model=config.base_model,
        port=config.port,
        volumes=mount,
        keys=shlex.quote(config.api_keys_file),
        keys_in_image=shlex.quote(config.api_keys_file),
        scheme="https" if config.tls_cert else "http",
        entrypoint=json.dumps(_serve(config)),
    )
    return {"Dockerfile": text}


# ---- grafana


def _grafana(config: ServerConfig, options: Options) -> dict[str, str]:
    """The dashboard, alert rules, and how Prometheus finds the server."""
    scheme = "https" if config.tls_cert else "http"
    scrape = _fill("scrape.yaml", scheme=scheme, port=config.port, model=json.dumps(config.base_model))
    return {
        DASHBOARD: grafana.dashboard(config.base_model),
        "tx-async-alerts.yaml": _fill("alerts.yaml"),
        "tx-async-scrape.yaml": scrape,
    }


# ---- systemd


def _systemd(config: ServerConfig, options: Options) -> dict[str, str]:
    state = "/var/lib/tx-async"
    config = _with_defaults(config, data_dir=state)
    places = (config.data_dir, config.checkpoints_base, config.compilation_cache_dir)
    folders = sorted({place for place in places if place.startswith("/") and not place.startswith(state)})
    text = _fill(
        "tx-async.service",
        model=config.base_model,
        model_unit=_unit_text(config.base_model),
        port=config.port,
        readme=Path(__file__).with_name("README.md"),
        command=" ".join(map(_unit_word, _serve(config, str(_program())))),
        stop_s=_stop_s(config),
        writable="".join(f"ReadWritePaths={_unit_word(folder)}\n" for folder in folders),
    )
    return {"tx-async.service": text}


def _program() -> Path:
    """The `tx-async` of this environment: systemd takes absolute paths only."""
    return Path(sys.executable).with_name("tx-async")


def _unit_text(text: str) -> str:
    return text.replace("%", "%%")


def _unit_word(text: str) -> str:
    """One argument of ExecStart: https://www.freedesktop.org/software/systemd/man/latest/systemd.service.html"""
    escaped = _unit_text(text).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$").replace("\n", "\\n")
    return escaped if re.fullmatch(r"[\w@%+=:,./-]+", text) else f'"{escaped}"'


# ---- slurm


def _slurm(config: ServerConfig, options: Options) -> dict[str, str]:
    nodes = _nodes(config, options)
    config = _led_by_workers(config)
    if config.api_keys_file:
        config = _with_defaults(config, host=ANY_HOST)
    text = _fill(
        "tx-async.sbatch",
        model=config.base_model,
        port=config.port,
        nodes=nodes,
        gpus=options.gpus,
        command=shlex.join(_serve(config, str(_program()))),
        worker=shlex.join([str(_program()), "worker"]),
        worker_port=_worker_port(config),
    )
    return {"tx-async.sbatch": text}


# ---- kubernetes


def _kubernetes(config: ServerConfig, options: Options) -> dict[str, str]:
    nodes = _nodes(config, options)
    config = _led_by_workers(config)
    config = _with_defaults(
        config,
        host=ANY_HOST,
        api_keys_file="/etc/tx-async/api_keys",
        data_dir="/data",
        checkpoints_base="/checkpoints",
    )
    is_shared, has_folder = "://" not in config.checkpoints_base, _is_folder(config.base_model)
    mounts = [("checkpoints", config.checkpoints_base, False)] * is_shared
    mounts += [("models", str(Path(config.base_model).parent), True)] * has_folder
    connect = f"tcp://tx-async-0.tx-async-mesh:{_worker_port(config)}"
    text = _fill(
        "kubernetes.yaml",
        model=config.base_model,
        port=config.port,
        nodes=nodes,
        gpus=options.gpus,
        image=json.dumps(options.image),
        command=json.dumps(_serve(config)),
        worker=json.dumps(["tx-async", "worker", "--connect", connect]),
        worker_port=_worker_port(config),
        stop_s=_stop_s(config),
        probe_scheme="HTTPS" if config.tls_cert else "HTTP",
        secrets=_lines(_secrets(config), 2),
        checkpoints_claim=_claim("tx-async-checkpoints", "ReadWriteMany", "500Gi") if is_shared else "",
        models_claim=_models_claim(config) if has_folder else "",
        mounts=_lines([_mount(*mount) for mount in mounts], 12),
        volumes=_lines([_volume(name) for name, _, _ in mounts], 8),
    )
    return {"kubernetes.yaml": text}


def _secrets(config: ServerConfig) -> list[str]:
    values = {"TX_WORKER_TOKEN": config.worker_token or secrets.token_hex()}
    if config.database_url:
        values["TX_DATABASE_URL"] = config.database_url
    return [f"{name}: {json.dumps(value)}" for name, value in values.items()]


def _mount(name: str, path: str, is_read_only: bool) -> str:
    return f"- {{name: {name}, mountPath: {json.dumps(path)}{', readOnly: true' * is_read_only}}}"


def _volume(name: str) -> str:
    return f"- {{name: {name}, persistentVolumeClaim: {{claimName: tx-async-{name}}}}}"


def _claim(name: str, access_mode: str, storage: str) -> str:
    return (
        f"apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata:\n  name: {name}\nspec:\n"
        f"  accessModes: [{access_mode}]\n  resources: {{requests: {{storage: {storage}}}}}\n---\n"
    )


def _models_claim(config: ServerConfig) -> str:
    place = config.base_model
    return f"# Put the base model's folder here: the pods see it as {place}.\n" + _claim(
        "tx-async-models", "ReadWriteMany", "500Gi"
    )


def _lines(lines: Sequence[str], indent: int) -> str:
    return "\n".join(" " * indent + line for line in lines)
