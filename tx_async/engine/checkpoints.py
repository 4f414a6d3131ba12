"""Adapters as files, and in memory those that were written or read lately.

    adapter_config.json, adapter_model.safetensors    the weights, as PEFT reads them: every kind
    optimizer.safetensors                             training, snapshot: `m.<PEFT name>`, `v.<PEFT name>`
    gradients.safetensors                             snapshot: accumulated since the last optimizer step
    metadata.json                                     kind, AdapterConfig, step; sizes and hashes; written last

A saved adapter is kept here from the moment its command runs, so a load that follows waits for no file. What is kept
is immutable, as checkpoints are. A crash while files are written leaves no metadata.json, hence no checkpoint.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from tx_async.age import SUFFIX as AGE_SUFFIX
from tx_async.age import encrypted
from tx_async.engine.adapter_slots import HostWeights, pad, trim
from tx_async.engine.transfers import to_host
from tx_async.errors import CorruptedCheckpoint, InvalidRequest, UnknownCheckpoint
from tx_async.models.peft import from_peft, to_peft
from tx_async.storage.checkpoint_files import (
    ADAPTER,
    ADAPTER_CONFIG,
    OPTIMIZER,
    read_checkpoint_sync,
    write_checkpoint_sync,
)
from tx_async.storage.keys import check_key
from tx_async.storage.store import Store
from tx_async.wire.worker import AdapterConfig

CACHE_BYTES_MAX = 2 * 2**30
GRADIENTS = "gradients.safetensors"
README = "README.md"
TIED_NOTE = """# This adapter adapts a tied unembedding

The base model's `lm_head` is its embedding matrix (`tie_word_embeddings`), and this adapter adapts `lm_head`.

- Applied by PEFT without merging, it computes what the server computed.
- Merged (`merge_and_unload`), PEFT writes the change into the embedding as well, so the inputs change with it: measured
  0.073 nats of log-probability.
- Tools that merge by name, such as tinker-cookbook's `build_hf_model`, find no `lm_head.weight` in the base and fail.

To merge, export without it (`tx-async checkpoints export PATH --to FOLDER --no-unembed`, or `"exclude_unembed": true`
in the body of `save_weights_external`), which leaves out what `lm_head` has learned; or train with
`train_unembed=False` from the start.
"""

EXPERTS_NOTE = """# PEFT reads a part of this adapter

It adapts experts, named one by one (`mlp.experts.<number>.gate_proj`): so vLLM and this server read them. PEFT has no
such names for this model, where transformers keeps a layer's experts in two parameters: it loads the rest of the
adapter, and passes over the experts with a warning about unexpected keys.
"""


@dataclass
class SavedAdapter:
    """One adapter at the stack's rank (padded): device arrays right after it was read from a slot, host arrays
    later.
    """

    kind: str
    config: AdapterConfig
    weights: Any
    m: Any = None
    v: Any = None
    gradients: Any = None
    step: Any = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def to_host(self) -> None:
        """Wait for the device and take the arrays off it."""
        with self._lock:
            arrays = (self.weights, self.m, self.v, self.gradients, self.step)
            self.weights, self.m, self.v, self.gradients, self.step = jax.tree.map(to_host, arrays)

    @property
    def num_bytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves((self.weights, self.m, self.v, self.gradients)))


class NeedsWiderSlots(InvalidRequest):
    """The adapter's rank is higher than that of the slots, as they are now."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank


