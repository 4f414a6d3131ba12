"""Durable, atomic writes to a local folder. obstore's local store renames but does not sync; the rest of it is used as
it is."""

from __future__ import annotations

import math
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from tx_async.durable import sync_folder
from tx_async.private import FILE_MODE, FOLDER_MODE, make_folder, opener

INCOMING = ".incoming"
"""The folder, beside the keys, for files that are not complete yet. No key begins with a dot."""
COPY_BYTES = 8 * 2**20


def put_files(base: Path, items: Mapping[str, bytes | Path]) -> None:
    """Write and sync all files, rename each into place, and sync the folders: after a crash a key has its old or its
    new content, never a part. A `Path` is copied in pieces."""
    incoming = base / INCOMING
    make_folder(incoming)
    written: dict[str, Path] = {}
    try:
        for key, data in items.items():
            written[key] = incoming / secrets.token_hex(16)
            _write(written[key], data)
        folders = {_rename(temporary, base, key) for key, temporary in written.items()}
        for folder in folders:
            sync_folder(folder)
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)


def remove_leftovers(base: Path, older_than_s: float) -> int:
    """Remove what dead writers have left behind: incomplete files, and folders that were made for them and stayed
    empty. Returns how many."""
    newest = time.time() - older_than_s
    removed = 0
    for path in (base / INCOMING).glob("*"):
        if _modified_at(path) <= newest:
            path.unlink(missing_ok=True)
            removed += 1
    for path in map(Path, (folder for folder, _, _ in os.walk(base, topdown=False))):
        if path not in (base, base / INCOMING) and _modified_at(path) <= newest:
            removed += _remove_if_empty(path)
    return removed


def sync_file(path: Path) -> None:
    """Make a file that a library has written, and its name, durable; and make it private."""
    with open(path, "rb") as file:
        os.fchmod(file.fileno(), FILE_MODE)
        os.fsync(file.fileno())
    sync_folder(path.parent)


def _write(path: Path, data: bytes | Path) -> None:
    with open(path, "xb", opener=opener) as file:
        if isinstance(data, Path):
            with open(data, "rb") as source:
                shutil.copyfileobj(source, file, COPY_BYTES)
        else:
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _rename(temporary: Path, base: Path, key: str) -> Path:
    """Returns the folder whose names have changed."""
    target = base / key
    try:
        _make_folders(base, target.parent)
        os.replace(temporary, target)
    except FileNotFoundError:
        # A deletion has just removed the empty folder.
        _make_folders(base, target.parent)
        os.replace(temporary, target)
    return target.parent


def _modified_at(path: Path) -> float:
    """Seconds since the epoch; infinity for a file that its writer or a deletion has just taken away."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return math.inf


def _remove_if_empty(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True


def _make_folders(base: Path, folder: Path) -> None:
    """Each new folder is durable in its parent before anything is put into it."""
    if folder == base or folder.is_dir():
        return
    _make_folders(base, folder.parent)
    folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
    sync_folder(folder.parent)
