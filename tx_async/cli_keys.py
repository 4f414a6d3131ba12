"""The commands about API keys: `tx-async keys`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from tx_async.config import ServerConfig


def add(commands: Any) -> None:
    command = commands.add_parser(
        "keys", help="API keys: add, list, revoke", description="Edit the file of hashed API keys."
    )
    command.add_argument(
        "--file",
        default=os.environ.get("TX_API_KEYS_FILE", ""),
        help="the server's api_keys_file [TX_API_KEYS_FILE, or api_keys in the data directory]",
    )
    actions = command.add_subparsers(metavar="ACTION", required=True)
    add = actions.add_parser("add", help="make a key and print it, once")
    add.add_argument("name", help="whose key it is")
    add.add_argument(
        "--role", choices=("user", "admin"), default="user",
        help="admin: also sees metrics from other machines, all runs, the whole audit log [user]",
    )  # fmt: skip
    add.add_argument(
        "--expires",
        default="",
        metavar="WHEN",
        help="90d, 12h, 30m, 3600 (seconds), 2027-01-01, or 2027-01-01T12:00:00Z [never]",
    )
    add.set_defaults(run=_add)
    actions.add_parser("list", help="id, name, role and expiry of every key").set_defaults(run=_list)
    revoke = actions.add_parser("revoke", help="remove a key; a running server refuses it from then on")
    revoke.add_argument("name", help="name or id")
    revoke.set_defaults(run=_revoke)


def _file(args: argparse.Namespace) -> Path:
    return Path(args.file).expanduser() if args.file else ServerConfig().data_path / "api_keys"


def _add(args: argparse.Namespace) -> int:
    from tx_async import keys

    path = _file(args)
    expires_at = keys.parse_expiry(args.expires, time.time()) if args.expires else None
    print(keys.add(path, args.name, args.role, expires_at))
    print(
        f"This key is shown once; its hash is in {path}. A server with --api-keys-file {path} takes it from now on.",
        file=sys.stderr,
    )
    return 0


def _list(args: argparse.Namespace) -> int:
    from tx_async import keys
    from tx_async.api.key_file import format_time

    for key in keys.listed(_file(args)):
        expiry = f"{'expired' if key.has_expired(time.time()) else 'until'} {format_time(key.expires_at)}"
        print(
            "  ".join([key.key_id, key.name, *(["admin"] * (key.role == "admin")), *([expiry] * bool(key.expires_at))])
        )
    return 0


def _revoke(args: argparse.Namespace) -> int:
    from tx_async import keys

    print(f"Revoked: {keys.revoke(_file(args), args.name)}. A running server refuses it from now on.")
    return 0