class Checkpoints:
    """`cached` is shared by the command thread and the threads that write files: every access holds the lock."""

    def __init__(
        self,
        store: Store,
        model: Any,
        max_rank: int,
        rank_limit: int = 0,
        writes: bool = True,
        cache_bytes_max: int = CACHE_BYTES_MAX,
    ):
        """max_rank: that of the slots; rank_limit: the highest that wider slots could hold, 0 = max_rank; writes: False
        on all but one host of a mesh."""
        self.store = store
        self.model, self.writes, self.cache_bytes_max = model, writes, cache_bytes_max
        self.max_rank, self.rank_limit = max_rank, rank_limit or max_rank
        self._lock = threading.Lock()
        #: newest use last; `_num_bytes` is the sum over it
        self._cached: OrderedDict[str, SavedAdapter] = OrderedDict()
        self._num_bytes = 0

    def __repr__(self) -> str:
        return f"<Checkpoints {self.store.base} [{len(self._cached)} cached, {self._num_bytes >> 20} MiB]>"

    # ---- save

    def keep(self, key: str, adapter: SavedAdapter) -> None:
        """From now on `load(key)` returns this adapter, until newer ones need its memory. Raises `InvalidRequest` for a
        key that leads out of the store.

        What is kept depends on the command stream alone, so that it is the same on every host of a mesh: a write that
        fails, which only one host tries, takes nothing away.
        """
        check_key(key)
        with self._lock:
            self._drop(key)
            self._cached[key] = adapter
            self._num_bytes += adapter.num_bytes
            while self._num_bytes > self.cache_bytes_max and len(self._cached) > 1:
                self._drop(next(iter(self._cached)))

    def write(
        self, key: str, adapter: SavedAdapter, metadata: Mapping[str, str], age_recipients: Sequence[str] = ()
    ) -> int:
        """Make `adapter` durable under `key`; only the host that `writes` does. Returns bytes. Raises `StorageError`;
        the key has no checkpoint then, and whoever asked for it is told. metadata: its `base_model` is what PEFT will
        load the base from."""
        adapter.to_host()
        if not self.writes:
            return 0
        files = encrypted(self._files(adapter, metadata.get("base_model", "")), age_recipients)
        write_checkpoint_sync(self.store, key, files, {**metadata, **_description(adapter)})
        return sum(len(data) for data in files.values())

    def _files(self, adapter: SavedAdapter, base_model: str) -> dict[str, bytes]:
        tensors, peft_config = to_peft(self.model, trim(adapter.weights, adapter.config.rank), adapter.config)
        peft_config["base_model_name_or_path"] = base_model or None
        files = {ADAPTER: save_safetensors(tensors, {"format": "pt"}), ADAPTER_CONFIG: json.dumps(peft_config).encode()}
        if adapter.m is not None and adapter.v is not None:
            moments = {**self._named("m.", adapter.m, adapter.config), **self._named("v.", adapter.v, adapter.config)}
            files[OPTIMIZER] = save_safetensors(moments)
        if adapter.gradients is not None:
            files[GRADIENTS] = save_safetensors(self._named("", adapter.gradients, adapter.config))
        notes = self._notes(adapter.config) if adapter.kind == "external" else []
        return files | ({README: "\n".join(notes).encode()} if notes else {})

    def _notes(self, config: AdapterConfig) -> list[str]:
        """Notes for the user, where other programs compute something else with this adapter than this server does."""
        is_tied, is_passed_over = self.model.tied and config.train_unembed, not self.model.peft_knows_experts
        return [TIED_NOTE] * is_tied + [EXPERTS_NOTE] * (is_passed_over and config.train_mlp)

    def _named(self, prefix: str, weights: Any, config: AdapterConfig) -> dict[str, np.ndarray]:
        tensors, _ = to_peft(self.model, trim(weights, config.rank), config)
        return {prefix + name: tensor for name, tensor in tensors.items()}

    def kept(self, key: str) -> SavedAdapter:
        """The adapter that is in memory. Raises `UnknownCheckpoint`."""
        with self._lock:
            if key not in self._cached:
                raise UnknownCheckpoint(f"The adapter {key} is not in memory any more.")
            return self._cached[key]

    # ---- load

    def load(self, key: str) -> SavedAdapter:
        """The adapter from memory, else from its files. Raises `UnknownCheckpoint`, `CorruptedCheckpoint`,
        `InvalidRequest`."""
        with self._lock:
            if key in self._cached:
                self._cached.move_to_end(key)
                return self._cached[key]
        adapter = self._read(key)
        self.keep(key, adapter)
        return adapter

    def _read(self, key: str) -> SavedAdapter:
        metadata, files = read_checkpoint_sync(self.store, key)
        if ADAPTER + AGE_SUFFIX in files:
            raise InvalidRequest(f"The checkpoint {key} is encrypted to its recipients: it cannot be loaded here.")
        if ADAPTER not in files or ADAPTER_CONFIG not in files:
            raise CorruptedCheckpoint(f"The checkpoint {key} holds no adapter ({ADAPTER_CONFIG} and {ADAPTER}).")
        try:
            peft_config, tensors = json.loads(files[ADAPTER_CONFIG]), load_safetensors(files[ADAPTER])
        except (ValueError, SafetensorError) as error:
            raise CorruptedCheckpoint(f"The checkpoint {key} cannot be read: {error}") from error
        weights, config = from_peft(self.model, tensors, peft_config)
        if config.rank > self.max_rank:
            self._refuse_rank(key, config.rank)
        _check_finite(key, weights)
        config = msgspec.convert(metadata["adapter"], AdapterConfig) if "adapter" in metadata else config
        adapter = SavedAdapter(
            metadata.get("kind", "external"), config, self._padded(weights), step=np.int32(metadata.get("step", 0))
        )
        if OPTIMIZER in files:
            moments = load_safetensors(files[OPTIMIZER])
            adapter.m, adapter.v = (self._from_named(moments, name, peft_config) for name in ("m.", "v."))
        if GRADIENTS in files:
            adapter.gradients = self._from_named(load_safetensors(files[GRADIENTS]), "", peft_config)
        return adapter

    def _refuse_rank(self, key: str, rank: int) -> None:
        if rank <= self.rank_limit:
            raise NeedsWiderSlots(rank)
        raise InvalidRequest(
            f"The checkpoint {key} has rank {rank}; this server's maximum is {self.rank_limit} (max_lora_rank in "
            "backend_config, or less where the devices' memory does not hold wider slots)."
        )

    def _from_named(self, tensors: dict[str, np.ndarray], prefix: str, peft_config: dict[str, Any]) -> HostWeights:
        mine = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        return self._padded(from_peft(self.model, mine, peft_config)[0])

    def _padded(self, weights: Any) -> HostWeights:
        return pad(self.model.lora_targets(), weights, self.max_rank)

    def _drop(self, key: str) -> None:
        adapter = self._cached.pop(key, None)
        if adapter is not None:
            self._num_bytes -= adapter.num_bytes


def check_same(key: str, saved: AdapterConfig, wanted: AdapterConfig) -> None:
    """Raises `InvalidRequest` unless a checkpoint's adapter has the shape of the one that is to hold it."""
    if saved.rank != wanted.rank:
        raise InvalidRequest(f"The checkpoint {key} has rank {saved.rank}, this model has rank {wanted.rank}.")
    for flag in ("train_attn", "train_mlp", "train_unembed"):
        if getattr(saved, flag) != getattr(wanted, flag):
            raise InvalidRequest(
                f"The checkpoint {key} has {flag}={getattr(saved, flag)}, this model has {getattr(wanted, flag)}."
            )


def _description(adapter: SavedAdapter) -> dict[str, Any]:
    return {"kind": adapter.kind, "adapter": msgspec.to_builtins(adapter.config), "step": int(adapter.step)}


def _check_finite(key: str, weights: Any) -> None:
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(weights)):
        raise InvalidRequest(f"The checkpoint {key} holds weights that are NaN or infinite.")
