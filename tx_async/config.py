"""The server's configuration: one frozen struct, read from file (TOML) < environment (`TX_…`) < flags. Unknown keys are
refused by name."""

from __future__ import annotations

import logging
import math
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from tx_async import compatibility
from tx_async.errors import ConfigError
from tx_async.wire.worker import EngineConfig

logger = logging.getLogger(__name__)


MAY_BE_ZERO = frozenset(
    {
        "audit_events_max",
        "chunk_gap_ms",
        "heartbeat_timeout_s",
        "history_bytes_max",
        "history_steps_max",
        "local_workers",
        "long_poll_ms",
        "port",
        "result_cache_bytes",
        "result_retention_s",
        "results_kept_max",
        "seq_gap_ms",
        "session_retention_s",
        "session_timeout_s",
        "shared_memory_bytes",
        "shutdown_ms",
        "snapshot_idle_s",
        "stability_bytes_max",
        "stability_head_tokens",
        "stability_retention_s",
        "stability_support_max",
        "storage_patience_s",
        "tags_max",
        "text_bytes_max",
        "user_metadata_bytes_max",
    }
)
"""Numbers that mean "none" or "at once" where they are 0. None may be negative."""


class ServerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every setting of the server. Units and qualifiers come last in the names."""

    base_model: str = ""
    """Folder, or hub name, of the Hugging Face model that every adapter belongs to."""
    base_model_name: str = ""
    """Name that clients use for the base model, or several, separated by commas (in a file: a list); the first is
    reported. Empty = `base_model` itself."""
    tokenizer: str = ""
    """Hub name or folder where clients find the tokenizer; empty = `base_model_name` if that is a hub name, else
    `base_model`. The server reads its own from `base_model`."""
    host: str = "127.0.0.1"
    port: int = 8000
    backend_config: EngineConfig = EngineConfig()
    database_url: str = ""
    """`sqlite:///absolute/path.db` or `postgresql://…`; empty = `tx_async.db` in `data_dir`."""
    database_prepared_statements: bool = True
    """`false` for a PostgreSQL pooler that loses prepared statements (pgbouncer before 1.21, RDS Proxy). They are
    always off behind one that lends sessions to transactions."""
    data_dir: str = ""
    """Home of everything durable that has no place of its own; empty = `~/.local/share/tx_async`."""
    checkpoints_base: str = ""
    """Folder, or `s3://`, `gs://` or `az://` address, for checkpoints; empty = `checkpoints` in `data_dir`."""
    compilation_cache_dir: str = ""
    """Folder for compiled programs. They are run as they are found, so let nobody else write there; empty =
    `compilation_cache` in `data_dir`."""
    adopt: bool = False
    """Accept, for this start only, that the base model or the storage is not the journal's. It cannot stand in a
    file."""
    api_keys_file: str = ""
    """File of hashed API keys (`tx-async keys`); required unless the server listens on loopback only. Changes take
    effect at once."""
    allowed_hosts: str = ""
    """Names, separated by commas, that a server without keys answers to besides those of loopback; `*` = any."""
    allowed_origins: str = ""
    """Origins (`https://host:port`), separated by commas, whose pages may use a server without keys; `*` = any."""
    cors_origins: str = ""
    """Origins, separated by commas, whose pages may call the OpenAI- and Anthropic-compatible routes and read the
    answers; `*` = any; empty = none. On a server without keys, list them in `allowed_origins`, too."""
    trusted_proxies: str = ""
    """Addresses or networks, separated by commas, of proxies whose X-Forwarded-Proto and X-Forwarded-Host are
    believed."""
    dashboard: bool | None = None
    """Serve the page at `/`; on by default where `host` is loopback. Where there are keys, the page asks for one and
    shows that key's runs; an admin's key sees all runs and the server's state."""
    tls_cert: str = ""
    """PEM file with the certificate for https, and the intermediate certificates up to its root."""
    tls_key: str = ""
    """PEM file with the private key of `tls_cert`, without a passphrase."""

    local_workers: int = 1
    """Workers that the server spawns and supervises; 0 = all are started by hand."""
    worker_address: str = ""
    """Where workers from outside attach, for example `tcp://0.0.0.0:7001`; empty = only workers on this host, through
    a socket file."""
    worker_token: str = ""
    """Shared secret that a worker over tcp must prove."""
    worker_heartbeat_interval_ms: int = 1_000
    worker_lease_ms: int = 60_000
    """A worker that has been silent for this long is lost; its work is done again."""
    commands_in_flight_max: int = 2
    """Commands that are sent ahead to a device, so that it never waits for the event loop."""
    shared_memory_bytes: int = 512 * 2**20
    """Size of each shared-memory arena between the server and a worker on its own host."""

    external_inference_url: str = ""
    """URL of a vLLM that samples what it can beside the local worker, for example `http://127.0.0.1:8001`; several are
    separated by commas."""
    external_inference_lora_base: str = ""
    """Folder for adapters that vLLM can read as well; empty = `external_inference` in `data_dir`."""
    external_inference_api_key: str = ""
    external_inference_api_key_file: str = ""
    """File with vLLM's API key, which a command line would show to everybody on the host."""
    external_inference_allow_unproven: bool = False
    """Let vLLM sample adapters of mixtures of experts, too."""

    request_body_bytes_max: int = 256 * 2**20
    """Bytes of one request body, unpacked; a larger one is answered 413."""
    bodies_bytes_max: int = 256 * 2**20
    """Bytes of all request bodies that are being read, unpacked and decoded; more of them wait."""
    tenant_bodies_bytes_max: int = 128 * 2**20
    """The same for one API key; a body that takes more than three quarters of it is answered 413."""
    body_timeout_ms: int = 30_000
    """A request body that makes no progress for this long is answered 408, and its connection closed."""
    request_datums_max: int = 4_096
    """Datums of one request."""
    json_values_max: int = 1_000_000
    """Numbers and strings in one JSON body; a body with more is answered 413, before it is decoded."""
    json_depth_max: int = 64
    """How deep JSON may nest; deeper is answered 400."""
    queued_requests_max: int = 20_000
    """Accepted, unfinished requests; more are answered 429."""
    queued_bytes_max: int = 4 * 2**30
    tenant_queued_samples_max: int = 10_000
    """Unfinished samples (num_samples counted) of one API key; more are answered 429."""
    sample_num_samples_max: int = 4_096
    long_poll_ms: int = 25_000
    """How long `retrieve_future` waits before it answers 408."""
    seq_gap_ms: int = 15_000
    """A missing predecessor in `seq_id` order counts as burned when its client has been silent for this long."""
    chunk_gap_ms: int = 60_000
    """The same while it may be the first piece of a batch, which the SDK sends last."""
    seq_ahead_max: int = 10_000
    """How far a `seq_id` may lie beyond the largest one that its run has accepted; further ahead is answered 400."""
    train_share: float = 1.0
    """Weight of training against sampling when both have work."""
    sample_share: float = 1.0
    """Weight of sampling that nobody watches live, likewise."""
    live_share: float = 1.0
    """Weight of requests that are answered token by token, likewise; it is added to `sample_share` while both have
    work."""

    tenant_sessions_max: int = 10_000
    """Sessions of one API key; more are answered 429. Old ones are forgotten after `session_retention_s`."""
    tenant_models_max: int = 10_000
    """Training runs of one API key; more are answered 429."""
    tenant_samplers_max: int = 100_000
    """Sampling sessions of one API key; more are answered 429."""
    tenant_records_bytes_max: int = 32 * 2**20
    """Bytes of one API key's sessions, training runs and sampling sessions, with metadata; more are answered 429."""
    user_metadata_bytes_max: int = 64 * 1024
    """Bytes of one `user_metadata`; more are answered 400."""
    text_bytes_max: int = 1024
    """Bytes of one tag, `display_name`, `sdk_version`, `project_id` or reason; a longer one is answered 400."""
    tags_max: int = 64
    """Tags of one session; more are answered 400."""
    heartbeat_timeout_s: int = 60
    """A client without heartbeat or poll for this long will not fetch its samples: they are cancelled."""
    session_timeout_s: int = 600
    """A session without heartbeat for this long has ended: its queued samples are cancelled."""
    result_retention_s: int = 24 * 3600
    """How long results can be fetched again, after they were first ready."""
    results_kept_max: int = 100_000
    """Number of results that are kept; beyond it, the oldest go before their time."""
    result_cache_bytes: int = 256 * 2**20
    """Newest results kept in memory; older ones are read from the journal."""
    session_retention_s: int = 30 * 24 * 3600
    """How long ended sessions and their training runs (not their checkpoints) are kept after their last use."""
    audit_events_max: int = 10_000
    """Events that the audit log keeps; beyond them, the oldest go."""
    history_steps_max: int = 1_024
    """Optimizer steps that one training run's history keeps; beyond them, the older ones are thinned."""
    history_bytes_max: int = 256 * 2**20
    """Bytes of all histories of training runs; beyond them, those of the longest unused runs go first."""
    stability_head_tokens: int = 64
    """Tokens that are recorded with each sampled one when a client asks for it (`record_stability_info`), 1 to 127."""
    stability_support_max: int = 4_096
    """Tokens that top_k and top_p may leave to draw from when a client asks for that, at most 4,096: all are
    recorded."""
    stability_retention_s: int = 24 * 3600
    """How long recorded sequences are kept after they were last sampled or trained on."""
    stability_bytes_max: int = 4 * 2**30
    """Bytes of one API key's recorded sequences; beyond them, the longest unused go first."""
    retention_interval_s: int = 60
    """Time between two sweeps for what these limits no longer keep."""
    storage_patience_s: int = 600
    """How long a save waits for storage that does not accept it, and a sampler or load_state for files that storage
    does not deliver, before they fail."""
    snapshot_every_steps: int = 16
    """Optimizer steps between two snapshots of a model."""
    snapshot_every_bytes: int = 256 * 2**20
    """Bytes of request bodies that a snapshot would free; beyond them, one is taken early."""
    snapshot_idle_s: int = 30
    """A snapshot is taken of a model without requests for this long."""
    shutdown_ms: int = 10_000
    """Longest time that a shutdown spends on draining and snapshots."""
    otlp_endpoint: str = ""
    """Where OpenTelemetry traces go, over OTLP/HTTP: http://127.0.0.1:4318; "" = nowhere. Needs the extra `otel`."""
    metrics_by_key: bool = False
    """Whether `/metrics` has a series for each key: its bytes, by its id. Otherwise it has only those of each role."""
    log_level: str = "info"
    log_format: str = "text"
    """`text`, or `json`: one object per line."""

    @property
    def data_path(self) -> Path:
        return Path(self.data_dir).expanduser() if self.data_dir else Path.home() / ".local/share/tx_async"

    @property
    def resolved_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.data_path / 'tx_async.db'}"

    @property
    def sqlite_file(self) -> Path | None:
        """The journal's file; None where it is in a database of another kind."""
        if not self.database_url:
            return (self.data_path / "tx_async.db").absolute()
        path = self.database_url.removeprefix("sqlite:///")
        return None if path == self.database_url else Path("/" + path.lstrip("/"))

    @property
    def resolved_checkpoints_base(self) -> str:
        return self.checkpoints_base or str(self.data_path / "checkpoints")

    @property
    def resolved_external_inference_lora_base(self) -> str:
        return self.external_inference_lora_base or str(self.data_path / "external_inference")

    @property
    def resolved_compilation_cache_dir(self) -> str:
        """Of the local workers."""
        own = self.backend_config.compilation_cache_dir or self.compilation_cache_dir
        return own or str(self.data_path / "compilation_cache")


