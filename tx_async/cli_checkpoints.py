"""The commands about checkpoints: `tx-async import` and `tx-async checkpoints`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tx_async import cli_server
from tx_async.config import ServerConfig


def add_import(
    commands: Any,
    add_settings: Callable[[argparse.ArgumentParser], None],
    load_config: Callable[[argparse.Namespace], ServerConfig],
) -> None:
    command = commands.add_parser(
        "import",
        help="turn a PEFT adapter, or another server's checkpoints, into checkpoints here and print their paths",
        description="Imports into a running server (--base-url, or TINKER_BASE_URL where no setting is given), or into "
        "the data of a stopped one (--data-dir and --base-model). A PEFT adapter is checked: base, modules, rank, "
        "alpha, dtype. Checkpoints of another server with the same base (a folder or archive of one, or a storage with "
        "many) are checked against their hashes.",
    )
    command.add_argument(
        "adapter", metavar="FOLDER_OR_ARCHIVE", type=Path, help="contains adapter_config.json, or our metadata.json"
    )
    command.add_argument(
        "--as", dest="name", metavar="NAME", default="", help="name of the checkpoint [ours keep theirs]"
    )
    command.add_argument(
        "--base-url", default="", metavar="URL",
        help="a running server's URL [TINKER_BASE_URL, unless --data-dir or another setting is given]",
    )  # fmt: skip
    command.add_argument(
        "--api-key", default="", metavar="KEY",
        help="the owner's API key [a running server: TINKER_API_KEY; else that of clients that send none]",
    )  # fmt: skip
    add_settings(command)
    command.set_defaults(run=lambda args: _import(args, load_config))


def _import(args: argparse.Namespace, load_config: Callable[[argparse.Namespace], ServerConfig]) -> int:
    import asyncio

    from tx_async import import_command
    from tx_async.private import private_umask

    if args.base_url or (os.environ.get("TINKER_BASE_URL") and not _names_data(args)):
        paths = import_command.over_http(args.adapter, args.name, *cli_server.chosen(args))
    else:
        config = load_config(args)
        with private_umask():
            importing = import_command.into_data(args.adapter, args.name, config, args.api_key)
            paths, was_empty = asyncio.run(importing)
        if was_empty:  # a new server, one whose journal was lost, or a mistyped folder
            place = "The database" if config.database_url else str(config.data_path)
            print(f"tx-async: {place} held no session before: is it the data of the server you mean?", file=sys.stderr)
    print("\n".join(paths))
    return 0


def _names_data(args: argparse.Namespace) -> bool:
    """Whether a flag is a server's setting: then the data of a stopped server are meant."""
    return any(getattr(args, name, None) is not None for name in ("config", *ServerConfig.__struct_fields__))


def add_checkpoints(commands: Any) -> None:
    command = commands.add_parser(
        "checkpoints",
        help="checkpoints of a running server: list, delete, export",
        description="Manages the checkpoints of one API key.",
    )
    actions = command.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="path, bytes and time of every checkpoint, newest first")
    delete = actions.add_parser("delete", help="delete checkpoints by path, or all but the newest of each run")
    delete.add_argument("paths", nargs="*", metavar="PATH", help="tinker://… paths; * stands for anything")
    delete.add_argument("--keep-last", type=int, metavar="K", help="keep the newest K of each run and kind")
    delete.add_argument("--run", dest="of_run", default="", metavar="RUN_ID", help="only those of this training run")
    delete.add_argument("--dry-run", action="store_true", help="print what would go, and delete nothing")
    export = actions.add_parser("export", help="write a checkpoint's adapter as a folder for PEFT")
    export.add_argument("path", metavar="PATH", help="a tinker://… path")
    export.add_argument("--to", dest="folder", metavar="FOLDER", type=Path, required=True, help="a new or empty folder")
    export.add_argument(
        "--no-unembed",
        action="store_true",
        help="leave out the unembedding's part, which cannot be merged where embeddings are tied",
    )
    for action, run in ((listing, _list), (delete, _delete), (export, _export)):
        cli_server.add(action)
        action.set_defaults(run=run)


def _list(args: argparse.Namespace) -> int:
    from tx_async import checkpoints_command

    for checkpoint in checkpoints_command.everything(*cli_server.chosen(args)):
        print(f"{checkpoint.tinker_path}\t{checkpoint.size_bytes}\t{checkpoint.time:%Y-%m-%d %H:%M:%S}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from tx_async import export_command

    export_command.export(*cli_server.chosen(args), args.path, args.folder, args.no_unembed)
    print(args.folder)
    return 0


def _delete(args: argparse.Namespace) -> int:
    """Prints the paths that were deleted, one a line."""
    from tx_async import checkpoints_command

    server = cli_server.chosen(args)
    found = checkpoints_command.everything(*server)
    for checkpoint in checkpoints_command.doomed(found, args.paths, args.of_run, args.keep_last):
        if not args.dry_run:
            checkpoints_command.delete(*server, checkpoint)
        print(checkpoint.tinker_path)
    return 0
