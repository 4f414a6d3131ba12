"""The route that serves the audit log, and the reports of key changes to it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime
from functools import partial

from tx_async.api.context import Call
from tx_async.api.key_file import Key, KeyFile, Keys, format_time
from tx_async.api.rest import timestamp
from tx_async.errors import InvalidRequest
from tx_async.scheduler.interface import SchedulerApi
from tx_async.wire import tinker
from tx_async.wire.records import AuditRecord

_PREFIXES = {
    "all": "",
    "runs": "run.",
    "checkpoints": "checkpoint.",
    "keys": "key.",
    "projects": "project.",
    "teams": "team.",
    "organizations": "organization.",
}
KEY_ADDED, KEY_CHANGED, KEY_REVOKED = "key.added", "key.changed", "key.revoked"


async def audit_log(call: Call) -> tinker.AuditLogResponse:
    """The caller's own events, oldest first; for an admin, everybody's. `day` (UTC) and `event_type` filter them."""
    prefix, day = _prefix(call.query("event_type", "all")), _day(call.query("day"))
    names, key = call.api.owners.names(), call.api.owners.find(call.key)
    entries = [
        _entry(event, names)
        for event in call.scheduler.audits.values()
        if (call.is_admin or event.owner == call.owner or _is_about(event, key))
        and event.event.startswith(prefix)
        and (day is None or datetime.fromtimestamp(event.at, UTC).date() == day)
    ]
    return tinker.AuditLogResponse(entries=entries)


def _prefix(event_type: str) -> str:
    if event_type not in _PREFIXES:
        raise InvalidRequest(f"event_type is {event_type[:50]!r}; it must be one of {', '.join(_PREFIXES)}.")
    return _PREFIXES[event_type]


def _day(text: str) -> date | None:
    try:
        return date.fromisoformat(text) if text else None
    except ValueError:
        raise InvalidRequest(f"day is {text[:50]!r}; write YYYY-MM-DD.") from None


def _is_about(event: AuditRecord, key: Key | None) -> bool:
    return key is not None and event.event.startswith("key.") and event.details.get("key_id") == key.key_id


def _entry(event: AuditRecord, names: Mapping[str, str]) -> tinker.AuditLogEntry:
    kind, _, _ = event.event.partition(".")
    details: dict[str, object] = {"actor": names.get(event.owner, event.owner) or "operator", **event.details}
    if kind == "checkpoint":
        run = event.subject.removeprefix("tinker://").partition("/")[0]
        details |= {"tinker_path": event.subject, "training_run_id": run}
        return _of(event, details, run, event.subject)
    return _of(event, details | {"training_run_id" if kind == "run" else "name": event.subject})


def _of(
    event: AuditRecord, details: dict[str, object], model_id: str | None = None, tinker_path: str | None = None
) -> tinker.AuditLogEntry:
    return tinker.AuditLogEntry(
        timestamp=timestamp(event.at),
        event=event.event,
        event_details=details,
        model_id=model_id,
        tinker_path=tinker_path,
    )


# ---- keys


def follow_keys(file: KeyFile, scheduler: SchedulerApi) -> None:
    """Report every change to the log from now on, and the changes made since the last server stopped."""
    file.on_change = partial(_note_changes, scheduler)
    known = _known_keys(scheduler.audits)
    keys = file.current()
    for key in keys.values():
        if key.key_id not in known:
            _note(scheduler, KEY_ADDED, key)
    for key_id in known.keys() - {key.key_id for key in keys.values()}:
        scheduler.note(KEY_REVOKED, known[key_id], key_id=key_id)


def _known_keys(audits: Mapping[str, AuditRecord]) -> dict[str, str]:
    """id -> name of the keys that are registered according to the log."""
    known: dict[str, str] = {}
    for event in audits.values():
        if event.event == KEY_REVOKED:
            known.pop(event.details.get("key_id", ""), None)
        elif event.event in (KEY_ADDED, KEY_CHANGED):
            known[event.details.get("key_id", "")] = event.subject
    return known


def _note_changes(scheduler: SchedulerApi, before: Keys, after: Keys) -> None:
    for digest in before.keys() - after.keys():
        scheduler.note(KEY_REVOKED, before[digest].name, key_id=before[digest].key_id)
    for digest, key in after.items():
        if digest not in before:
            _note(scheduler, KEY_ADDED, key)
        elif key != before[digest]:
            _note(scheduler, KEY_CHANGED, key)


def _note(scheduler: SchedulerApi, event: str, key: Key) -> None:
    added, expires = format_time(key.added_at) or None, format_time(key.expires_at) or None
    scheduler.note(event, key.name, key_id=key.key_id, role=key.role, added=added, expires=expires)
