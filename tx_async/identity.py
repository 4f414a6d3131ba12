"""A journal, its storage and its base model know each other: a start that mixes them is refused before anything runs.

The journal's `IdentityRecord` names the bases that it was served with, and its storage; the storage carries its own
identity (`storage/identity.py`), the base model its fingerprint (`fingerprint.py`). Another base or another storage is
a mistake until the operator starts with `--adopt`. A storage that does not answer, or is empty, is an outage: it may be
a share that is not mounted. So the server starts and waits, and gives up no file that it does not find there.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence

import msgspec

from tx_async.config import ServerConfig
from tx_async.errors import NotFound, StorageError, WrongIdentity
from tx_async.journal.journal import Journal
from tx_async.scheduler.interface import BaseModelInfo
from tx_async.storage.identity import ensure_identity_sync
from tx_async.storage.store import Store
from tx_async.wire.records import (
    CheckpointRecord,
    IdentityRecord,
    KnownBase,
    KnownStorage,
    ModelRecord,
    Put,
    Record,
)

ANSWER_S = 15.0
"""A storage that takes longer to say who it is does not answer."""
PAUSE_S_MAX = 15.0

_log = logging.getLogger(__name__)


def identity_of(records: Sequence[Record]) -> IdentityRecord:
    """The journal's own identity, or a new one."""
    found = next((record for record in records if isinstance(record, IdentityRecord)), None)
    return found or IdentityRecord(journal_id=secrets.token_hex(16))


def with_base(identity: IdentityRecord, base: BaseModelInfo, adopt: bool, now: float) -> IdentityRecord:
    """The identity with this base as the one that is served. Raises `WrongIdentity`."""
    if not base.fingerprint:
        return identity  # no weights on this host: the worker will say what it has loaded
    new = KnownBase(fingerprint=base.fingerprint, name=base.name, path=base.path, since=now)
    if not identity.bases:
        return msgspec.structs.replace(identity, bases=(new,))
    known = identity.bases[-1]
    if known.fingerprint == base.fingerprint:
        same = msgspec.structs.replace(known, name=base.name, path=base.path)
        return msgspec.structs.replace(identity, bases=(*identity.bases[:-1], same))
    if adopt:
        return msgspec.structs.replace(identity, bases=(*identity.bases, new))
    files = "other files than before in" if known.path == base.path else "another one, in"
    raise WrongIdentity(
        f"This journal belongs to the base model in {known.path} (fingerprint {known.fingerprint}), and this start "
        f"names {files} {base.path} (fingerprint {base.fingerprint}). Start with the first, choose another data_dir, "
        "or start with --adopt (TX_ADOPT=1): the runs of the first are then only listed."
    )


def with_storage(identity: IdentityRecord, found: str, address: str, adopt: bool) -> IdentityRecord:
    """The identity with the storage that calls itself `found`. Raises `WrongIdentity`."""
    known = identity.storage
    if known is not None and known.storage_id != found and not adopt:
        raise WrongIdentity(
            f"This journal's runs and checkpoints lie in the storage {known.storage_id} (last seen as "
            f"{known.address}), and this start names {address}, the storage {found}. Start with the first, "
            "choose another data_dir, or start with --adopt (TX_ADOPT=1)."
        )
    return msgspec.structs.replace(identity, storage=KnownStorage(storage_id=found, address=address))


class Identity:
    """The journal's identity while a server runs. It changes with `settle`, `run` and `base_loaded`, and each change is
    committed."""

    name = "identity"

    def __init__(self, config: ServerConfig, base: BaseModelInfo, journal: Journal, records: Sequence[Record]):
        """Raises `ConfigError` for a storage address that can never work."""
        self._adopt = config.adopt
        self._base = base
        self._journal = journal
        self._records = records
        self.record = identity_of(records)
        known = "" if self._adopt or self.record.storage is None else self.record.storage.storage_id
        self.store = Store(config.resolved_checkpoints_base, known)
        #: why the storage has not been identified yet; "" once it has
        self._outage = ""

    async def settle(self) -> list[Record]:
        """Identify base and storage, and return the records, the identity among them. Raises `WrongIdentity`."""
        self.record = with_base(self.record, self._base, self._adopt, time.time())
        await self._meet_storage()
        others = [record for record in self._records if not isinstance(record, IdentityRecord)]
        if self.record not in self._records:
            await self._journal.commit([Put(self.record)])
        return [*others, self.record]

    async def run(self) -> None:
        """Wait until the storage is identified. Raises `WrongIdentity` when another one answers."""
        pause_s = 1.0
        while self._outage:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_S_MAX)
            before = self.record
            await self._meet_storage()
            if self.record != before:
                await self._journal.commit([Put(self.record)], may_refuse=False)
            if not self._outage:
                _log.info("The storage %s is there: the server no longer waits for it.", self.store.address)

    def waiting_for(self) -> list[str]:
        """What `healthz` reports as missing: the storage, or nothing."""
        return [self._outage] if self._outage else []

    @property
    def base_fingerprint(self) -> str:
        return self.record.bases[-1].fingerprint if self.record.bases else ""

    def base_loaded(self, fingerprint: str) -> None:
        """Take the fingerprint that a worker has loaded: where the server has no weights, nobody has seen them
        before."""
        if fingerprint and not self.record.bases:
            base = msgspec.structs.replace(self._base, fingerprint=fingerprint)
            self.record = with_base(self.record, base, False, time.time())
            self._journal.append([Put(self.record)], may_refuse=False)

    # ---- storage

    async def _meet_storage(self) -> None:
        try:
            found = await asyncio.wait_for(asyncio.to_thread(self._ask_storage_sync), ANSWER_S)
        except TimeoutError:
            found = self._wait(f"it does not answer within {ANSWER_S:.0f} s")
        except StorageError as error:
            found = self._wait(error.message)
        if found:
            self._check_storage(found)

    def _ask_storage_sync(self) -> str:
        """The storage's identity; a new one only if nothing was ever stored that could be missing."""
        try:
            return self.store.identity_sync()
        except NotFound:
            if not self._adopt and (self.record.storage or self._misses_files()):
                raise StorageError(
                    f"{self.store.address} is empty, or not mounted: it carries no identity, but this journal's runs "
                    "and checkpoints lie in a storage that does. Put it back; or, if it is gone for good, start with "
                    "--adopt."
                ) from None
            return ensure_identity_sync(self.store)

    def _misses_files(self) -> bool:
        """Whether the journal is from before identities were kept, and its files must be somewhere else."""
        has_files = any(
            isinstance(record, CheckpointRecord) or (isinstance(record, ModelRecord) and record.snapshots)
            for record in self._records
        )
        return has_files and next(self.store.iterate_sync(), None) is None

    def _check_storage(self, found: str) -> None:
        self.record = with_storage(self.record, found, self.store.address, self._adopt)
        self.store.storage_id = found
        self._outage = ""

    def _wait(self, reason: str) -> str:
        if not self._outage:
            _log.warning("The server waits for its storage: %s", reason)
        self._outage = f"the storage {self.store.address}: {reason}"
        return ""
