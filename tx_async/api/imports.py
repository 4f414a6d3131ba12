"""Adapters made elsewhere, uploaded by `tx-async import`."""

from __future__ import annotations

import asyncio
import tarfile
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tx_async import adapter_import
from tx_async.api import validation
from tx_async.api.context import Call
from tx_async.errors import BodyTooLarge, InvalidRequest, UserError
from tx_async.storage.checkpoint_files import ADAPTER, ADAPTER_CONFIG, METADATA
from tx_async.storage.store import Store
from tx_async.wire import tinker

UPLOAD_BYTES_MAX = 16 * 2**30
FILES_MAX = 16
FILES = (ADAPTER_CONFIG, ADAPTER)


async def import_adapter(call: Call) -> tinker.ImportAdapterResponse:
    """The body is a tar of a PEFT adapter's two files, or of a checkpoint of another server; it goes to disk as it
    arrives."""
    name = validation.checkpoint_name(call.request.query_params.get("name", ""))
    files = call.api.files
    store = files if isinstance(files, Store) else Store(call.api.config.resolved_checkpoints_base)
    with tempfile.TemporaryDirectory(prefix="tx-upload-") as scratch:
        folder = Path(scratch)
        await _receive(call, folder / "upload.tar")
        await asyncio.to_thread(_unpack, folder / "upload.tar", folder)
        with _without_paths(folder):
            async with adapter_import.converted(folder, call.scheduler.base_model) as adapter:
                now = call.api.clock.now()
                imported = await adapter_import.store(adapter, store, call.scheduler.base_model, call.owner, name, now)
    await call.scheduler.create_session(imported.session)
    await call.scheduler.add_checkpoint(imported.model, imported.checkpoint)
    return tinker.ImportAdapterResponse(path=imported.checkpoint.path)


@contextmanager
def _without_paths(folder: Path) -> Generator[None]:
    """What is wrong with an upload is said by its files' names: where this server keeps it is not the client's."""
    try:
        yield
    except UserError as error:
        if str(folder) not in error.message:
            raise
        named = error.message.replace(f"{folder}/", "").replace(str(folder), "The upload")
        raise type(error)(named) from None


async def _receive(call: Call, path: Path) -> None:
    size = 0
    with path.open("wb") as file:
        async for piece in call.request.stream():
            size += len(piece)
            if size > UPLOAD_BYTES_MAX:
                raise BodyTooLarge(f"The adapter is larger than {UPLOAD_BYTES_MAX} bytes.")
            await call.api.bodies.turnstile.passed()
            await asyncio.to_thread(file.write, piece)


def _names(tar: tarfile.TarFile) -> tuple[str, ...]:
    """A checkpoint of ours has `metadata.json` and the files that it names; of other uploads only the two files
    count."""
    found = tuple(member.name for member in tar.getmembers())
    if METADATA not in found:
        return FILES
    if len(found) > FILES_MAX or any("/" in name or name.startswith(".") for name in found):
        raise InvalidRequest(f"A checkpoint is at most {FILES_MAX} files without folders.")
    return found


def _unpack(upload: Path, folder: Path) -> None:
    try:
        with tarfile.open(upload) as tar:
            for name in _names(tar):
                if (member := tar.extractfile(name)) is None:
                    raise InvalidRequest(f"{name} in the uploaded tar is not a file.")
                with (folder / name).open("wb") as out:
                    while piece := member.read(1 << 20):
                        out.write(piece)
    except (tarfile.TarError, KeyError, EOFError, OSError) as error:
        raise InvalidRequest(f"The upload must be a tar of {' and '.join(FILES)}: {error}.") from error
    upload.unlink()
