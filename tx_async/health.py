"""The health of a server: its storage, journal, workers, disk and memory, each probed within seconds.

`healthz?verbose` and `tx-async doctor` ask the same questions. Storage is written to, read and cleared; its problems
are reported in an operator's words.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Literal, TypeVar

from msgspec import Struct

from tx_async.errors import TxError
from tx_async.storage.store import Store

PROBE_S = 14.0
"""A probe that takes longer has failed, even if the client library is still trying."""
FRESH_S = 10.0
"""Whoever asks again within this time gets the same answer, so that asking puts no load on the server."""
CLOCK_S_MAX = 60.0
DISK_BYTES_MIN = 2 * 2**30
DISK_BYTES_LEAST = 64 * 2**20
MEMORY_BYTES_MIN = 512 * 2**20

T = TypeVar("T")

_CAUSES = (
    ("the disk is full", r"No space left|ENOSPC|StorageFull|QuotaExceeded|Disk quota"),
    ("the bucket is missing", r"NoSuchBucket|bucket does not exist|ContainerNotFound|404 Not Found"),
    ("the clocks differ", r"RequestTimeTooSkewed|RequestExpired"),
    (
        "the credentials are wrong",
        r"40[13] |AccessDenied|Forbidden|InvalidAccessKeyId|SignatureDoesNotMatch|Unauthenticated|Unauthorized|"
        r"CredentialsNotLoaded|PermissionDenied",
    ),
    ("this user may not write there", r"Permission denied|Read-only file system"),
    ("it does not answer", r"timed? ?out|Connect|dns|connection|error sending request"),
)


class Finding(Struct, frozen=True):
    state: Literal["ok", "warning", "problem"]
    text: str


def probe_storage(store: Store) -> Finding:
    """Write, read, find and delete a small object. May take as long as the client library tries."""
    folder, word = f"probes/health-{secrets.token_hex(8)}", secrets.token_bytes(16)
    key = f"{folder}/word"
    try:
        store.put_sync(key, word)
        read = store.get_sync(key)
        entries = store.list_sync(folder)
        store.delete_sync(key)
    except TxError as error:
        return Finding("problem", _blamed(error.message))
    if read != word or [entry.key for entry in entries] != [key]:
        return Finding("problem", f"{store.base} does not give back what was written to it")
    if abs(skew := entries[0].modified_at - time.time()) > CLOCK_S_MAX:
        return Finding("warning", f"its clock and ours differ by {skew:.0f} s: {store.base}")
    return Finding("ok", f"{store.base} was written, read and cleared")


def _blamed(message: str) -> str:
    for cause, pattern in _CAUSES:
        if re.search(pattern, message, re.IGNORECASE):
            return f"{cause}: {message}"
    return message


def within(seconds: float, probe: Callable[[], Finding]) -> Finding:
    """Run a probe on a thread of its own. A thread that takes longer is left behind."""
    found: list[Finding] = []
    thread = threading.Thread(target=lambda: found.append(probe()), daemon=True, name="probe")
    thread.start()
    thread.join(seconds)
    return found[0] if found else Finding("problem", f"it does not answer: nothing within {seconds:.0f} s")


def disk(folder: Path) -> Finding:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    state = "ok" if free >= DISK_BYTES_MIN else "warning" if free >= DISK_BYTES_LEAST else "problem"
    return Finding(state, f"{size(free)} free in {folder}")


def memory() -> Finding:
    """How much memory the system has left; "ok" where it does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return Finding("ok", "the system does not say")
    return Finding("ok" if free >= MEMORY_BYTES_MIN else "warning", f"{size(free)} available")


def size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


class Health:
    """Answers `healthz` for a running server."""

    def __init__(
        self,
        store: Store,
        data_path: Path,
        write_journal: Callable[[], Awaitable[None]],
        waiting_for: Callable[[bool], list[str]],
        silence: Callable[[], Mapping[str, str]] = dict,
        external: Callable[[bool], list[str] | None] = lambda in_full: None,
    ):
        """write_journal: a transaction that changes nothing. silence: workers that have missed heartbeats -> which.
        external: engines outside that are not attached, one line each; None where the server has none."""
        self._store = store
        self._data_path = data_path
        self._write_journal = write_journal
        self._waiting_for = waiting_for
        self._silence = silence
        self._external = external
        self._asked_at = float("-inf")
        self._report: dict[str, Finding] = {}
        self._asking = asyncio.Lock()

    async def report(self, in_full: bool = False) -> dict[str, Finding]:
        """in_full: for operators, with what a worker that ended has said last."""
        async with self._asking:
            if time.monotonic() - self._asked_at > FRESH_S:
                self._report = await self._ask()
                self._asked_at = time.monotonic()
        return self._report | {"worker": self._worker(in_full)} | self._external_engines(in_full)

    async def _ask(self) -> dict[str, Finding]:
        storage, journal = await asyncio.gather(
            asyncio.to_thread(within, PROBE_S, lambda: probe_storage(self._store)), self._journal()
        )
        return {"storage": storage, "journal": journal, "disk": disk(self._data_path), "memory": memory()}

    async def _journal(self) -> Finding:
        started = time.monotonic()
        try:
            await asyncio.wait_for(self._write_journal(), PROBE_S)
        except TimeoutError:
            return Finding("problem", f"a commit took more than {PROBE_S:.0f} s")
        except TxError as error:
            return Finding("problem", error.message)
        return Finding("ok", f"a commit took {1000 * (time.monotonic() - started):.0f} ms")

    def _worker(self, in_full: bool) -> Finding:
        if lines := self._waiting_for(in_full):
            return Finding("problem", "; ".join(lines))
        if lines := self._silence().values():
            return Finding(
                "warning", f"{'; '.join(lines)}; what it does is done again when it is lost (worker_lease_ms)"
            )
        return Finding("ok", "every capability is there")

    def _external_engines(self, in_full: bool) -> dict[str, Finding]:
        """The server does without them what they would do, so what they lack is no problem of its own."""
        lines = self._external(in_full)
        if lines is None:
            return {}
        return {
            "external": Finding("warning", "; ".join(lines)) if lines else Finding("ok", "every engine is attached")
        }
