"""Removes, while the server runs, what dead writers have left behind.

It removes only files that are older than the longest save, which nobody can still be writing, and checkpoints only
below runs that the server knows, so that a folder with other files in it loses none of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator

from tx_async.errors import NotFound, StorageError, TxError
from tx_async.storage.checkpoint_files import sweep_incomplete
from tx_async.storage.store import Store

OLDER_THAN_S = 6 * 3600.0
"""Longer than the longest save."""
INTERVAL_S = 3600.0

_log = logging.getLogger(__name__)


async def sweep_for_ever(store: Store, run_ids: Callable[[], Iterable[str]]) -> None:
    while True:
        await sweep(store, run_ids())
        await asyncio.sleep(INTERVAL_S)


async def sweep(store: Store, run_ids: Iterable[str]) -> None:
    """Remove unfinished files, folders that stayed empty, and incomplete checkpoints of these runs. What cannot be
    removed is logged, and does not keep the rest from being removed; a storage that is away ends the sweep."""
    for removal in _removals(store, list(run_ids)):
        try:
            await removal
        except TxError as error:
            if reason := await asyncio.to_thread(_why_away, store):
                _log.warning("The leftovers of dead saves are not removed until the storage is back: %s", reason)
                return
            _log.warning(
                "The leftovers of a dead save could not be removed: %s", error
            )  # a name that is no key of ours


def _removals(store: Store, run_ids: Iterable[str]) -> Iterator[Awaitable[object]]:
    yield store.remove_leftovers(OLDER_THAN_S)
    for run_id in run_ids:
        yield sweep_incomplete(store, OLDER_THAN_S, run_id)


def _why_away(store: Store) -> str:
    try:
        if store.storage_id:
            store.confirm_sync()
        else:
            store.identity_sync()  # not identified yet, after a start with --adopt
    except NotFound:
        return ""
    except StorageError as error:
        return error.message
    return ""
