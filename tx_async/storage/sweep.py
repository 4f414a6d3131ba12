"""Removes, while the server runs, what dead writers have left behind.

It removes only files that are older than the longest save, which nobody can still be writing, and checkpoints only
below runs that the server knows, so that a folder with other files in it loses none of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from tx_async.errors import TxError
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
    removed is logged, and does not keep the rest from being removed."""
    await _tried(store.remove_leftovers(OLDER_THAN_S))
    for run_id in list(run_ids):
        await _tried(sweep_incomplete(store, OLDER_THAN_S, run_id))


async def _tried(removal: Awaitable[object]) -> None:
    try:
        await removal
    except TxError as error:  # no storage, or a file whose name is not one of our keys
        _log.warning("The leftovers of a dead save could not be removed: %s", error)
