"""The mathematics of the fake engine (`fake_engine.py` says which), and its adapters as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save as save_safetensors

from tx_async.errors import NonFiniteGradients
from tx_async.wire.worker import LOSS_FNS, AdamParams, Result, SequenceSpec, SequenceTimes, Stepped

VOCAB_SIZE = 512
CONTEXT = 1024
FEATURES = 16
PEFT_FILE = "adapter_model.safetensors"
FEATURES_TENSOR = "base_model.model.features"


@dataclass
class Adapter:
    """What a slot holds: float32 arrays of FEATURES numbers, as an adapter with Adam state would."""

    w: np.ndarray = field(default_factory=lambda: np.zeros(FEATURES, np.float32))
    m: np.ndarray = field(default_factory=lambda: np.zeros(FEATURES, np.float32))
    v: np.ndarray = field(default_factory=lambda: np.zeros(FEATURES, np.float32))
    grad: np.ndarray = field(default_factory=lambda: np.zeros(FEATURES, np.float32))
    step: int = 0


# ---- adapters as files


def peft_files(w: np.ndarray) -> dict[str, bytes]:
    """As an engine of somebody else would read them."""
    config = {"peft_type": "LORA", "r": 1, "base_model_name_or_path": None}
    return {PEFT_FILE: save_safetensors({FEATURES_TENSOR: w}), "adapter_config.json": json.dumps(config).encode()}


def weights_of(tensors: Mapping[str, np.ndarray], without: Sequence[str] = ()) -> np.ndarray:
    """An adapter's FEATURES numbers: its own, or of any other adapter a mixture in which every tensor shows."""
    w = np.zeros(FEATURES, np.float32)
    for name, tensor in sorted(tensors.items()):
        if not any(part in name for part in without):
            w += tensor if name == FEATURES_TENSOR else np.resize(np.tanh(tensor.ravel()), FEATURES) / len(tensors)
    return w


# ---- the mathematics


def _base(before: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """b(previous, token) in [-2, 2): a hash that is the same on every machine."""
    mixed = (before.astype(np.uint32) * np.uint32(2654435761)) ^ (tokens.astype(np.uint32) * np.uint32(2246822519))
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(2654435761)
    return ((mixed >> np.uint32(8)).astype(np.float32) / np.float32(2**24) - np.float32(0.5)) * np.float32(4)


def pair_logprobs(w: np.ndarray, before: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """log sigmoid(b + w[class]), float32 in the shape of `tokens`."""
    return (-np.logaddexp(np.float32(0), -(_base(before, tokens) + w[tokens % FEATURES]))).astype(np.float32)


@np.errstate(invalid="ignore", over="ignore")  # a tenant's NaN and infinity are its own affair
def row_loss(w: np.ndarray, row: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(logprobs [L, K], losses [L], gradient of w [FEATURES]) of one packed row."""
    used = row["segment_ids"] > 0  # [L]
    targets = row["target_tokens"]  # [L, K]
    before = np.repeat(row["tokens"][:, None], targets.shape[1], axis=1)
    logprobs = np.where(used[:, None], pair_logprobs(w, before, targets), np.float32(0.0))
    cross_entropy = (row["loss_fn"] == LOSS_FNS.index("cross_entropy"))[:, None]
    ratio = np.exp(np.minimum(logprobs - row["logprobs"][:, None], np.float32(20.0)))
    advantages = row["advantages"][:, None]
    # Every loss but the first is the policy gradient here: -ratio · advantage.
    terms = np.where(cross_entropy, -row["weights"] * logprobs, -ratio * advantages * (row["weights"] != 0))
    slopes = np.where(cross_entropy, -row["weights"], -ratio * advantages * (row["weights"] != 0))  # d term / d logprob
    terms, slopes = np.where(used[:, None], terms, 0.0), np.where(used[:, None], slopes, 0.0)
    slopes = slopes * (1.0 - np.exp(logprobs))  # d log sigmoid(x) / dx = 1 - sigmoid(x)
    grad = np.bincount((targets % FEATURES).ravel(), weights=slopes.ravel(), minlength=FEATURES)
    return logprobs, terms.sum(axis=1).astype(np.float32), grad.astype(np.float32)


def optim_step(adapter: Adapter, adam: AdamParams) -> Result:
    """torch.optim.AdamW on the adapter's numbers."""
    grad = adapter.grad.copy()
    adapter.grad[:] = 0.0
    norm = float(np.linalg.norm(grad.astype(np.float64)))
    if not np.isfinite(norm):
        raise NonFiniteGradients()
    if adam.grad_clip_norm > 0 and norm > adam.grad_clip_norm:
        grad *= np.float32(adam.grad_clip_norm / norm)
    adapter.step += 1
    adapter.m = np.float32(adam.beta1) * adapter.m + np.float32(1 - adam.beta1) * grad
    adapter.v = np.float32(adam.beta2) * adapter.v + np.float32(1 - adam.beta2) * grad * grad
    m_hat = adapter.m / np.float32(1 - adam.beta1**adapter.step)
    v_hat = adapter.v / np.float32(1 - adam.beta2**adapter.step)
    step = m_hat / (np.sqrt(v_hat) + np.float32(adam.eps)) + np.float32(adam.weight_decay) * adapter.w
    adapter.w = (adapter.w - np.float32(adam.learning_rate) * step).astype(np.float32)
    return Stepped(metrics={"grad_norm": norm}, step=adapter.step)


def hash_of(*numbers: int) -> int:
    state = 0xCBF29CE484222325
    for number in numbers:
        state = ((state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 29
    return state >> 16


def ends_with(tokens: Sequence[int], stop_strings: Sequence[str]) -> bool:
    """Here, a token below 256 is the character with that number; others are none."""
    if not stop_strings or not tokens:
        return False
    text = "".join(chr(token) for token in tokens if token < 256)
    return tokens[-1] < 256 and any(text.endswith(stop) for stop in stop_strings)


def allowed(spec: SequenceSpec, num_tokens: int, token: int, vocab_size: int) -> int:
    """The token itself, or the next one that may stand there."""
    forced = [t for t, bias in spec.logit_bias if bias >= 100]
    if forced:
        return forced[0]
    banned = {t for t, bias in spec.logit_bias if bias <= -100}
    if num_tokens < spec.min_tokens:
        banned |= set(spec.stop_token_ids)
    while token in banned:
        token = (token + 1) % vocab_size
    return token


@dataclass
class FakeSequence:
    spec: SequenceSpec
    prompt: np.ndarray
    targets: np.ndarray | None
    #: monotonic seconds
    admitted_at: float
    #: prompt tokens that were prefilled
    prefilled: int = 0
    tokens: list[int] = field(default_factory=list)
    #: (when it began, when it ended) of each quantum that has brought tokens
    quanta: list[tuple[float, float]] = field(default_factory=list)

    def times(self) -> SequenceTimes | None:
        if not self.quanta:
            return None
        began, first, last = self.quanta[0][0], self.quanta[0][1], self.quanta[-1][1]
        began, first, last = (1000 * (at - self.admitted_at) for at in (began, first, last))
        return SequenceTimes(decode_began=began, first_token=first, last_token=last)


def read_base_model(folder: str) -> tuple[int, int]:
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
    except OSError:
        return VOCAB_SIZE, CONTEXT
    return config["vocab_size"], config["max_position_embeddings"]
