"""Reads checkpoints that a tx_async server has written, as folders or archives, and checks that they are complete, for
a server with the same base model.

A folder with `metadata.json` is one; a storage, or a part of it, holds many. Snapshots of runs stay where they are.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from tx_async.errors import BaseModelError, ConfigError, CorruptedCheckpoint, InvalidRequest
from tx_async.models import tensor_files
from tx_async.scheduler.interface import BaseModelInfo
from tx_async.storage.checkpoint_files import ADAPTER, METADATA, OPTIMIZER, Manifest, decode_manifest, file_info
from tx_async.wire.worker import AdapterConfig

KINDS = {"training": "weights", "sampler": "sampler_weights", "external": "external_weights"}
"""The kind in metadata.json -> the kind of the checkpoint's record."""


class OwnCheckpoint(Struct, frozen=True):
    files: dict[str, Path]
    """All files except metadata.json."""
    metadata: dict[str, Any]
    lora: AdapterConfig

    @property
    def kind(self) -> Any:
        return KINDS[self.metadata["kind"]]


def is_own(folder: Path) -> bool:
    return (folder / METADATA).is_file()


@contextmanager
def opened(path: Path) -> Iterator[Path]:
    """The folder itself, or an archive's content, while the context is open. Raises `ConfigError`."""
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="tx-import-") as scratch:
        try:
            with tarfile.open(path) as tar:
                tar.extractall(scratch, filter="data")
        except (tarfile.TarError, EOFError, OSError) as error:
            why = str(error).partition("\n")[0]
            raise ConfigError(f"{path} is neither a folder nor a tar archive: {why}") from error
        yield Path(scratch)


def checkpoints_below(folder: Path) -> list[Path]:
    """The folders of our checkpoints: this one, or all below it; none in a folder that others have made."""
    if is_own(folder):
        return [folder]
    found = (path.parent for path in folder.rglob(METADATA) if not _is_hidden(path.relative_to(folder)))
    return sorted(path for path in found if _kind_of(path) in KINDS)


def read(folder: Path, base: BaseModelInfo) -> OwnCheckpoint:
    """Read one checkpoint. Raises `CorruptedCheckpoint` naming what is damaged, `InvalidRequest` if it is unusable
    here."""
    manifest = decode_manifest(str(folder), (folder / METADATA).read_bytes())
    metadata = manifest.metadata
    if metadata.get("kind") not in KINDS:
        raise InvalidRequest(f"{folder} holds a {metadata.get('kind')!r}, which is no checkpoint of its own.")
    _check_base(folder, metadata, base)
    files = {name: folder / name for name in manifest.files}
    _check_files(folder, manifest)
    try:
        lora = msgspec.convert(metadata["adapter"], AdapterConfig)
    except (KeyError, msgspec.ValidationError) as error:
        raise CorruptedCheckpoint(
            f"{folder} is damaged: {METADATA} does not describe its adapter ({error})."
        ) from error
    if OPTIMIZER in files:
        _check_moments(folder)
    return OwnCheckpoint(files, metadata, lora)


def _check_base(folder: Path, metadata: dict[str, Any], base: BaseModelInfo) -> None:
    """Compare the base by fingerprint, or by name for a checkpoint from before there were fingerprints."""
    theirs, name = metadata.get("base_fingerprint"), metadata.get("base_model")
    if theirs and base.fingerprint and theirs != base.fingerprint:
        raise InvalidRequest(
            f"{folder} belongs to the base model {name} (fingerprint {theirs}), not to {base.name} "
            f"(fingerprint {base.fingerprint})."
        )
    if not theirs and name not in (base.name, *base.aliases):
        raise InvalidRequest(f"{folder} belongs to the base model {name}, not to {base.name}.")


def _check_files(folder: Path, manifest: Manifest) -> None:
    for name, info in manifest.files.items():
        if "/" in name or not (folder / name).is_file():
            raise CorruptedCheckpoint(f"{folder} is damaged: {name} is missing.")
        if file_info(folder / name) != info:
            raise CorruptedCheckpoint(f"{folder} is damaged: {name} does not match its recorded hash.")


def _check_moments(folder: Path) -> None:
    """Check that the optimizer's state has the adapter's shapes: it is read into the same slot."""
    weights, moments = _shapes(folder / ADAPTER), _shapes(folder / OPTIMIZER)
    expected = {f"{moment}.{name}": shape for name, shape in weights.items() for moment in "mv"}
    if moments != expected:
        raise CorruptedCheckpoint(f"{folder} is damaged: {OPTIMIZER} does not belong to {ADAPTER}.")


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        header, _ = tensor_files.read_header(path)
    except BaseModelError as error:
        raise CorruptedCheckpoint(error.message) from error
    return {name: tensor.shape for name, tensor in header.items()}


def _kind_of(folder: Path) -> object:
    try:
        return json.loads((folder / METADATA).read_text())["metadata"]["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