def load(flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None) -> ServerConfig:
    """The configuration from all sources.

    `TX_CONFIG` names a TOML file; `TX_<FIELD>` sets a field (`TX_BACKEND_CONFIG` as JSON); `flags` holds parsed
    values and wins. Raises `ConfigError` naming the key and its source.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    if file := environ.get("TX_CONFIG"):
        values |= _in_our_names(_read_file(Path(file)), f"{file}: ")
    values |= _in_our_names(_read_environment(environ), "TX_")
    values |= _in_our_names({key: value for key, value in (flags or {}).items() if value is not None}, "")
    if isinstance(values.get("backend_config"), str):
        values["backend_config"] = _parse_json("backend_config", values["backend_config"])
    if isinstance(values.get("backend_config"), dict):
        values["backend_config"] = compatibility.translated(
            values["backend_config"], EngineConfig.__struct_fields__, _say, compatibility.BACKEND, "backend_config."
        )
    if isinstance(values.get("base_model_name"), list):
        values["base_model_name"] = ",".join(map(str, values["base_model_name"]))
    values = dict(compatibility.worker_door(values, _say))
    try:
        config = msgspec.convert(values, ServerConfig, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"The configuration is invalid: {error}") from error
    _check_numbers(config, "")
    _check_numbers(config.backend_config, "backend_config.")
    return config


def _check_numbers(settings: ServerConfig | EngineConfig, where: str) -> None:
    """Raises `ConfigError` for a number with which a server would start, and then refuse everything or wait for ever
    for its workers."""
    for field in msgspec.structs.fields(settings):
        given = getattr(settings, field.name)
        for value in given if isinstance(given, tuple) else (given,):
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            may_be_zero = field.name in MAY_BE_ZERO or field.default == 0
            if not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
                least = "at least 0" if may_be_zero else "more than 0"
                raise ConfigError(f"{where}{field.name} is {value}; it must be {least}.")


def _in_our_names(values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    return compatibility.translated(values, ServerConfig.__struct_fields__, _say, compatibility.SERVER, where)


def _say(line: str) -> None:
    """Print a line about a setting that is accepted but means something else here."""
    logger.warning("%s", line)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"TX_CONFIG names {path}, which cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    if "adopt" in values:
        raise ConfigError(f"{path} sets adopt, which is for one start only: use --adopt or TX_ADOPT=1.")
    return values


def _read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    fields = {f"TX_{name.upper()}": name for name in (*ServerConfig.__struct_fields__, *compatibility.SERVER)}
    unknown = sorted(name for name in environ if name.startswith("TX_") and name not in fields and name != "TX_CONFIG")
    if unknown:
        raise ConfigError(
            f"Unknown setting in the environment: {', '.join(unknown)}.{compatibility.nearest(unknown[0], fields)} "
            f"Known: {', '.join(sorted(fields))}."
        )
    values = {fields[name]: value for name, value in environ.items() if name in fields}
    if url := environ.get(compatibility.DATABASE_VARIABLE):
        values.setdefault("database_url", url)
    return values


def _parse_json(key: str, text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{key} is not valid JSON: {error}") from error
