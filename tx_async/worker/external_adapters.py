"""Adapters as folders that an external engine reads: PEFT files in a place that both see.

    <folder>/tx-<digest of the storage key>-<owner>/adapter_config.json, adapter_model.safetensors

A name is a digest of the storage key, and storage keys are never used twice, so a name means the same weights for ever.
The owner is this worker with this storage: what its earlier life has left is recognised by name, and nothing else in
the folder is touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from tx_async.errors import ConfigError, CorruptedCheckpoint
from tx_async.storage.checkpoint_files import ADAPTER, ADAPTER_CONFIG, read_checkpoint_sync
from tx_async.storage.store import Store

PREFIX = "tx-"
TEXT_LAYERS, LAYERS_BESIDE_VISION = "base_model.model.model.layers.", "base_model.model.model.language_model.layers."


class AdapterFolder:
    """The files of the adapters that one worker has given to its external engine."""

    def __init__(self, folder: str, store: Store, worker_name: str):
        """Raises `ConfigError` when the folder cannot be made."""
        self.store = store
        self.folder = Path(folder).expanduser().absolute()
        #: the base model's folder has a vision tower, too: its text model's modules have other names there
        self.sees = False
        self.owner = _digest(f"{store.base} {worker_name}", 4)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            #: whoever may read the folder may read the files in it, whatever our umask is
            self._mode = self.folder.stat().st_mode & 0o777
        except OSError as error:
            raise ConfigError(f"The folder for adapters, {folder}, cannot be used: {error}.") from error

    def name_of(self, key: str) -> str:
        return f"{PREFIX}{_digest(key, 16)}-{self.owner}"

    def is_own(self, name: str) -> bool:
        return name.startswith(PREFIX) and name.endswith(f"-{self.owner}")

    def write(self, key: str, base_model: str) -> tuple[str, str]:
        """Fetch an adapter from storage. Returns its name and its folder. `base_model` is the engine's name for its
        own.

        Raises what storage raises, and `CorruptedCheckpoint` for one that holds no adapter.
        """
        name = self.name_of(key)
        target, incoming = self.folder / name, self.folder / f".{name}"
        files = read_checkpoint_sync(self.store, key, only=(ADAPTER, ADAPTER_CONFIG))[1]
        if len(files) < 2:
            raise CorruptedCheckpoint(f"The checkpoint {key} holds no adapter ({ADAPTER_CONFIG} and {ADAPTER}).")
        config = json.loads(files[ADAPTER_CONFIG]) | {"base_model_name_or_path": base_model}
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir()
        self._write(incoming / ADAPTER, beside_vision(files[ADAPTER]) if self.sees else files[ADAPTER])
        self._write(incoming / ADAPTER_CONFIG, json.dumps(config).encode())
        incoming.chmod(self._mode)
        shutil.rmtree(target, ignore_errors=True)
        incoming.rename(target)
        return name, str(target)

    def _write(self, path: Path, data: bytes) -> None:
        path.write_bytes(data)
        path.chmod(self._mode & 0o666)

    def remove(self, name: str) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Remove the adapters of this worker's earlier life."""
        for entry in self._entries():
            if self.is_own(entry.lstrip(".")):
                self.remove(entry)

    def _entries(self) -> Iterable[str]:
        try:
            return os.listdir(self.folder)
        except OSError:
            return ()


def _digest(text: str, num_bytes: int) -> str:
    return hashlib.blake2b(text.encode(), digest_size=num_bytes).hexdigest()


def beside_vision(adapter: bytes) -> bytes:
    """The same weights under the names that they have in a folder with a vision tower: vLLM silently ignores them under
    the names of the text model alone."""
    from safetensors.numpy import load, save

    def renamed(name: str) -> str:
        tail = name.removeprefix(TEXT_LAYERS)
        return name if tail == name else LAYERS_BESIDE_VISION + tail

    return save({renamed(name): tensor for name, tensor in load(adapter).items()}, {"format": "pt"})
