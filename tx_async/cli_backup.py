"""The commands `tx-async backup` and `tx-async restore`: their flags; `backup.py` does the work."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tx_async.config import ServerConfig

AddSettings = Callable[[argparse.ArgumentParser], None]
LoadConfig = Callable[[argparse.Namespace], ServerConfig]


def add(commands: Any, add_settings: AddSettings, load_config: LoadConfig) -> None:
    saving = commands.add_parser(
        "backup",
        help="copy a server's journal and storage into a folder, even while it runs",
        description="A consistent copy, verified, of what --data-dir (or --database-url and --checkpoints-base) hold.",
    )
    saving.add_argument("folder", metavar="DIR", type=Path, help="a folder that is empty or not there yet")
    restoring = commands.add_parser(
        "restore",
        help="turn a backup into a server's data again",
        description="Restores into --data-dir, which must have no journal yet; the server starts there as before.",
    )
    restoring.add_argument("folder", metavar="DIR", type=Path, help="what `tx-async backup` has written")
    add_settings(saving)
    add_settings(restoring)
    saving.set_defaults(run=lambda args: _backup(args, load_config))
    restoring.set_defaults(run=lambda args: _restore(args, load_config))


def _backup(args: argparse.Namespace, load_config: LoadConfig) -> int:
    from tx_async.backup import backup
    from tx_async.private import private_umask

    with private_umask():
        print(backup(load_config(args), args.folder.absolute()))
    return 0


def _restore(args: argparse.Namespace, load_config: LoadConfig) -> int:
    from tx_async.backup import restore
    from tx_async.private import private_umask

    with private_umask():
        print(restore(args.folder.absolute(), load_config(args)))
    return 0
