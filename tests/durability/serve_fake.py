"""The real server process, with workers that need no JAX, with fail points, with a disk that is full while the file
that DISK_FULL_FILE names exists, and with a quick eye for what deaths have left behind."""

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import tx_async.app
from tests.support import fail_points
from tx_async import cli
from tx_async.errors import StorageError
from tx_async.journal.sqlite import SqliteDriver
from tx_async.scheduler.training import orphans
from tx_async.wire.records import Change

write = SqliteDriver.apply


def is_full() -> bool:
    return Path(os.environ["DISK_FULL_FILE"]).exists()


async def write_unless_full(self: SqliteDriver, changes: Sequence[Change]) -> None:
    if is_full():
        raise StorageError("The disk is full.")
    await write(self, changes)


if "DISK_FULL_FILE" in os.environ:
    SqliteDriver.apply = write_unless_full
orphans.LOOK_AFTER_S = 1.0
tx_async.app.create_app = functools.partial(tx_async.app.create_app, engine="tests.support.fake_worker:create")
fail_points.install()
sys.exit(cli.main(sys.argv[1:]))
