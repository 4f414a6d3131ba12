"""`tx-async import`: imports into a running server over HTTP, or into the data of a stopped one."""

from __future__ import annotations

import tarfile
import tempfile
import time
import urllib.parse
from pathlib import Path

from tx_async import adapter_import, age, base_model, own_checkpoint, server_client
from tx_async.api import validation
from tx_async.api.imports import FILES
from tx_async.api.owner import owner_of
from tx_async.config import ServerConfig
from tx_async.errors import ConfigError, TxError
from tx_async.identity import Identity
from tx_async.journal.factory import open_journal
from tx_async.private import make_folder
from tx_async.scheduler.interface import BaseModelInfo
from tx_async.storage.checkpoint_files import METADATA, decode_manifest
from tx_async.storage.store import Store
from tx_async.wire.records import CheckpointRecord, ModelRecord, Put, Record, SessionRecord


def over_http(path: Path, name: str, base_url: str, api_key: str) -> list[str]:
    """Returns tinker:// paths. Raises `ConfigError` with what the server says, or when no server is there."""
    with own_checkpoint.opened(path) as folder:
        return [_upload(found, name, base_url, api_key) for found in adapters_in(folder, path, name)]


def _upload(folder: Path, name: str, base_url: str, api_key: str) -> str:
    path = f"/api/v1/import_adapter?{urllib.parse.urlencode({'name': name or name_of(folder)})}"
    files = sorted(file.name for file in folder.iterdir()) if own_checkpoint.is_own(folder) else FILES
    with tempfile.TemporaryFile() as upload:
        with tarfile.open(fileobj=upload, mode="w") as tar:
            for file in files:
                tar.add(folder / file, file)
        size = str(upload.tell())
        upload.seek(0)
        kind = {"content_type": "application/x-tar", "content_length": size}
        return server_client.call(base_url, api_key, "POST", path, upload, **kind)["path"]


async def into_data(path: Path, name: str, config: ServerConfig, api_key: str) -> tuple[list[str], bool]:
    """Returns tinker:// paths, and whether the data held no session before. Raises `ConfigError`, also when a
    server is running on these data."""
    try:
        with own_checkpoint.opened(path) as folder:
            return await _into_data(adapters_in(folder, path, name), name, config, owner_of(api_key))
    except ConfigError:
        raise
    except TxError as error:
        raise ConfigError(error.message) from error


async def _into_data(folders: list[Path], name: str, config: ServerConfig, owner: str) -> tuple[list[str], bool]:
    base = base_model.read(config.base_model, config.base_model_name, config.backend_config)
    if not config.database_url:
        make_folder(config.data_path)
    journal = open_journal(config)
    records = await journal.open()
    was_empty = not any(isinstance(record, SessionRecord) for record in records)
    paths = []
    try:
        identity = Identity(config, base, journal, records)
        records = await identity.settle()
        for folder in folders:
            imported = await _store(folder, name, identity.store, base, owner, records)
            new = [imported.session, imported.model, imported.checkpoint]
            await journal.commit([Put(record) for record in new])
            records += new
            paths.append(imported.checkpoint.path)
    finally:
        await journal.close()
    return paths, was_empty


async def _store(
    folder: Path, name: str, store: Store, base: BaseModelInfo, owner: str, records: list[Record]
) -> adapter_import.Imported:
    """A checkpoint of ours keeps its path where that is free: after a lost journal its name still leads to it."""
    named = validation.checkpoint_name(name or name_of(folder))
    async with adapter_import.converted(folder, base, is_trusted=True) as adapter:
        model_id = "" if name else str(adapter.metadata.get("model_id", ""))
        if model_id and not _is_free(model_id, adapter.kind, named, owner, records):
            model_id = ""
        return await adapter_import.store(adapter, store, base, owner, named, time.time(), model_id)


def _is_free(model_id: str, kind: str, name: str, owner: str, records: list[Record]) -> bool:
    """Whether the path is free, in a run that does not exist or was imported by the same owner."""
    path = f"tinker://{model_id}/{kind}/{name}"
    if any(isinstance(record, CheckpointRecord) and record.path == path for record in records):
        return False
    runs = [record for record in records if isinstance(record, ModelRecord) and record.model_id == model_id]
    return all(run.status == "copy" and run.owner == owner for run in runs)


# ---- what is in a folder


def adapters_in(folder: Path, path: Path, name: str) -> list[Path]:
    """The folders of adapters: all of ours, or a single one of PEFT's. `path`: as the operator named it. Raises
    `ConfigError`."""
    if own := own_checkpoint.checkpoints_below(folder):
        if name and len(own) > 1:
            raise ConfigError(f"{path} holds {len(own)} checkpoints, which keep their names: leave out --as.")
        return own
    if encrypted := age.encrypted_file(folder, FILES):
        raise ConfigError(f"{path}: {encrypted} is encrypted with age: decrypt the adapter first.")
    for file in FILES:
        if not (folder / file).is_file():
            raise ConfigError(f"{path} has neither {file} nor metadata.json: it holds no adapter of PEFT's or ours.")
    if not name:
        raise ConfigError("The checkpoint needs a name: give --as NAME.")
    return [folder]


def name_of(folder: Path) -> str:
    """The name that its own server gave it."""
    manifest = decode_manifest(str(folder), (folder / METADATA).read_bytes())
    return str(manifest.metadata.get("name") or folder.name.partition("~")[0])
