"""`tx-async import`: into a running server over HTTP, or into the data of one that stands still."""

from __future__ import annotations

import tarfile
import tempfile
import time
import urllib.parse
from pathlib import Path

from tx_async import adapter_import, base_model, server_client
from tx_async.api import validation
from tx_async.api.imports import FILES
from tx_async.api.owner import owner_of
from tx_async.config import ServerConfig
from tx_async.errors import ConfigError, TxError
from tx_async.identity import Identity
from tx_async.journal.factory import open_journal
from tx_async.wire.records import Put


def over_http(folder: Path, name: str, base_url: str, api_key: str) -> str:
    """-> the tinker:// path. Raises `ConfigError`: what the server says, or that there is none."""
    check_folder(folder)
    path = f"/api/v1/import_adapter?{urllib.parse.urlencode({'name': name})}"
    with tempfile.TemporaryFile() as upload:
        with tarfile.open(fileobj=upload, mode="w") as tar:
            for file in FILES:
                tar.add(folder / file, file)
        size = str(upload.tell())
        upload.seek(0)
        kind = {"content_type": "application/x-tar", "content_length": size}
        return server_client.call(base_url, api_key, "POST", path, upload, **kind)["path"]


async def into_data(folder: Path, name: str, config: ServerConfig, api_key: str) -> str:
    """-> the tinker:// path. Raises `ConfigError`: also where a server runs on these data."""
    check_folder(folder)
    try:
        return await _into_data(folder, validation.checkpoint_name(name), config, owner_of(api_key))
    except ConfigError:
        raise
    except TxError as error:
        raise ConfigError(error.message) from error


async def _into_data(folder: Path, name: str, config: ServerConfig, owner: str) -> str:
    base = base_model.read(config.base_model, config.base_model_name, config.backend_config)
    if not config.database_url:
        config.data_path.mkdir(parents=True, exist_ok=True)
    journal = open_journal(config)
    records = await journal.open()
    try:
        identity = Identity(config, base, journal, records)
        await identity.settle()
        async with adapter_import.converted(folder, base) as adapter:
            imported = await adapter_import.store(adapter, identity.store, base, owner, name, time.time())
        await journal.commit([Put(imported.session), Put(imported.model), Put(imported.checkpoint)])
    finally:
        await journal.close()
    return imported.checkpoint.path


def check_folder(folder: Path) -> None:
    for name in FILES:
        if not (folder / name).is_file():
            raise ConfigError(f"{folder} has no {name}: it is not the folder of a PEFT adapter.")
