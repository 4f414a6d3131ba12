"""The trial: what an external engine samples before its worker attaches, for a worker of our own to compare with.

An engine may silently drop a part of an adapter (its unembedding, or projections that it has absorbed into others), or
answer with log-probabilities of another kind. So it samples a little, with the base model and with a loud adapter of
every projection, and the server lets a worker that scores compute the log-probabilities of these tokens.
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as save_safetensors

from tx_async import hub, model_folder
from tx_async.errors import ConfigError
from tx_async.storage.checkpoint_files import ADAPTER, ADAPTER_CONFIG, write_checkpoint_sync
from tx_async.storage.store import Store
from tx_async.wire.worker import BASE_SLOT, LORA_ALPHA, AdapterConfig, SequenceSpec, TrialSequence
from tx_async.worker.dialect import Dialect, EncodedPrompt

FOLDER = "external-trials"
TOLERANCE = 1e-4
TOLERANCE_RECURRENT = 2e-4
"""Recurrent layers sum along the whole sequence, in another order."""
RANK = 1
"""The trial adapter's rank, which every engine takes, whatever largest rank it was started with."""
LOUDNESS = {"attn": 0.7, "mlp": 0.7, "unembed": 1.5}
"""Standard deviation of what each projection's adapter adds to an output whose own is about 1: each alone moves
log-probabilities by tenths of a nat, so a dropped one shows."""
PROMPT_TOKENS = 12
COMPLETION_TOKENS = 8
TEMPERATURES = (0.0, 0.5)
"""The second temperature reveals log-probabilities that were taken after tempering."""
SEED = 20


@dataclass(frozen=True)
class Subject:
    """The base model as the trial needs it: its shapes, without its weights."""

    model: Any
    """The `models.decoder.Decoder`."""
    has_experts: bool
    is_latent: bool
    """The model has multi-head latent attention: engines absorb its projections, whose adapters then do nothing."""
    is_recurrent: bool
    sees: bool = False
    """The text model is in a folder with a vision tower."""

    @property
    def tolerance(self) -> float:
        return TOLERANCE_RECURRENT if self.is_recurrent else TOLERANCE

    @property
    def adapter(self) -> AdapterConfig:
        return AdapterConfig(rank=RANK, train_attn=not self.is_latent)

    def why_unfit(self, folder: str) -> str:
        """Why an adapter, a folder of PEFT files, must not be sampled by an external engine; "" when it may."""
        if not self.is_latent:
            return ""
        from safetensors import safe_open

        with safe_open(Path(folder) / ADAPTER, "numpy") as file:
            adapts_attention = any(".self_attn." in name for name in file.keys())  # noqa: SIM118 - not a mapping
        return "external engines absorb the projections of latent attention and drop their adapters" * adapts_attention


def read_subject(base_model: str) -> Subject:
    """Read a subject from `config.json` alone. Raises `BaseModelError`."""
    # Shapes only: this process must not take the accelerator that the engine beside it uses.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from tx_async.models.load import model_of

    folder = Path(base_model).expanduser()
    folder = folder if folder.is_dir() else hub.snapshot(base_model, ["*.json"])
    config, model = model_folder.read_config(folder), model_of(folder)
    targets = [target for stack in model.lora_targets().values() for target in stack.values()]
    text = config.get("text_config") or config
    return Subject(
        model=model,
        has_experts=any(target.num_experts for target in targets),
        is_latent=bool(text.get("kv_lora_rank")),
        is_recurrent=model.state_layers > 0,
        sees="text_config" in config,
    )


def save_adapter(store: Store, subject: Subject) -> str:
    """Store a loud adapter under a key of its own. Returns the key."""
    key = f"{FOLDER}/{uuid.uuid4().hex}"
    tensors, config = loud_adapter(subject)
    files = {ADAPTER: save_safetensors(tensors, {"format": "pt"}), ADAPTER_CONFIG: json.dumps(config).encode()}
    write_checkpoint_sync(store, key, files, {"kind": "external"})
    return key


def loud_adapter(subject: Subject) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The loud adapter's PEFT tensors and configuration."""
    from tx_async.models.peft import adapter_shapes, to_peft

    random = np.random.default_rng(SEED)
    groups = {name: t.group for stack in subject.model.lora_targets().values() for name, t in stack.items()}
    weights = {
        stack: {
            name: (
                random.standard_normal(a, np.float32) * np.float32(a[-2] ** -0.5),
                random.standard_normal(b, np.float32) * np.float32(LOUDNESS[groups[name]] * RANK / LORA_ALPHA),
            )
            for name, (a, b) in shapes.items()
        }
        for stack, shapes in adapter_shapes(subject.model, subject.adapter).items()
    }
    return to_peft(subject.model, weights, subject.adapter)


async def sample(dialect: Dialect, base: str, adapter: str, vocab_size: int) -> tuple[TrialSequence, ...]:
    """Sample a few tokens with the base model and with the adapter. Raises as the dialect does."""
    found = []
    for number, (name, temperature) in enumerate((name, t) for name in (base, adapter) for t in TEMPERATURES):
        prompt = np.random.default_rng([SEED, number]).integers(0, vocab_size, PROMPT_TOKENS).astype(np.int32)
        spec = SequenceSpec(
            sequence_id=0, sampler_slot=BASE_SLOT, adapter_version="", prompt_index=0, max_tokens=COMPLETION_TOKENS,
            temperature=temperature, seed=SEED,
        )  # fmt: skip
        completion = await dialect.complete(name, EncodedPrompt(prompt), spec)
        if len(completion.tokens) != len(completion.logprobs) or not len(completion.tokens):
            raise ConfigError(f"{dialect.product} at {dialect.url} returns no log-probabilities of sampled tokens.")
        found.append(
            TrialSequence(
                tokens=tuple(prompt.tolist() + completion.tokens.tolist()),
                logprobs=tuple(completion.logprobs.tolist()),
                with_adapter=name == adapter,
            )
        )
    return tuple(found)
