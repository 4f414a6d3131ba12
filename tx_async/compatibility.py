"""Accepts the settings of SkyRL tx: a user who comes from there changes the command's name and nothing else.

A setting with another name here is translated; one without a meaning here is accepted, and one line says what happens
instead. Sources: the `EngineConfig` of its server and the `JaxBackendConfig` of its JAX backend (as of August 2026).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msgspec import Struct

from tx_async.errors import ConfigError

DATABASE_VARIABLE = "SKYRL_DATABASE_URL"
NEVER_S = 10 * 365 * 24 * 3600
WORKER_PORT = 7001

Note = Callable[[str], object]
Values = Mapping[str, Any]


class Foreign(Struct, frozen=True):
    """A setting that another server has."""

    doc: str
    take: Callable[[Any, Note], dict[str, Any]]
    """(value, a function to report what happens instead) -> settings of ours. Raises `ConfigError`."""


def _seconds(ours: str, instead: str) -> Callable[[Any, Note], dict[str, Any]]:
    """A duration under another name, for which -1 means "never" there."""

    def take(value: Any, note: Note) -> dict[str, Any]:
        if str(value).strip() != "-1":
            return {ours: value}
        note(f"-1 (never): {instead}")
        return {ours: NEVER_S}

    return take


def _instead(text: str) -> Callable[[Any, Note], dict[str, Any]]:
    def take(value: Any, note: Note) -> dict[str, Any]:
        note(f"{value!r} changes nothing here: {text}")
        return {}

    return take


def _backend(value: Any, note: Note) -> dict[str, Any]:
    if value != "jax":
        raise ConfigError(f"backend {value!r} is not available here: this server has one backend, jax.")
    return {}


def _sequences(value: Any, note: Note) -> dict[str, Any]:
    if value:
        return {"sample_max_num_sequences": value}
    note("0 (no limit): the default is taken; sequences beyond it queue")
    return {}


def _absent(ours: str) -> Callable[[Any, Note], dict[str, Any]]:
    """A setting whose null means the default."""
    return lambda value, note: {} if value is None else {ours: value}


SERVER = {
    "backend": Foreign("Of SkyRL tx: `jax`, the one there is.", _backend),
    "session_timeout_sec": Foreign(
        "Of SkyRL tx: `session_timeout_s`.", _seconds("session_timeout_s", "a session ends after ten years of silence")
    ),
    "session_cleanup_interval_sec": Foreign(
        "Of SkyRL tx: `retention_interval_s`.",
        _seconds("retention_interval_s", "silent sessions still end, what they leave is looked for every ten years"),
    ),
    "forwarding_inference_max_connections": Foreign(
        "Of SkyRL tx: taken and not needed.", _instead("requests to workers share one connection, without a limit")
    ),
}
"""Names of flags, keys of the file and (with TX_ before them) variables."""

BACKEND = {
    "enforce_eager": Foreign("", _instead("every program is compiled, once, and kept in compilation_cache_dir")),
    "shard_attention_heads": Foreign(
        "", _instead("attention is cut over tensor_parallel_size devices, as all else is")
    ),
    "mhc_expansion_rate": Foreign("", _instead("adapters are LoRA alone, of one residual stream")),
    "loss_chunk_size": Foreign("", _instead("the loss is computed in chunks whose size the engine chooses")),
    "use_ray": Foreign("", _instead("the server starts its workers itself, tx-async worker those of other hosts")),
    "ray_actor_options": Foreign("", _instead("there is no Ray")),
    "ray_pg_bundles": Foreign("", _instead("there is no Ray")),
    "sample_max_num_sequences": Foreign("", _sequences),
    "coordinator_address": Foreign("", _absent("coordinator_address")),
    "num_processes": Foreign("", _absent("num_processes")),
}
"""Keys of `backend_config`."""


def translated(values: Values, known: Iterable[str], note: Note, foreign: Mapping[str, Foreign], where: str) -> Values:
    """The settings under our own names. If both names are given, ours wins. where: whose keys these are, for messages.

    Raises `ConfigError` for a key that is nobody's, with the nearest one that exists.
    """
    ours, taken = set(known), {}
    for key, value in values.items():
        if key in foreign:
            taken |= foreign[key].take(value, lambda text, key=key: note(f"{where}{key} = {text}."))
        elif key not in ours:
            raise ConfigError(f"{where}{key} is unknown.{nearest(key, [*ours, *foreign])}")
    return taken | {key: value for key, value in values.items() if key not in foreign}


def nearest(key: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(key, sorted(known), 1, 0.4)
    return f" Did you mean {found[0]}?" if found else ""


def worker_door(values: Values, note: Note) -> Values:
    """A mesh over hosts needs a door for the other hosts' workers; in SkyRL tx, a coordinator's address is enough."""
    backend = values.get("backend_config")
    if values.get("worker_address") or not isinstance(backend, dict):
        return values
    host = host_of(str(backend.get("coordinator_address") or ""))
    if not host or int(backend.get("num_processes") or 1) < 2 or host in ("localhost", "127.0.0.1", "[::1]"):
        return values
    address = f"tcp://0.0.0.0:{WORKER_PORT}"
    note(
        f"backend_config.coordinator_address is on {host}: workers of other hosts attach at {address} (worker_address)."
    )
    return {**values, "worker_address": address}


def host_of(address: str) -> str:
    """`host:port` -> host."""
    return address.rpartition(":")[0]


def connect_of(coordinator_address: str) -> str:
    """Where a worker finds this coordinator's server, unless it is told another address."""
    return f"tcp://{host_of(coordinator_address)}:{WORKER_PORT}"
