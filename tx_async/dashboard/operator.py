"""The tables that only an operator sees: keys and their use, the audit log, sessions, health, settings without their
secrets."""

from __future__ import annotations

import platform
import re
from collections import Counter
from importlib import metadata
from itertools import islice
from typing import Any

import msgspec

from tx_async import __version__
from tx_async.api.context import Call
from tx_async.config import ServerConfig
from tx_async.wire.worker import PROTOCOL_VERSION

SHOWN_MAX = 200
HIDDEN = "(set, not shown)"
_SECRET_NAMES = re.compile(r"(token|secret|password|_api_key)$")
_PASSWORD_IN_URL = re.compile(r"(?<=://)([^/@:]*):[^@/]*@")
_SECRET_IN_QUERY = re.compile(r"([?&](?:password|secret|token|key)[^=&]*=)[^&]*", re.IGNORECASE)
PACKAGES = ("jax", "jaxlib", "starlette", "hypercorn", "msgspec", "numpy", "tinker")


async def report(call: Call) -> dict[str, Any]:
    return {
        "keys": keys(call),
        "audit": audit(call),
        "sessions": sessions(call),
        "health": await health(call),
        "settings": settings(call.api.config),
        "versions": versions(),
    }


def keys(call: Call) -> list[dict[str, Any]]:
    """The registered keys, and owners of records that belong to no registered key."""
    scheduler = call.scheduler
    num_sessions = Counter(session.owner for session in scheduler.sessions.values())
    num_runs = Counter(model.owner for model in scheduler.models.values())
    num_bytes: Counter[str] = Counter()
    for checkpoint in scheduler.checkpoints.values():
        num_bytes[checkpoint.owner] += checkpoint.size_bytes
    queued = {queue.owner: queue for queue in scheduler.overview().queues}
    registered = {key.owner: key for key in call.api.owners.registered() if key.owner}
    owners = [*registered, *sorted({*num_sessions, *num_runs, *num_bytes, *queued} - registered.keys())]
    return [
        {
            "name": registered[owner].name if owner in registered else "",
            "owner": owner,
            "id": registered[owner].key_id if owner in registered else "",
            "role": registered[owner].role if owner in registered else "",
            "expires_at": registered[owner].expires_at if owner in registered else None,
            "sessions": num_sessions[owner],
            "runs": num_runs[owner],
            "bytes": num_bytes[owner],
            "requests": queued[owner].requests if owner in queued else 0,
            "samples": queued[owner].samples if owner in queued else 0,
        }
        for owner in owners
    ]


def audit(call: Call) -> list[dict[str, Any]]:
    names = call.api.owners.names()
    events = islice(reversed(list(call.scheduler.audits.values())), SHOWN_MAX)
    return [
        {
            "at": event.at,
            "event": event.event,
            "subject": event.subject,
            "by": names.get(event.owner, event.owner) or "operator",
            "details": event.details,
        }
        for event in events
    ]


def sessions(call: Call) -> list[dict[str, Any]]:
    names = call.api.owners.names()
    runs = Counter(model.session_id for model in call.scheduler.models.values())
    newest = sorted(call.scheduler.sessions.values(), key=lambda session: session.created_at, reverse=True)
    return [
        {
            "id": session.session_id,
            "key": names.get(session.owner, session.owner),
            "created_at": session.created_at,
            "status": session.status,
            "runs": runs[session.session_id],
            "name": session.display_name or "",
            "tags": list(session.tags),
            "sdk": session.sdk_version,
        }
        for session in newest[:SHOWN_MAX]
    ]


async def health(call: Call) -> dict[str, dict[str, str]]:
    report = await call.api.health.report() if call.api.health else {}
    return {name: {"state": finding.state, "text": finding.text} for name, finding in report.items()}


def settings(config: ServerConfig) -> list[dict[str, Any]]:
    """The resolved settings; a secret one only says whether it is set."""
    resolved = {
        "database_url": config.resolved_database_url,
        "checkpoints_base": config.resolved_checkpoints_base,
        "compilation_cache_dir": config.resolved_compilation_cache_dir,
        "data_dir": str(config.data_path),
    }
    found = []
    for field in msgspec.structs.fields(ServerConfig):
        value = resolved.get(field.name, getattr(config, field.name))
        is_default = getattr(config, field.name) == field.default
        found.append({"name": field.name, "value": shown(field.name, value), "is_default": is_default})
    return found


def shown(name: str, value: Any) -> Any:
    if _SECRET_NAMES.search(name):
        return HIDDEN if value else ""
    if isinstance(value, msgspec.Struct):
        return {key: shown(key, item) for key, item in msgspec.structs.asdict(value).items()}
    if isinstance(value, str):
        return _SECRET_IN_QUERY.sub(r"\1…", _PASSWORD_IN_URL.sub(r"\1:…@", value))
    return value


def versions() -> dict[str, str]:
    known = {"tx_async": __version__, "python": platform.python_version(), "worker protocol": str(PROTOCOL_VERSION)}
    for package in PACKAGES:
        try:
            known[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return known | {"system": platform.platform()}
