"""Turns adapters made elsewhere into checkpoints, in the same way for a running server and a stopped one.

A checkpoint that another tx_async server has saved is taken as it is, after a check of every hash. A PEFT adapter is
checked and converted in a process of its own (`models/import_adapter.py`). The files are stored, then the records are
written: a session, a run that cannot be trained, and its one checkpoint.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from tx_async import own_checkpoint
from tx_async.errors import InvalidRequest
from tx_async.scheduler.interface import BaseModelInfo
from tx_async.storage.checkpoint_files import write_checkpoint
from tx_async.storage.store import Store
from tx_async.wire import ids
from tx_async.wire.records import CheckpointRecord, ModelRecord, SessionRecord
from tx_async.wire.worker import AdapterConfig

KIND = "weights"


class Converted(Struct, frozen=True):
    files: dict[str, Path]
    lora: AdapterConfig
    kind: Literal["weights", "sampler_weights", "external_weights"] = KIND
    metadata: dict[str, Any] = {}


class Imported(Struct, frozen=True):
    """The records of an import, whose files are durable."""

    session: SessionRecord
    model: ModelRecord
    checkpoint: CheckpointRecord


@asynccontextmanager
async def converted(folder: Path, base: BaseModelInfo, is_trusted: bool = False) -> AsyncIterator[Converted]:
    """The adapter in `folder` as this server's files, while the context is open. Raises `InvalidRequest` with the
    reason."""
    if own_checkpoint.is_own(folder):
        own = await asyncio.to_thread(own_checkpoint.read, folder, base)
        if not is_trusted:
            async with _from_peft(folder, base) as same:
                _check_same(own.lora, same.lora)
        yield Converted(own.files, own.lora, own.kind, own.metadata)
    else:
        async with _from_peft(folder, base) as adapter:
            yield adapter


def _check_same(told: AdapterConfig, found: AdapterConfig) -> None:
    """Compare metadata.json, which is the client's word, with the tensors, which the engine will read."""
    for field in ("rank", "train_attn", "train_mlp", "train_unembed"):
        if getattr(told, field) != getattr(found, field):
            raise InvalidRequest(
                f"metadata.json says {field} {getattr(told, field)}; the adapter's is {getattr(found, field)}."
            )


@asynccontextmanager
async def _from_peft(folder: Path, base: BaseModelInfo) -> AsyncIterator[Converted]:
    with tempfile.TemporaryDirectory(prefix="tx-import-") as out:
        command = [
            *(sys.executable, "-m", "tx_async.models.import_adapter", "--base", base.path, "--adapter", str(folder)),
            *("--out", out, "--max-rank", str(base.max_lora_rank)),
            *(part for name in (base.name, *base.aliases) for part in ("--name", name)),
        ]
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"}
        )
        said, _ = await process.communicate()
        lines = said.decode(errors="replace").strip().splitlines()
        if process.returncode:
            raise InvalidRequest(lines[-1] if lines else "The adapter cannot be read.")
        files = {name: Path(out, name) for name in os.listdir(out)}
        yield Converted(files, msgspec.json.decode(lines[-1], type=AdapterConfig))


async def store(
    adapter: Converted,
    store: Store,
    base: BaseModelInfo,
    owner: str,
    name: str,
    now: float,
    model_id: str = "",
) -> Imported:
    """Make the files durable; afterwards, the caller commits the records. `model_id`: the run's id, a new one by
    default. Raises `StorageError`."""
    session = SessionRecord(session_id=ids.new_id("s"), owner=owner, created_at=now, tags=("import",))
    model = ModelRecord(
        model_id=model_id or ids.model_id(session.session_id, 0),
        session_id=session.session_id,
        owner=owner,
        base_model=base.name,
        base_fingerprint=base.fingerprint,
        lora=adapter.lora,
        created_at=now,
        last_request_at=now,
        status="copy",
    )
    kind = adapter.kind
    key = f"{model.model_id}/{kind}/{name}~0"
    metadata = (adapter.metadata or {"kind": "training", "step": 0}) | {
        "adapter": msgspec.to_builtins(adapter.lora),
        "base_model": base.name,
        "base_fingerprint": base.fingerprint,
        "model_id": model.model_id,
        "name": name,
    }
    manifest = await write_checkpoint(store, key, adapter.files, metadata)
    checkpoint = CheckpointRecord(
        path=f"tinker://{model.model_id}/{kind}/{name}",
        model_id=model.model_id,
        owner=owner,
        kind=kind,
        name=name,
        storage_key=key,
        base_model=base.name,
        base_fingerprint=base.fingerprint,
        lora=adapter.lora,
        created_at=now,
        size_bytes=manifest.num_bytes,
    )
    return Imported(session, model, checkpoint)
